"""Where every sample of a set of webdataset shards lies: a scan of the tar headers, so that samples are read by offset.

The scan accepts a shard only if it is whole: every header's checksum holds and the end-of-archive block is there. A
truncated or overwritten tar is refused, where a sequential reader would silently stop early.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand
import numpy as np

from mmcontrast.errors import UserError

BLOCK = 512  # bytes: tar's unit


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


@dataclass(frozen=True)
class ShardIndex:
    """One shard: for each of its n samples, the members of its e extensions by position.

    Attributes:
        keys: [n] the samples' names; extensions: [e] without the dot, as "png".
        offsets, sizes: [n, e] int64, bytes; a size of −1 where the sample has no such member.
    """

    path: Path
    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray

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


def index_shard(path: Path) -> ShardIndex:
    """Scans one tar.

    Raises:
        UserError: if it is not a whole, uncompressed tar, or a sample's members are not adjacent in it.
    """
    places: dict[str, dict[str, tuple[int, int]]] = {}
    last_key = None
    for name, offset, size in _members(path):
        folder, _, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            continue  # webdataset's rule: a member without an extension belongs to no sample
        key = f"{folder}/{stem}" if folder else stem
        if key != last_key and key in places:
            raise UserError(f"shard {path}: the members of sample {key!r} are not adjacent; write the shard again, sorted")
        places.setdefault(key, {})[extension.lower()] = (offset, size)
        last_key = key
    if not places:
        raise UserError(f"shard {path} holds no sample")
    extensions = tuple(sorted({extension for members in places.values() for extension in members}))
    offsets = np.zeros((len(places), len(extensions)), np.int64)
    sizes = np.full((len(places), len(extensions)), -1, np.int64)
    for row, members in enumerate(places.values()):
        for extension, (offset, size) in members.items():
            column = extensions.index(extension)
            offsets[row, column], sizes[row, column] = offset, size
    return ShardIndex(path, tuple(places), extensions, offsets, sizes)


def _members(path: Path) -> Iterable[tuple[str, int, int]]:
    """(name, offset of the data, size) of every regular file in the tar."""
    damaged = UserError(f"shard {path} is not a whole tar (truncated, compressed or overwritten): write or copy it again")
    try:
        total = os.path.getsize(path)
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
    with file:
        position, long_name = 0, None
        while True:
            file.seek(position)
            header = file.read(BLOCK)
            if len(header) < BLOCK:
                raise damaged
            if not any(header):  # the end-of-archive mark: zeros to the end of the file, two blocks at least
                if total - position < 2 * BLOCK or any(file.read()):
                    raise damaged
                return
            checksum = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
            if checksum != _octal(header[148:156]):
                raise damaged
            size, kind = _octal(header[124:136]), header[156:157]
            if size < 0 or position + BLOCK + size > total:
                raise damaged
            if kind == b"L":  # GNU: the data is the next member's long name
                long_name = _text(file.read(size))
            elif kind == b"x":  # POSIX: records of the form "27 path=…\n"
                records = _text(file.read(size)).split("\n")
                long_name = next((r.partition("path=")[2] for r in records if " path=" in r), long_name)
            elif kind in (b"0", b"\0"):
                prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
                name = long_name or "/".join(part for part in (prefix, _text(header[:100])) if part)
                yield name.removeprefix("./"), position + BLOCK, size
                long_name = None
            position += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK


def _octal(field: bytes) -> int:
    """A number in a tar header; −1 if it is none. Base 256, with its top bit set, is for sizes of 8 GiB and more."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    return int(digits, 8) if digits and all(d in b"01234567" for d in digits) else -1


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
