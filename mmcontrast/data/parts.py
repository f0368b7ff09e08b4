"""Defines a part of a shard, some of its samples by row: what a selection keeps, or one side of what is held out."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from mmcontrast.data.shard import Keys, MemberIndex, ShardIndex


class RowsOf(Sequence[str]):
    """The keys of some rows."""

    def __init__(self, keys: Sequence[str], rows: np.ndarray) -> None:
        self.keys, self.rows = keys, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # one at a time
        return self.keys[int(self.rows[row])]


@dataclass(frozen=True)
class ShardPart(ShardIndex):
    """Some samples of a shard, in its order.

    Attributes:
        rows: [n] whole numbers, of the shard, rising.
    """

    shard: ShardIndex
    rows: np.ndarray

    def identity(self, sample: int) -> str:
        return self.shard.identity(int(self.rows[sample]))

    def describe(self, sample: int, extension: str = "") -> str:
        return self.shard.describe(int(self.rows[sample]), extension)

    def has(self, extension: str) -> np.ndarray:
        return self.shard.has(extension)[self.rows]

    @cached_property
    def _sizes(self) -> dict[str, np.ndarray]:
        return {}

    def sizes_of(self, extension: str) -> np.ndarray:
        if extension not in self._sizes:  # an order by length asks in every window
            self._sizes[extension] = self.shard.sizes_of(extension)[self.rows]
        return self._sizes[extension]

    def size(self, sample: int, extension: str) -> int:
        return self.shard.size(int(self.rows[sample]), extension)

    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        return self.shard.read(int(self.rows[sample]), extensions)


def row_numbers(rows: np.ndarray) -> np.ndarray:
    """Return rows of a shard in four bytes each, where they fit: every process holds them."""
    return rows.astype(np.int32) if len(rows) and rows[-1] < 2**31 else rows


def chosen_digest(rows: np.ndarray) -> str:
    """Return 16 hexadecimal digits that tell one choice of rows from others."""
    return hashlib.blake2b(rows.astype("<i8").data, digest_size=8).hexdigest()


def narrowed(shard: ShardIndex, rows: np.ndarray) -> ShardIndex:
    """Return the shard with some of its samples alone, in its order; the shard itself if they are all.

    The other samples of a tar's or a folder's index are freed; a table is mapped, and holds none in memory.

    Args:
        rows: [n] int64, rising.
    """
    if len(rows) == len(shard):
        return shard
    digest, rows = f"{shard.digest} selected {chosen_digest(rows)}", row_numbers(rows)
    if not isinstance(shard, MemberIndex):
        keys = _take_keys(shard.keys, rows) if isinstance(shard.keys, Keys) else RowsOf(shard.keys, rows)
        return ShardPart(shard.name, keys, shard.extensions, digest, shard, rows, notes=shard.notes)
    assert shard.rows is None, "a shard is narrowed once"
    sizes = shard.sizes[rows]
    has_any = (sizes >= 0).any(axis=0)
    return replace(
        shard,
        keys=_take_keys(shard.keys, rows) if isinstance(shard.keys, Keys) else RowsOf(shard.keys, rows),
        extensions=tuple(name for name, is_present in zip(shard.extensions, has_any, strict=True) if is_present),
        digest=digest,
        places=np.ascontiguousarray(shard.places[rows][:, has_any]),
        sizes=np.ascontiguousarray(sizes[:, has_any]),
        rows=rows,
    )


def _take_keys(keys: Keys, rows: np.ndarray) -> Keys:
    chosen = key_array(keys).take(pa.array(rows))
    _, offsets, data = chosen.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[1 : len(rows) + 1] if len(rows) else np.empty(0, dtype=np.int64)
    text = np.frombuffer(data, dtype=np.uint8)[: ends[-1]] if len(rows) and data else np.empty(0, dtype=np.uint8)
    return Keys(text, ends)


def key_array(keys: Sequence[str]) -> pa.Array:
    """Return keys as they are in a file, as Arrow's large binary [n]; an index's own without a copy."""
    if not isinstance(keys, Keys):
        return pa.array([keys[row].encode("utf-8", "surrogateescape") for row in range(len(keys))], pa.large_binary())
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), keys.ends.astype(np.int64, copy=False)])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(keys.text))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(keys), buffers)
