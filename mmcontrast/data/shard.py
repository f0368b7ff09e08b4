"""Defines the index of a shard of any kind: its samples by position, each with some members, read one sample at a time."""

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
COMMON, SEVERAL = 20, 3  # a twentieth of the samples has an extension with dots; three or more alike are ends of names


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
        """Return what tells a sample from all others of its shard."""
        return self.keys[sample]

    def describe(self, sample: int, extension: str = "") -> str:
        """Return words by which a person finds a sample, or a member of it."""
        return f"sample {self.keys[sample]!r}{extension and f', member .{extension}'}"

    def has(self, extension: str) -> np.ndarray:
        """Return bool [n]: which samples have a member."""
        return self.sizes_of(extension) >= 0

    @abstractmethod
    def sizes_of(self, extension: str) -> np.ndarray:
        """Return int64 [n], the bytes of a member of each sample, −1 where it has none."""

    @abstractmethod
    def size(self, sample: int, extension: str) -> int:
        """Return the bytes of a member, or −1."""

    @abstractmethod
    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes of those of the wanted members that the sample has.

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
        """Return (place, size, extension) of those members that the sample has, by place."""
        columns = [self.extensions.index(extension) for extension in set(extensions) if extension in self.extensions]
        places, sizes = self.places[sample].tolist(), self.sizes[sample].tolist()
        return sorted((places[c], sizes[c], self.extensions[c]) for c in columns if sizes[c] >= 0)


def member_of(value: Any) -> bytes | None:
    """Return a value of a table or of JSON as a member: a text as it is, a list of texts as lines, a list of numbers as .npy;
    None if there is nothing in it.

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
        previous, first = self.reasons.get(reason, (0, name))
        self.reasons[reason] = previous + count, first

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{count} {reason}, as {first!r}" for reason, (count, first) in self.reasons.items())


class _KeyCollector:
    """Collects keys into one block of bytes."""

    def __init__(self) -> None:
        self.text, self.ends, self.hashes = bytearray(), array("q"), array("q")
        self.last: str | None = None

    def row(self, key: str) -> int:
        """Return the row of a key, which is added unless it is the last one."""
        if key != self.last:
            self.text += key.encode("utf-8", "surrogateescape")
            self.ends.append(len(self.text))
            self.hashes.append(hash(key))
            self.last = key
        return len(self.ends) - 1

    def keys(self) -> Keys:
        return Keys(np.array(self.text, dtype=np.uint8), np.array(self.ends, dtype=np.int64))

    def repeated(self) -> str | None:
        """Return a key that is there twice, if there is one."""
        keys, hashes = self.keys(), np.array(self.hashes, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        equal = np.flatnonzero(np.diff(hashes[order]) == 0)
        pairs = ((keys[first], keys[second]) for first, second in zip(order[equal], order[equal + 1], strict=True))
        return next((first for first, second in pairs if first == second), None)


@dataclass(frozen=True)
class Members:
    """The members of a shard as a scan collects them, of which its index is made."""

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
        """Return the members that a cache holds as arrays; without a digest it is computed."""
        names = tuple(str(name) for name in extensions)
        if not digest:
            hasher = hashlib.blake2b(repr(names).encode(), digest_size=8)
            for block in (text, ends, places, sizes):
                hasher.update(np.ascontiguousarray(block).data)
            digest = hasher.hexdigest()
        return cls(Keys(text, ends), names, digest, places, sizes, tuple(map(str, notes)))

    @classmethod
    def collect(cls, shard: str, members: Iterable[tuple[str, int, int]], left_out: LeftOut | None = None) -> "Members":
        """Collect (name, place, size) of the members in the order of their samples. No Python object stays for any of them.

        Args:
            left_out: counts what `members` itself leaves out.

        Raises:
            UserError: if a sample's members are not adjacent.
        """
        left_out, collector = left_out or LeftOut(), _KeyCollector()
        rows, columns, places, sizes = array("q"), array("q"), array("q"), array("q")
        extensions: dict[str, int] = {}  # as they are written
        row, last = -1, None
        for name, place, size in members:
            key, extension = _split_name(name)
            if not extension:
                if name and not name.endswith("/"):  # a folder, in the oldest tars
                    left_out.add(NO_EXTENSION, name)
                continue
            if key != last:
                row, last = collector.row(key), key
            rows.append(row)
            columns.append(extensions.setdefault(extension, len(extensions)))
            places.append(place)
            sizes.append(size)
        row_of, column_of = np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64)
        written = list(extensions)
        dotted = _samples_with_dotted_names(written, row_of, column_of, len(collector.ends))
        if dotted.any():
            left_out.add("samples have dots in their names", collector.keys()[int(dotted.argmax())], int(dotted.sum()))
            collector, written, row_of, column_of = _split_at_last_dots(collector.keys(), written, row_of, column_of, dotted)
        if (repeated := collector.repeated()) is not None:
            raise UserError(
                f"shard {shard}: the members of sample {repeated!r} are not adjacent; write the shard again, sorted"
            )
        if len(written) > MAX_EXTENSIONS:
            raise UserError(
                f"shard {shard}: {len(written)} different extensions, as .{written[-1]}; what follows the"
                " first dot of a member's name is its extension: write the names without dots before it"
            )
        lower_case = [extension.lower() for extension in written]
        unique_extensions = sorted(set(lower_case))
        column_of = np.array([unique_extensions.index(extension) for extension in lower_case], dtype=np.int64)[column_of]
        cells = row_of * max(1, len(unique_extensions)) + column_of
        cells.sort()
        if len(repeated_cells := cells[:-1][cells[1:] == cells[:-1]]):
            key = collector.keys()[int(repeated_cells[0]) // len(unique_extensions)]
            raise UserError(f"shard {shard}: sample {key!r} has two members of one name; write the shard again")
        table = np.full((2, len(collector.ends), len(unique_extensions)), -1, dtype=np.int64)
        table[:, row_of, column_of] = np.array(places), np.array(sizes)
        keys = collector.keys()
        return cls.of(keys.text, keys.ends, unique_extensions, table[0], table[1], notes=left_out.notes())


def sample_of(name: str) -> tuple[str, str]:
    """Return (key, extension) of a member's name as webdataset has it: the extension begins at the first dot, and is empty if
    the member belongs to no sample. One that cannot be an extension, as "0 final.jpg" of "photo v1.0 final.jpg", begins at the
    last dot."""
    key, extension = _split_name(name)
    return key, extension.lower()


def _split_name(name: str) -> tuple[str, str]:
    """Return (key, extension) of a member's name as it is written."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return name, ""
    if "." in extension and not COMPOUND.fullmatch(extension):
        stem, _, extension = base.rpartition(".")
    return f"{folder}{slash}{stem}", extension


def _samples_with_dotted_names(written: list[str], rows: np.ndarray, columns: np.ndarray, samples: int) -> np.ndarray:
    """Return bool [samples]: those all of whose extensions are ends of names with dots, as "smith.jpg" of "j.smith.jpg".

    An extension with dots is one of webdataset's, as "seg.png", if many samples have it, or one that has others without dots.
    Any other is the end of a name if its own end is the extension of other samples, or of several such names."""
    compound = np.array(["." in extension for extension in written], dtype=bool)
    if not compound.any() or samples < 2:
        return np.zeros(samples, dtype=bool)
    counts = np.bincount(columns, minlength=len(written))
    has_plain = np.zeros(samples, dtype=bool)
    has_plain[rows[~compound[columns]]] = True
    is_extension = ~compound | ((counts > 1) & (counts * COMMON > samples))
    is_extension[columns[has_plain[rows]]] = True
    last_parts = [extension.rpartition(".")[2].lower() for extension in written]
    end_counts = Counter(name for name, whole_extension in zip(last_parts, is_extension, strict=True) if not whole_extension)
    known_ends = {name for name, dots in zip(last_parts, compound, strict=True) if not dots}
    known_ends |= {name for name, count in end_counts.items() if count >= SEVERAL and name in KNOWN}
    is_extension |= np.array([name not in known_ends for name in last_parts], dtype=bool)
    are_ends = np.ones(samples, dtype=bool)
    are_ends[rows[is_extension[columns]]] = False
    return are_ends


def _split_at_last_dots(
    keys: Keys, written: list[str], rows: np.ndarray, columns: np.ndarray, dotted: np.ndarray
) -> tuple[_KeyCollector, list[str], np.ndarray, np.ndarray]:
    """Return (keys, extensions, row and column of each member) once the extensions of some samples begin at the last dot.

    Args:
        dotted: bool [samples]: those samples.
    """
    collector = _KeyCollector()
    extensions: dict[str, int] = {}
    new_rows, new_columns = np.empty_like(rows), np.empty_like(columns)
    starts = np.searchsorted(rows, np.arange(len(keys) + 1))
    for row in range(len(keys)):
        parts = []  # (end of the key, dot, extension, member)
        for member in range(starts[row], starts[row + 1]):
            name = written[columns[member]]
            parts.append((*(name.rpartition(".") if dotted[row] else ("", "", name)), member))
        for end, dot, extension, member in sorted(parts, key=lambda part: part[0]):  # the members of a key are adjacent
            new_rows[member] = collector.row(f"{keys[row]}{dot}{end}")
            new_columns[member] = extensions.setdefault(extension, len(extensions))
    return collector, list(extensions), new_rows, new_columns
