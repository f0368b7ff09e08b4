"""Where every sample of a set of webdataset shards lies: a scan of the tar headers, so that samples are read by offset.

The scan accepts a shard only if it is whole: every header's checksum holds and the end-of-archive block is there. A
truncated or overwritten tar is refused, where a sequential reader would silently stop early. A scan is kept in a cache.
"""

import glob
import hashlib
import os
import signal
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from rich.console import Console
from rich.progress import track

from mmcontrast.errors import UserError

BLOCK = 512  # bytes: tar's unit
REGULAR, GNU_LONG_NAME, POSIX_RECORDS = b"0Lx"
MAX_NAME_BYTES = 2**20  # of what tells a member's long name
WORTH_PROCESSES = 256 * 2**20  # bytes of shards to scan from which several processes pay
VERSION = 1  # of what the cache holds


def expand_shards(patterns: str | Sequence[str]) -> list[Path]:
    """Shard files named by paths, globs (`train-*.tar`) and brace ranges (`train-{00000..00025}.tar`), in order.

    Raises:
        UserError: if a pattern matches no file.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for expanded in braceexpand.braceexpand(pattern):
            matches = sorted(glob.glob(expanded))
            if not matches:
                raise UserError(f"no shard at {expanded!r} (from {Path.cwd()}): correct the path, or build the data first")
            found.extend(Path(match) for match in matches)
    return found


class Keys(Sequence[str]):
    """The samples' names, in one block of bytes."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # one at a time
        if not 0 <= row < len(self.ends):
            raise IndexError(row)
        start = self.ends[row - 1] if row else 0
        return self.text[start : self.ends[row]].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class ShardIndex:
    """One shard: for each of its n samples, the members of its e extensions by position.

    Attributes:
        keys: [n] the samples' names; extensions: [e] without the dot, as "png".
        offsets, sizes: [n, e] int64, bytes; a size of −1 where the sample has no such member.
        digest: of all that, 16 hexadecimal digits: equal digests, equal samples in the same places.
    """

    path: Path
    keys: Keys
    extensions: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        """The bytes of those of the wanted members that the sample has."""
        members: dict[str, bytes] = {}
        with self.path.open("rb") as file:
            for extension in extensions:
                if extension in self.extensions:
                    column = self.extensions.index(extension)
                    if self.sizes[sample, column] >= 0:
                        file.seek(self.offsets[sample, column])
                        members[extension] = file.read(self.sizes[sample, column])
        return members


@dataclass(frozen=True)
class FolderIndex(ShardIndex):
    """A folder of files, `a.jpg` beside `a.txt`, read like a shard; `offsets` are places in `names`, relative to it."""

    names: tuple[str, ...] = ()

    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        members: dict[str, bytes] = {}
        for extension in extensions:
            if extension in self.extensions:
                column = self.extensions.index(extension)
                if self.sizes[sample, column] >= 0:
                    members[extension] = (self.path / self.names[self.offsets[sample, column]]).read_bytes()
        return members


def open_shards(patterns: str | Sequence[str], progress: bool = False) -> list[ShardIndex]:
    """The indexes of all shards: from the cache where it has them, else scanned, on all cores where that is worth it.

    Raises:
        UserError: for the first shard that is missing or damaged.
    """
    paths = expand_shards(patterns)
    missing = [path for path in paths if not _cached_file(path).exists()]
    if sum(path.stat().st_size for path in missing if path.exists()) > WORTH_PROCESSES and len(missing) > 1:
        with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            scanned = pool.map(_indexed, missing, chunksize=max(1, len(missing) // 256))
            for error in track(
                scanned, "indexing shards", len(missing), console=Console(stderr=True), transient=True, disable=not progress
            ):
                if error:
                    raise UserError(error)
    return [index_shard(path) for path in paths]


def _indexed(path: Path) -> str | None:
    """The error, which a worker process cannot raise in one line."""
    try:
        index_shard(path)
    except UserError as error:
        return str(error)
    return None


def index_shard(path: Path, scan: bool = False) -> ShardIndex:
    """The index of one tar, from the cache if the file is the one that was scanned (its size, time, first and last bytes),
    unless `scan` wants it read again. A folder of files is indexed each time.

    Raises:
        UserError: if it is not a whole, uncompressed tar, or a sample's members are not adjacent in it.
    """
    if path.is_dir():
        return _index_folder(path)
    try:
        fingerprint = _fingerprint(path)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
    cached = _cached_file(path)
    try:
        with np.load(cached, allow_pickle=False) as entry:
            if str(entry["fingerprint"]) == fingerprint and not scan:
                arrays = {name: entry[name] for name in ("text", "ends", "extensions", "offsets", "sizes")}
                return _index(path, **arrays, digest=str(entry["digest"]))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        pass  # not there, or not ours: scanned again
    found = _scan(path)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, prefix=f"{cached.stem}-", suffix=".partial", delete=False) as file:
            arrays = {"text": found.keys.text, "ends": found.keys.ends, "extensions": np.array(found.extensions, dtype="U")}
            np.savez(file, fingerprint=fingerprint, digest=found.digest, offsets=found.offsets, sizes=found.sizes, **arrays)
        os.replace(file.name, cached)
    except OSError:  # a cache that cannot be written is none
        for partial in cached.parent.glob(f"{cached.stem}-*.partial"):
            partial.unlink(missing_ok=True)
    return found


def cache_folder() -> Path:
    """Where indexes are kept: $MMCONTRAST_CACHE, or mmcontrast in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmcontrast"
    return Path(os.environ.get("MMCONTRAST_CACHE", default)) / "index"


def _cached_file(path: Path) -> Path:
    return cache_folder() / f"{hashlib.blake2b(str(path.absolute()).encode(), digest_size=12).hexdigest()}.npz"


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        ends = file.read(4096)
        file.seek(max(0, about.st_size - 4096))
        ends += file.read()
    return f"{VERSION} {about.st_size} {about.st_mtime_ns} {zlib.crc32(ends):08x}"


def _index(path: Path, text: Any, ends: Any, extensions: Any, offsets: Any, sizes: Any, digest: str = "") -> ShardIndex:
    names = tuple(str(name) for name in extensions)
    if not digest:
        whole = hashlib.blake2b(repr(names).encode(), digest_size=8)
        for array in (text, ends, offsets, sizes):
            whole.update(np.ascontiguousarray(array).data)
        digest = whole.hexdigest()
    return ShardIndex(path, Keys(text, ends), names, offsets, sizes, digest)


def _scan(path: Path) -> ShardIndex:
    """Reads every header of a tar; 4 µs a member, and of what it finds no Python object stays."""
    return _collected(path, _members(path))


def _index_folder(path: Path) -> FolderIndex:
    """Files that are one sample lie in one folder; their order is that of their names."""
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    names.sort(key=lambda name: _sample_of(name)[0])  # `a.b/x` between `a.png` and `a.txt` would part them
    found = _collected(path, ((name, place, (path / name).stat().st_size) for place, name in enumerate(names)))
    return FolderIndex(path, found.keys, found.extensions, found.offsets, found.sizes, found.digest, tuple(names))


def _sample_of(name: str) -> tuple[str, str]:
    """(key, extension) of a member's name; an empty extension if it belongs to no sample, as webdataset has it."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return name, ""
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _collected(path: Path, members: Iterable[tuple[str, int, int]]) -> ShardIndex:
    text, ends, hashes = bytearray(), array("q"), array("q")
    rows, columns, offsets, sizes = array("q"), array("l"), array("q"), array("q")
    extensions: dict[str, int] = {}
    last_key = None
    for name, offset, size in members:
        key, extension = _sample_of(name)
        if not extension:
            continue
        if key != last_key:
            text += key.encode("utf-8", "surrogateescape")
            ends.append(len(text))
            hashes.append(hash(key))
            last_key = key
        rows.append(len(ends) - 1)
        columns.append(extensions.setdefault(extension, len(extensions)))
        offsets.append(offset)
        sizes.append(size)
    keys = Keys(np.array(text, dtype=np.uint8), np.array(ends, dtype=np.int64))
    codes = np.array(hashes, dtype=np.int64)
    order = np.argsort(codes, kind="stable")
    again = np.flatnonzero(np.diff(codes[order]) == 0)
    for first, second in zip(order[again], order[again + 1], strict=True):
        if keys[first] == keys[second]:
            raise UserError(
                f"shard {path}: the members of sample {keys[first]!r} are not adjacent; write the shard again, sorted"
            )
    names = sorted(extensions)
    place = np.array([names.index(extension) for extension in extensions], dtype=np.int64)
    table = np.full((2, len(keys), len(names)), -1, dtype=np.int64)
    table[:, np.array(rows), place[np.array(columns, dtype=np.int64)]] = np.array(offsets), np.array(sizes)
    return _index(path, keys.text, keys.ends, names, *table)


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, size) of every regular file in the tar. Checksums are verified a few thousand at a time."""
    damaged = UserError(f"shard {path} is not a whole tar (truncated, compressed or overwritten): write or copy it again")
    headers: list[bytes] = []
    with path.open("rb", buffering=0) as file:
        descriptor, total = file.fileno(), os.fstat(file.fileno()).st_size
        position, long_name = 0, None
        while True:
            header = os.pread(descriptor, BLOCK, position)
            if len(header) < BLOCK:
                raise damaged
            if header[0] == 0 and not any(header):  # the end-of-archive mark: zeros to the end of the file, two blocks at least
                file.seek(position)
                zeros = all(rest.count(0) == len(rest) for rest in iter(lambda: file.read(2**20), b""))
                if total - position < 2 * BLOCK or not zeros or not _checksums_hold(headers):
                    raise damaged
                return
            headers.append(header)
            if len(headers) == 4096:
                if not _checksums_hold(headers):
                    raise damaged
                headers.clear()
            size, kind = _octal(header[124:136]), header[156]
            content = position + BLOCK
            position = content + (size + BLOCK - 1) // BLOCK * BLOCK
            if size < 0 or content + size > total or (kind in (GNU_LONG_NAME, POSIX_RECORDS) and size > MAX_NAME_BYTES):
                raise damaged
            if kind == REGULAR or kind == 0:
                if long_name:
                    name, long_name = long_name, None
                else:
                    name = _text(header[:100])
                    if header[345] and header[257:263] == b"ustar\0":
                        name = f"{_text(header[345:500])}/{name}"
                yield name.removeprefix("./"), content, size
            elif kind == GNU_LONG_NAME:  # the data is the next member's name
                long_name = _text(os.pread(descriptor, size, content))
            elif kind == POSIX_RECORDS:  # of the form "27 path=…\n"
                records = _text(os.pread(descriptor, size, content)).split("\n")
                long_name = next((r.partition("path=")[2] for r in records if " path=" in r), long_name)


def _checksums_hold(headers: list[bytes]) -> bool:
    """A header's bytes add up to the number in it, its own eight taken for spaces."""
    if not headers:
        return True
    table = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK)
    sums = table.sum(1, dtype=np.int64) - table[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    return all(_octal(header[148:156]) == found for header, found in zip(headers, sums.tolist(), strict=True))


def _octal(field: bytes) -> int:
    """A number in a tar header; −1 if it is none. Base 256, with its top bit set, is for sizes of 8 GiB and more."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 "), 8) if field[:1].isdigit() or field[:1] == b" " else -1
    except ValueError:
        return -1


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
