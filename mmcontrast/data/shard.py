"""Defines what every kind of shard offers: its samples by position, each with some members, read one sample at a time."""

import hashlib
import io
import re
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, TextModality, VectorModality

MAX_EXTENSIONS = 1000  # of a shard: beyond that the keys have dots
LABELS = ("json", "cls")  # members that say what a sample is, or of which class
KNOWN = frozenset({*(e for m in (ImageModality, TextModality, AudioModality, VectorModality) for e in m.extensions), *LABELS})
NO_EXTENSION = "files have no extension in their names"
COMPOUND = re.compile(r"[\w-]+(\.[\w-]+)*")  # an extension as "seg.png"; "0 final.jpg" is the end of a name with dots
COMMON, SEVERAL = 20, 3  # an extension with dots is one if a twentieth of the samples has it; so many are ends of names


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
        notes: what was left out of it, and why, a line each.
    """

    name: str
    keys: Sequence[str]
    extensions: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.keys)

    def identity(self, sample: int) -> str:
        """What tells a sample from all others of its shard."""
        return self.keys[sample]

    def describe(self, sample: int, extension: str = "") -> str:
        """A sample, or a member of it, in words with which a person finds it."""
        return f"sample {self.keys[sample]!r}{extension and f', member .{extension}'}"

    def has(self, extension: str) -> np.ndarray:
        """Bool [n]: which samples have a member."""
        return self.sizes_of(extension) >= 0

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
        places, sizes: [n, extensions] whole numbers; where a member is, by the shard's own count, and its bytes, −1 if there is
            none.
        rows: [n] whole numbers, which samples of the shard these are; None: all.
    """

    places: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray | None = field(default=None, kw_only=True)

    def sizes_of(self, extension: str) -> np.ndarray:
        return self.sizes[:, self.extensions.index(extension)].astype(np.int64, copy=False)

    def size(self, sample: int, extension: str) -> int:
        return int(self.sizes[sample, self.extensions.index(extension)])

    def wanted(self, sample: int, extensions: Iterable[str]) -> list[tuple[int, int, str]]:
        """(place, size, extension) of the members that are there, by place."""
        columns = [self.extensions.index(extension) for extension in set(extensions) if extension in self.extensions]
        places, sizes = self.places[sample].tolist(), self.sizes[sample].tolist()
        return sorted((places[c], sizes[c], self.extensions[c]) for c in columns if sizes[c] >= 0)


def member_of(value: Any) -> bytes | None:
    """A value of a table or of JSON as a member: texts as they are, of a list a line each, lists of numbers as .npy. None:
    there is nothing in it.

    Raises:
        DecodeError: if it is neither.
    """
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
        return "\n".join(" ".join(text.splitlines()) for text in value if text).encode() or None
    if isinstance(value, list):
        target = io.BytesIO()
        np.save(target, np.array(value, dtype=np.float32))
        return target.getvalue()
    if isinstance(value, dict):
        raise DecodeError(f"a structure of {', '.join(map(str, value))}, not a text: name one of its entries")
    return None if value is None else str(value).encode()


class LeftOut:
    """Counts what of a shard is left out, by reason, with the first name of each."""

    def __init__(self) -> None:
        self.reasons: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        before, first = self.reasons.get(reason, (0, name))
        self.reasons[reason] = before + count, first

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{count} {reason}, as {first!r}" for reason, (count, first) in self.reasons.items())


class _KeyText:
    """Keys that are being collected."""

    def __init__(self) -> None:
        self.last: str | None
        self.text, self.ends, self.hashes, self.last = bytearray(), array("q"), array("q"), None

    def row(self, key: str) -> int:
        """The row of the last key, or of a new one."""
        if key != self.last:
            self.text += key.encode("utf-8", "surrogateescape")
            self.ends.append(len(self.text))
            self.hashes.append(hash(key))
            self.last = key
        return len(self.ends) - 1

    def keys(self) -> Keys:
        return Keys(np.array(self.text, dtype=np.uint8), np.array(self.ends, dtype=np.int64))

    def repeated(self) -> str | None:
        """A key that is there twice."""
        keys, codes = self.keys(), np.array(self.hashes, dtype=np.int64)
        order = np.argsort(codes, kind="stable")
        again = np.flatnonzero(np.diff(codes[order]) == 0)
        pairs = ((keys[first], keys[second]) for first, second in zip(order[again], order[again + 1], strict=True))
        return next((first for first, second in pairs if first == second), None)


@dataclass(frozen=True)
class Members:
    """What a scan collects: what an index of members is made of."""

    keys: Keys
    extensions: tuple[str, ...]
    digest: str
    places: np.ndarray
    sizes: np.ndarray
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, text: Any, ends: Any, extensions: Any, places: Any, sizes: Any, digest: str = "", notes: Iterable[str] = ()
    ) -> "Members":
        names = tuple(str(name) for name in extensions)
        if not digest:
            whole = hashlib.blake2b(repr(names).encode(), digest_size=8)
            for part in (text, ends, places, sizes):
                whole.update(np.ascontiguousarray(part).data)
            digest = whole.hexdigest()
        return cls(Keys(text, ends), names, digest, places, sizes, tuple(map(str, notes)))

    @classmethod
    def collect(cls, shard: str, members: Iterable[tuple[str, int, int]], left_out: LeftOut | None = None) -> "Members":
        """Of (name, place, size) of the members in the order of their samples. No Python object stays for any of them.

        Args:
            left_out: what `members` itself leaves out.

        Raises:
            UserError: if a sample's members are not adjacent.
        """
        left_out, names = left_out or LeftOut(), _KeyText()
        rows, columns, places, sizes = array("q"), array("q"), array("q"), array("q")
        extensions: dict[str, int] = {}  # as they are written
        row, last = -1, None
        for name, place, size in members:
            key, extension = _parts_of(name)
            if not extension:
                if name and not name.endswith("/"):  # a folder, in the oldest tars
                    left_out.add(NO_EXTENSION, name)
                continue
            if key != last:
                row, last = names.row(key), key
            rows.append(row)
            columns.append(extensions.setdefault(extension, len(extensions)))
            places.append(place)
            sizes.append(size)
        row_of, column_of = np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64)
        written = list(extensions)
        ends_of_names = _ends_of_names(written, row_of, column_of, len(names.ends))
        if ends_of_names.any():
            left_out.add(
                "samples have dots in their names", names.keys()[int(ends_of_names.argmax())], int(ends_of_names.sum())
            )
            names, written, row_of, column_of = _split_at_last_dots(names.keys(), written, row_of, column_of, ends_of_names)
        if (repeated := names.repeated()) is not None:
            raise UserError(
                f"shard {shard}: the members of sample {repeated!r} are not adjacent; write the shard again, sorted"
            )
        if len(written) > MAX_EXTENSIONS:
            raise UserError(
                f"shard {shard}: {len(written)} different extensions, as .{written[-1]}; what follows the"
                " first dot of a member's name is its extension: write the names without dots before it"
            )
        lower = [extension.lower() for extension in written]
        found = sorted(set(lower))
        column_of = np.array([found.index(extension) for extension in lower], dtype=np.int64)[column_of]
        cells = row_of * max(1, len(found)) + column_of
        cells.sort()
        if len(twice := cells[:-1][cells[1:] == cells[:-1]]):
            key = names.keys()[int(twice[0]) // len(found)]
            raise UserError(f"shard {shard}: sample {key!r} has two members of one name; write the shard again")
        table = np.full((2, len(names.ends), len(found)), -1, dtype=np.int64)
        table[:, row_of, column_of] = np.array(places), np.array(sizes)
        keys = names.keys()
        return cls.of(keys.text, keys.ends, found, table[0], table[1], notes=left_out.notes())


def sample_of(name: str) -> tuple[str, str]:
    """(key, extension) of a member's name as webdataset has it: the extension begins at the first dot, and is empty if the
    member belongs to no sample. What can be none, as "0 final.jpg" of "photo v1.0 final.jpg", begins at the last dot."""
    key, extension = _parts_of(name)
    return key, extension.lower()


def _parts_of(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return name, ""
    if "." in extension and not COMPOUND.fullmatch(extension):
        stem, _, extension = base.rpartition(".")
    return f"{folder}{slash}{stem}", extension


def _ends_of_names(written: list[str], rows: np.ndarray, columns: np.ndarray, samples: int) -> np.ndarray:
    """Bool [samples]: those all of whose extensions are ends of names with dots, as "smith.jpg" of "j.smith.jpg".

    An extension with dots is one of webdataset's, as "seg.png", if many samples have it, or one that has others without dots.
    What is left is the end of a name if other samples have its own end as their extension, or if there are several of them."""
    compound = np.array(["." in extension for extension in written], dtype=bool)
    if not compound.any() or samples < 2:
        return np.zeros(samples, dtype=bool)
    counts = np.bincount(columns, minlength=len(written))
    beside = np.zeros(samples, dtype=bool)
    beside[rows[~compound[columns]]] = True
    own = ~compound | ((counts > 1) & (counts * COMMON > samples))
    own[columns[beside[rows]]] = True
    last = [extension.rpartition(".")[2].lower() for extension in written]
    alike = Counter(name for name, is_own in zip(last, own, strict=True) if not is_own)
    others = {name for name, dots in zip(last, compound, strict=True) if not dots}
    others |= {name for name, count in alike.items() if count >= SEVERAL and name in KNOWN}
    own |= np.array([name not in others for name in last], dtype=bool)
    ends = np.ones(samples, dtype=bool)
    ends[rows[own[columns]]] = False
    return ends


def _split_at_last_dots(
    keys: Keys, written: list[str], rows: np.ndarray, columns: np.ndarray, of: np.ndarray
) -> tuple[_KeyText, list[str], np.ndarray, np.ndarray]:
    """(keys, extensions, row and column of each member) once those samples' extensions begin at the last dot."""
    names = _KeyText()
    extensions: dict[str, int] = {}
    new_rows, new_columns = np.empty_like(rows), np.empty_like(columns)
    starts = np.searchsorted(rows, np.arange(len(keys) + 1))
    for row in range(len(keys)):
        here = range(starts[row], starts[row + 1])
        parts = [written[columns[member]].rpartition(".") if of[row] else ("", "", written[columns[member]]) for member in here]
        by_key = sorted(zip(parts, here, strict=True), key=lambda of: of[0][0])  # one after the other
        for (end, dot, extension), member in by_key:
            new_rows[member] = names.row(f"{keys[row]}{dot}{end}")
            new_columns[member] = extensions.setdefault(extension, len(extensions))
    return names, list(extensions), new_rows, new_columns
