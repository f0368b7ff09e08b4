"""Indexes a webdataset tar by a scan of its headers, so that samples are read by offset.

The scan accepts a tar only if it is whole: every header's checksum holds and the end-of-archive block is there. A
truncated or overwritten one is refused, where a sequential reader would silently stop early. A scan is kept in a cache.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.data.files import LocalFile, RemoteFile, is_remote, open_file
from mmcontrast.data.range_cache import cache_root
from mmcontrast.data.shard import LeftOut, MemberIndex, Members, sample_of
from mmcontrast.errors import UserError
from mmcontrast.whole_files import write_whole

BLOCK = 512  # bytes: tar's unit
REGULAR, CONTIGUOUS, HARD_LINK, LINK, FOLDER, GNU_SPARSE, GNU_LONG_NAME, GNU_LONG_LINK = b"07125SLK"
POSIX_RECORDS, SOLARIS_RECORDS, POSIX_GLOBAL_RECORDS = b"xXg"
NAMING = (GNU_LONG_NAME, GNU_LONG_LINK, POSIX_RECORDS, SOLARIS_RECORDS, POSIX_GLOBAL_RECORDS)  # they describe the next member
FILES = (REGULAR, 0, CONTIGUOUS)
REASONS = {HARD_LINK: "hard links have no bytes in a tar (tar --hard-dereference)", LINK: "links have no bytes in a tar"}
MAX_NAME_BYTES = 2**20  # of a header that holds a member's long name
NEAR = 64 * 2**10  # bytes between two members that are read with them rather than skipped
AHEAD = 2**20  # bytes that a remote scan reads at a time
VERSION = 3  # of what the cache holds


@dataclass(frozen=True)
class TarIndex(MemberIndex):
    """The index of a tar. `places` are offsets in the file, in bytes."""

    file: LocalFile | RemoteFile

    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        members: dict[str, bytes] = {}
        run: list[tuple[int, int, str]] = []
        for member in [*self.wanted(sample, extensions), None]:
            if run and (member is None or member[0] - (run[-1][0] + run[-1][1]) > NEAR):
                start = run[0][0]
                data = self.file.read(start, run[-1][0] + run[-1][1])
                members |= {extension: data[place - start :][:size] for place, size, extension in run}
                run = []
            if member:
                run.append(member)
        return members

    def read_many(self, samples: np.ndarray, extensions: Sequence[str]) -> Iterator[dict[str, bytes]]:
        """Yield what `read` returns of each of several samples. A local file is opened once for all of them, and their places
        are looked up many at a time.

        Args:
            extensions: of this shard's.

        Raises:
            UserError: if the bytes are not there.
        """
        if not isinstance(self.file, LocalFile):
            yield from (self.read(sample, extensions) for sample in samples.tolist())
            return
        columns = [self.extensions.index(extension) for extension in extensions]
        with _reader(self.file) as read:
            for start in range(0, len(samples), 4096):
                rows = samples[start : start + 4096]
                places, sizes = self.places[rows][:, columns], self.sizes[rows][:, columns]
                present = sizes >= 0
                first = np.where(present, places, np.iinfo(np.int64).max).min(1, initial=np.iinfo(np.int64).max)
                last = np.where(present, places + sizes, 0).max(1, initial=0)
                adjacent = (last - first - np.where(present, sizes, 0).sum(1) <= NEAR) & present.any(1)
                arrays = (rows, adjacent, first, last, places, sizes)
                spans = zip(*(array.tolist() for array in arrays), strict=True)
                for row, is_adjacent, begin, end, row_places, row_sizes in spans:
                    if not is_adjacent:
                        yield self.read(row, extensions)
                        continue
                    data = read(begin, end - begin)
                    if len(data) != end - begin:
                        raise UserError(f"shard {self.file.name} has changed since it was indexed: start again")
                    members = zip(extensions, row_places, row_sizes, strict=True)
                    yield {name: data[place - begin :][:size] for name, place, size in members if size >= 0}


def index_tar(name: str, scan: bool = False, file: LocalFile | RemoteFile | None = None) -> TarIndex:
    """Return a tar's index: from the cache if the file is the one that was scanned, by its fingerprint, unless `scan` is true.

    Args:
        scan: read it again.
        file: the tar, with its fingerprint; default: it is opened now.

    Raises:
        UserError: if it is not a whole, uncompressed tar, or a sample's members are not adjacent in it.
    """
    file, cached = file or open_file(name), index_file(name)
    members = None if scan else _load(cached, file.fingerprint)
    if members is None:
        left_out = LeftOut()
        members = Members.collect(name, _scan(file, left_out), left_out)
        _keep(cached, file.fingerprint, members)
    arrays = members.places, members.sizes
    return TarIndex(name, members.keys, members.extensions, members.digest, *arrays, file, notes=members.notes)


def index_file(name: str) -> Path:
    """Return the file in which a tar's index is kept."""
    path = name if is_remote(name) else str(Path(name).absolute())
    return cache_root() / "index" / f"{hashlib.blake2b(path.encode(), digest_size=12).hexdigest()}.npz"


def _load(cached: Path, fingerprint: str) -> Members | None:
    """Return what the cache has of a tar, None if that is nothing or of another file."""
    try:
        with np.load(cached, allow_pickle=False) as entry:
            if str(entry["fingerprint"]) == f"{VERSION} {fingerprint}":
                arrays = {name: entry[name] for name in ("text", "ends", "extensions", "places", "sizes", "notes")}
                return Members.of(**arrays, digest=str(entry["digest"]))
    except (OSError, KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        pass  # not there, or not ours
    return None


def _keep(cached: Path, fingerprint: str, members: Members) -> None:
    entry = {"text": members.keys.text, "ends": members.keys.ends, "places": members.places, "sizes": members.sizes}
    entry["notes"] = np.array(members.notes, dtype="U")
    extensions, stamp = np.array(members.extensions, dtype="U"), f"{VERSION} {fingerprint}"
    keep_arrays(cached, **entry, extensions=extensions, fingerprint=stamp, digest=members.digest)


def keep_arrays(cached: Path, **arrays: Any) -> None:
    """Write arrays into a cache; one that cannot be written is none."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, **arrays)

    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cached, write)


def _scan(file: LocalFile | RemoteFile, left_out: LeftOut) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the data, size) of every regular file in the tar; 4 µs a member of a local one. Checksums are
    verified a few thousand at a time.

    Raises:
        UserError: if the tar is not whole, or a member is sparse: its bytes are not there as they are.
    """
    damaged = UserError(f"shard {file.name} is not a whole tar (truncated, compressed or overwritten): write or copy it again")
    headers: list[bytes] = []
    total, position, long_name = file.size, 0, None
    records: dict[str, str] = {}  # of the next member
    global_records: dict[str, str] = {}  # of all that follow
    with _reader(file) as read:
        while True:
            header = read(position, BLOCK)
            if len(header) < BLOCK:
                raise damaged
            if header[0] == 0 and not any(header):  # the end-of-archive mark: zeros to the end, two blocks at least
                rest = (read(start, min(2**20, total - start)) for start in range(position, total, 2**20))
                zeros = all(piece.count(0) == len(piece) for piece in rest)
                if total - position < 2 * BLOCK or not zeros or not _checksums_hold(headers):
                    raise damaged
                return
            headers.append(header)
            if len(headers) == 4096:
                if not _checksums_hold(headers):
                    raise damaged
                headers.clear()
            size, kind = _octal(header[124:136]), header[156]
            if (records or global_records) and kind not in NAMING:
                records = global_records | records
                size = _decimal(records["size"]) if "size" in records else size
            content = position + BLOCK
            position = content + (size + BLOCK - 1) // BLOCK * BLOCK
            if size < 0 or content + size > total:
                raise damaged
            if kind in FILES and not (long_name or records or global_records):
                yield _name(header), content, size
                continue
            if kind in NAMING and size > MAX_NAME_BYTES:
                raise damaged
            if kind == GNU_LONG_NAME:  # the data is the next member's name
                long_name = _text(read(content, size))
            elif kind in (POSIX_RECORDS, SOLARIS_RECORDS, POSIX_GLOBAL_RECORDS):
                new_records = _parse_records(read(content, size))
                if new_records is None:
                    raise damaged
                (global_records if kind == POSIX_GLOBAL_RECORDS else records).update(new_records)
            elif kind != GNU_LONG_LINK:
                name = (records.get("path") or long_name or _name(header)).removeprefix("./")
                if kind == GNU_SPARSE or any(key.startswith("GNU.sparse.") for key in records):
                    raise UserError(
                        f"shard {file.name}: member {name!r} is sparse: write the shard again without tar's --sparse"
                    )
                long_name, records = None, {}
                if kind in FILES:
                    yield name, content, size
                elif kind != FOLDER and sample_of(name)[1]:
                    left_out.add(REASONS.get(kind, "members are no regular files"), name)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":
        name = f"{_text(header[345:500])}/{name}"
    return name.removeprefix("./")


def _parse_records(data: bytes) -> dict[str, str] | None:
    """Parse records like "27 path=…\\n", whose number is their length, whatever the value holds. None: they are broken."""
    records, start = {}, 0
    while start < len(data) and data[start]:
        number, space, _ = data[start : start + 20].partition(b" ")
        if not space or not number.isdigit():
            return None
        stop = start + int(number)
        key, equals, value = data[start + len(number) + 1 : stop - 1].partition(b"=")
        if not equals or not key or stop > len(data) or data[stop - 1 : stop] != b"\n":
            return None
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        start = stop
    return records


def _decimal(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1


@contextmanager
def _reader(file: LocalFile | RemoteFile) -> Iterator[Callable[[int, int], bytes]]:
    """Yield a function that reads (start, number of bytes); fewer at the file's end."""
    if isinstance(file, LocalFile):
        with Path(file.name).open("rb", buffering=0) as opened:
            descriptor = opened.fileno()
            yield lambda start, size: os.pread(descriptor, size, start)
        return
    file.check_ranges()
    window, first = b"", 0

    def read(start: int, size: int) -> bytes:
        nonlocal window, first
        if not first <= start <= start + size <= first + len(window):
            window, first = file.read(start, min(start + max(size, AHEAD), file.size)), start
        return window[start - first :][:size]

    yield read


def _checksums_hold(headers: list[bytes]) -> bool:
    """Return whether each header's bytes add up to the checksum in it, whose own eight bytes count as spaces."""
    if not headers:
        return True
    table = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK)
    sums = table.sum(1, dtype=np.int64) - table[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    return all(_octal(header[148:156]) == total for header, total in zip(headers, sums.tolist(), strict=True))


def _octal(field: bytes) -> int:
    """Return a number in a tar header; −1 if it is none. Base 256, with its top bit set, is for sizes of 8 GiB and more."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 "), 8) if field[:1].isdigit() or field[:1] == b" " else -1
    except ValueError:
        return -1


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
