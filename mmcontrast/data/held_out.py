"""Holds out a part of any shards from training, by the samples' contents, so that it stays the same whatever the order of the
files, the number of ranks, or the shards that are added later.

A sample's side is decided by a hash of its group id, or of its key if it has none; rows of a table go by the picture (or else
the sound) that they show too, the same path or the same bytes, so that two captions of a picture are never on both sides.
The held-out part of a smaller share is a part of that of a larger one.

It costs reading every `json` of tars and folders once; the hashes of a tar are kept beside its index.
"""

import math
import posixpath
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from mmcontrast.data.files import is_remote
from mmcontrast.data.ids import id_of, read_json, stable_hash
from mmcontrast.data.parts import RowsOf, ShardPart, chosen_digest, row_numbers
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import RowKeys, TableIndex
from mmcontrast.data.tar import TarIndex, index_file, keep_arrays
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError

LEAST = 2  # samples on each side
CONNECTIONS = 16  # remote shards that are read at a time
PROBE = 64  # bytes of the middle and of the end by which pictures in a table are compared, with their length
VERSION = 1  # of what the cache holds
Types = pa.types
KEPT = 2**24  # samples: hashes of more are not held in memory, but read again
_recent: dict[Any, np.ndarray] = {}  # the last hashes


@dataclass(frozen=True)
class Part:
    """One side of a division: the samples that are held out, or those that are trained on.

    Attributes:
        share: of the samples that are held out, about.
    """

    share: float
    held_out: bool

    def __str__(self) -> str:
        return f"{self.share:g} held out" if self.held_out else f"without {self.share:g} held out"


def divide(shards: Sequence[ShardIndex], part: Part, columns: Sequence[str]) -> list[ShardIndex]:
    """Return the shards with the samples of one side alone.

    Args:
        columns: of tables, those that may hold the picture that a row shows; the first that a table has counts.

    Raises:
        UserError: if one of the sides has fewer than two samples.
    """
    hashes = hashes_of(shards, columns)
    held_out = hashes < math.floor(part.share * 2**63)
    check_sides(shards, hashes, held_out, part.share)
    chosen = held_out if part.held_out else ~held_out
    ends = np.cumsum([len(shard) for shard in shards])[:-1]
    return [_part_of(shard, rows.nonzero()[0], part) for shard, rows in zip(shards, np.split(chosen, ends), strict=True)]


def _part_of(shard: ShardIndex, rows: np.ndarray, part: Part) -> ShardPart:
    digest, rows = f"{shard.digest} {part} {chosen_digest(rows)}", row_numbers(rows)
    return ShardPart(shard.name, RowsOf(shard.keys, rows), shard.extensions, digest, shard, rows, notes=shard.notes)


def check_sides(shards: Sequence[ShardIndex], hashes: np.ndarray, held_out: np.ndarray, share: float) -> None:
    """Check that both sides have two samples at least.

    Raises:
        UserError: if one has not; it names the nearest share by which both have.
    """
    total, number = len(hashes), int(held_out.sum())
    if LEAST <= number <= total - LEAST:
        return
    names = shards[0].name + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")
    units = len(np.unique(hashes))
    remedy = "name evaluation.splits of other data, or give the samples more group ids"
    if total >= 2 * LEAST and units > 1:
        ordered = np.sort(hashes)
        last = ordered[LEAST - 1] if number < LEAST else ordered[-LEAST]
        nearest = (math.floor(last / 2**63 * 1000) + (1 if number < LEAST else 0)) / 1000
        held = int((hashes < math.floor(nearest * 2**63)).sum())
        if 0 < nearest < 1 and LEAST <= held <= total - LEAST:
            remedy = f"a share of {nearest:g} holds out {held}; or {remedy}"
    raise UserError(
        f"held_out={share:g} of {names}: {number} of {total} samples, of {units} groups, are held out, and each side takes"
        f" {LEAST} at least: {remedy}"
    )


def hashes_of(shards: Sequence[ShardIndex], columns: Sequence[str]) -> np.ndarray:
    """Return [N] int64 in [0, 2⁶³): equal for samples that must be on one side. Both sides of a division ask for the same."""
    request = tuple((shard.name, shard.digest) for shard in shards), tuple(columns)
    if request in _recent:
        return _recent[request]
    _recent.clear()
    hashes = _hashes_of(shards, columns)
    if len(hashes) <= KEPT:
        _recent[request] = hashes
    return hashes


def _hashes_of(shards: Sequence[ShardIndex], columns: Sequence[str]) -> np.ndarray:
    remote = any(is_remote(shard.name) for shard in shards)
    console = Console(stderr=True)
    with ThreadPoolExecutor(CONNECTIONS if remote else 1) as threads:
        results = threads.map(partial(_links, columns=columns), shards)
        links = list(track(results, "looking for what to hold out", len(shards), console=console, transient=True))
    first, second = (np.concatenate(arrays) for arrays in zip(*links, strict=True))
    return first if first is second or np.array_equal(first, second) else joined(first, second)


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return one number a sample, equal for those that are linked by equal numbers in either array, over any chain of them: the
    least of all numbers in `first` that are linked."""
    _, by_first = np.unique(first, return_inverse=True)
    _, by_second = np.unique(second, return_inverse=True)
    least = first.copy()
    while True:
        before = least
        for groups in (by_second, by_first):
            group_least = np.full(int(groups.max()) + 1, np.iinfo(np.int64).max)
            np.minimum.at(group_least, groups, least)
            least = group_least[groups]
        if np.array_equal(before, least):
            return least


def _links(shard: ShardIndex, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return two numbers a sample: samples that share the first or the second belong together."""
    table, rows = (shard.shard, shard.rows) if isinstance(shard, ShardPart) else (shard, None)
    if isinstance(table, TableIndex):
        return _links_of_table(table, columns, np.arange(len(table)) if rows is None else rows)
    hashes = _load(shard) if isinstance(shard, TarIndex) else None
    if hashes is None:
        groups = _groups_in_json(shard)
        hashes = np.array([_hash(groups.get(row), f"key {shard.keys[row]}") for row in range(len(shard))], dtype=np.int64)
        if isinstance(shard, TarIndex) and shard.rows is None:
            _save(shard, hashes)
    return hashes, hashes


def _hash(group: int | None, default: str) -> int:
    """Return the hash of a group id, or of `default` where there is none."""
    return stable_hash(f"held out: {default if group is None else f'group {group}'}")


def _groups_in_json(shard: ShardIndex, rows: np.ndarray | None = None) -> dict[int, int]:
    """Return the group ids in the json of samples, by row; without those whose json is damaged.

    Args:
        rows: whose json is read; default: all.
    """
    groups = {}
    if rows is None and "json" in shard.extensions:
        rows = np.flatnonzero(shard.has("json"))
    for row in rows.tolist() if rows is not None else ():
        try:
            value = read_json(shard.read(row, ["json"])["json"]).get("group_id")
            if value is not None and value != "":
                groups[row] = id_of("group_id", value, 0)
        except (DecodeError, ValueError, RecursionError):
            continue  # such a sample is not trained on, and is found by its key
    return groups


def _links_of_table(shard: TableIndex, columns: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    groups: dict[int, int] = {}
    if "json" in shard.table.column_names:
        groups = _groups_in_json(shard, rows)
    elif "group_id" in shard.table.column_names:
        for row, scalar in zip(rows.tolist(), _values(shard.table["group_id"], rows), strict=True):
            value = shard.entry("group_id", scalar)
            try:
                if value is not None and value != "":
                    groups[row] = id_of("group_id", value, 0)
            except DecodeError:
                continue
    has_keys = not isinstance(shard.keys, RowKeys)
    of_columns = (_pictures(shard, column, rows) for column in columns)
    pictures = next(filter(None, of_columns), [None] * len(rows))
    first = np.empty(len(rows), dtype=np.int64)
    second = np.empty(len(rows), dtype=np.int64)
    for number, (row, picture) in enumerate(zip(rows.tolist(), pictures, strict=True)):
        by_key = f"key {shard.keys[row]}"
        first[number] = _hash(groups.get(row), by_key if has_keys or picture is None else picture)
        second[number] = first[number] if row in groups or picture is None else stable_hash(f"held out: {picture}")
    return first, second


def _values(column: pa.ChunkedArray, rows: np.ndarray) -> Iterable[pa.Scalar]:
    """Return the values of some rows, one after the other."""
    if len(rows) == len(column):
        return (value for chunk in column.chunks for value in chunk)
    return (column[row] for row in rows.tolist())


def _pictures(shard: TableIndex, column: str, rows: np.ndarray) -> list[str | None]:
    """Return for some rows a text that identifies the picture, None where there is none; nothing if the column holds no
    pictures. Pictures in the table are identified by their length and some of their bytes: two that are taken for one are on
    one side, which does no harm."""
    if column not in shard.table.column_names:
        return []
    values = shard._column(column)
    read = _reader_of(values.type)
    return [read(value) if value.is_valid else None for value in _values(values, rows)] if read else []


def _reader_of(kind: pa.DataType) -> Callable[[Any], str | None] | None:
    """Return the function that identifies the picture of a value of a type, None if such a value holds none."""
    if Types.is_string(kind) or Types.is_large_string(kind):
        return lambda value: f"file {posixpath.normpath(value.as_py())}"
    if Types.is_binary(kind) or Types.is_large_binary(kind):
        return _probe
    if Types.is_struct(kind) and {"bytes", "path"} & {inner.name for inner in kind}:
        names = [name for name in ("bytes", "path") if kind.get_field_index(name) >= 0]

        def read(value: Any) -> str | None:
            inner = [value[name] for name in names if value[name].is_valid]
            reader = _reader_of(inner[0].type) if inner else None
            return reader(inner[0]) if reader else None

        return read
    return None


def _probe(value: Any) -> str:
    data = value.as_buffer()
    middle = data.size // 2
    return f"bytes {data.size} {data[middle : middle + PROBE].to_pybytes().hex()} {data[-PROBE:].to_pybytes().hex()}"


def _cache_file(shard: TarIndex) -> tuple[Path, str]:
    return index_file(shard.name).with_suffix(".held-out.npz"), f"{VERSION} {shard.file.fingerprint}"


def _load(shard: TarIndex) -> np.ndarray | None:
    file, fingerprint = _cache_file(shard)
    try:
        with np.load(file, allow_pickle=False) as entry:
            hashes = entry["hashes"] if str(entry["fingerprint"]) == fingerprint else None
    except (OSError, KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None  # not there, or not ours
    if hashes is None or shard.rows is None:
        return hashes if hashes is not None and len(hashes) == len(shard) else None
    return hashes[shard.rows] if not len(shard) or shard.rows.max() < len(hashes) else None


def _save(shard: TarIndex, hashes: np.ndarray) -> None:
    file, fingerprint = _cache_file(shard)
    keep_arrays(file, hashes=hashes, fingerprint=fingerprint)
