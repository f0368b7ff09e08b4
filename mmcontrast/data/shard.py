"""What every kind of shard offers: its samples by position, each with some members, read one sample at a time."""

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcontrast.errors import UserError

MAX_EXTENSIONS = 1000  # of a shard: beyond that the keys have dots


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
class ShardIndex(ABC):
    """One shard of n samples: a tar, a folder, or a table.

    Attributes:
        name: its path or URL.
        keys: [n] the samples' names.
        extensions: of its members (or a table's columns), without the dot, as "png".
        digest: 16 hexadecimal digits or so: equal digests, equal samples in the same places.
    """

    name: str
    keys: Sequence[str]
    extensions: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def sizes_of(self, extension: str) -> np.ndarray:
        """[n] int64 bytes of a member of each sample, −1 where it has none."""

    @abstractmethod
    def size(self, sample: int, extension: str) -> int:
        """Bytes, or −1."""

    @abstractmethod
    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        """The bytes of those of the wanted members that the sample has.

        Raises:
            UserError: if they cannot be read.
        """


@dataclass(frozen=True)
class MemberIndex(ShardIndex):
    """A shard whose members lie somewhere as they are.

    Attributes:
        places, sizes: [n, extensions] int64; where a member is, by the shard's own count, and its bytes, −1 if there is none.
    """

    places: np.ndarray
    sizes: np.ndarray

    def sizes_of(self, extension: str) -> np.ndarray:
        return self.sizes[:, self.extensions.index(extension)]

    def size(self, sample: int, extension: str) -> int:
        return int(self.sizes[sample, self.extensions.index(extension)])

    def wanted(self, sample: int, extensions: Iterable[str]) -> list[tuple[int, int, str]]:
        """(place, size, extension) of the members that are there, by place."""
        columns = [self.extensions.index(extension) for extension in set(extensions) if extension in self.extensions]
        places, sizes = self.places[sample].tolist(), self.sizes[sample].tolist()
        return sorted((places[c], sizes[c], self.extensions[c]) for c in columns if sizes[c] >= 0)


@dataclass(frozen=True)
class Members:
    """What a scan collects: what an index of members is made of."""

    keys: Keys
    extensions: tuple[str, ...]
    digest: str
    places: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, text: Any, ends: Any, extensions: Any, places: Any, sizes: Any, digest: str = "") -> "Members":
        names = tuple(str(name) for name in extensions)
        if not digest:
            whole = hashlib.blake2b(repr(names).encode(), digest_size=8)
            for part in (text, ends, places, sizes):
                whole.update(np.ascontiguousarray(part).data)
            digest = whole.hexdigest()
        return cls(Keys(text, ends), names, digest, places, sizes)

    @classmethod
    def collect(cls, shard: str, members: Iterable[tuple[str, int, int]]) -> "Members":
        """Of (name, place, size) of the members in the order of their samples. No Python object stays for any of them.

        Raises:
            UserError: if a sample's members are not adjacent.
        """
        text, ends, hashes = bytearray(), array("q"), array("q")
        rows, columns, places, sizes = array("q"), array("l"), array("q"), array("q")
        extensions: dict[str, int] = {}
        last_key = None
        for name, place, size in members:
            key, extension = sample_of(name)
            if not extension:
                continue
            if key != last_key:
                text += key.encode("utf-8", "surrogateescape")
                ends.append(len(text))
                hashes.append(hash(key))
                last_key = key
            rows.append(len(ends) - 1)
            columns.append(extensions.setdefault(extension, len(extensions)))
            places.append(place)
            sizes.append(size)
        keys = Keys(np.array(text, dtype=np.uint8), np.array(ends, dtype=np.int64))
        codes = np.array(hashes, dtype=np.int64)
        order = np.argsort(codes, kind="stable")
        again = np.flatnonzero(np.diff(codes[order]) == 0)
        for first, second in zip(order[again], order[again + 1], strict=True):
            if keys[first] == keys[second]:
                raise UserError(
                    f"shard {shard}: the members of sample {keys[first]!r} are not adjacent; write the shard again, sorted"
                )
        if len(extensions) > MAX_EXTENSIONS:
            raise UserError(
                f"shard {shard}: {len(extensions)} different extensions, as .{next(reversed(extensions))}; what follows the"
                " first dot of a member's name is its extension: write the names without dots before it"
            )
        names = sorted(extensions)
        cells = np.array(rows, dtype=np.int64) * max(1, len(names)) + np.array(columns, dtype=np.int64)
        cells.sort()
        if len(twice := cells[:-1][cells[1:] == cells[:-1]]):
            row = int(twice[0]) // len(names)
            raise UserError(f"shard {shard}: sample {keys[row]!r} has two members of one name; write the shard again")
        column_of = np.array([names.index(extension) for extension in extensions], dtype=np.int64)
        table = np.full((2, len(keys), len(names)), -1, dtype=np.int64)
        table[:, np.array(rows), column_of[np.array(columns, dtype=np.int64)]] = np.array(places), np.array(sizes)
        return cls.of(keys.text, keys.ends, names, *table)


def sample_of(name: str) -> tuple[str, str]:
    """(key, extension) of a member's name; an empty extension if it belongs to no sample, as webdataset has it."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return name, ""
    return f"{folder}/{stem}" if folder else stem, extension.lower()
