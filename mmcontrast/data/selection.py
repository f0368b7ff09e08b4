"""Selections: which samples of shards go on, kept in tables beside the shards instead of in copies of them.

A stage (`mmcontrast data filter` and others) writes a folder, `mmcontrast.curation.stage`:

    manifest.json                last, when all is there: stage, options, and name, digest, samples, kept, part of each shard
    parts/NNNNN-DIGEST.parquet   of a shard, a row a sample in its order: key, row, keep, reason, and what the stage measured

Shards are found by their digest, so their folder may have moved. A selection may also be one's own file: Parquet or CSV with a
column `sample_id`, `key` or `json:NAME` (an entry of the samples' json), and perhaps `keep`; or DataComp's .npy of uids.
"""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmcontrast.data.files import identities
from mmcontrast.data.ids import default_id, id_of, read_json
from mmcontrast.data.parts import ShardPart, key_array, narrowed
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import SUFFIXES, TableIndex, open_table
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError

MANIFEST, PARTS = "manifest.json", "parts"
FORMAT = "mmcontrast selection 1"
ENTRY = "json:"  # before the name of an entry of a sample's json
UID = "uid"  # of DataComp's samples
OWN = ("key", "row", "keep", "reason")  # columns of every part: others are what was measured
logger = logging.getLogger("mmcontrast")


class Selection(ABC):
    """Which samples of shards are kept."""

    name: str

    def of_shard(self, shard: ShardIndex) -> ShardIndex:
        """Return a shard with the samples that are kept alone, where that is known of each shard by itself; else as it is."""
        return shard

    def of_all(self, shards: Sequence[ShardIndex]) -> list[ShardIndex]:
        """Return shards, each of which `of_shard` returned, with the samples that are kept alone.

        Raises:
            UserError: if none is.
        """
        kept = self._of_all(shards)
        if not sum(map(len, kept)):
            raise UserError(f"select {self.name}: no sample of {_named(shards)} is kept")
        return kept

    @abstractmethod
    def _of_all(self, shards: Sequence[ShardIndex]) -> list[ShardIndex]: ...


def open_selection(path: str | Path) -> Selection:
    """
    Raises:
        UserError: if it is not there, not complete, or no selection.
    """
    path = Path(path)
    if path.is_dir():
        return StageSelection.read(path)
    if not path.is_file():
        raise UserError(f"select: no file or folder {path}")
    if path.suffix.lower() == ".npy":
        return NamedSamples(str(path), f"{ENTRY}{UID}", pa.array(_uids(path), pa.large_binary()))
    if path.suffix.lower() in SUFFIXES:
        return NamedSamples.read(path)
    raise UserError(f"select {path}: neither a stage's folder, nor a file .parquet, .csv or .npy")


def selected(shards: Iterable[ShardIndex], selection: Selection) -> list[ShardIndex]:
    """Return the shards with the samples that a selection keeps alone. A shard of which none is kept stays, without samples, so
    that the ids of the others' samples are what they would be without a selection.

    Raises:
        UserError: for a shard that the selection does not know; if no sample is kept.
    """
    return selection.of_all([selection.of_shard(shard) for shard in shards])


@dataclass
class StageSelection(Selection):
    """What a stage wrote.

    Attributes:
        stage: its command.
        entries: what the manifest says of each shard, by digest.
    """

    folder: Path
    stage: str
    entries: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, folder: Path) -> "StageSelection":
        """
        Raises:
            UserError: if it is not complete.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            hint = "it is not complete: run its stage again, which goes on" if (folder / PARTS).is_dir() else "no selection"
            raise UserError(f"select {folder}: no {MANIFEST}: {hint}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"select {folder / MANIFEST} cannot be read ({error})") from error
        entries: dict[str, list[dict[str, Any]]] = {}
        try:
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT!r}")
            for entry in manifest["shards"]:
                if Path(entry["part"]).name != entry["part"]:
                    raise ValueError(f"a part {entry['part']!r}, which is no file's name")
                entries.setdefault(str(entry["digest"]), []).append({**entry, "samples": int(entry["samples"])})
            return cls(folder, str(manifest["stage"]), entries)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"select {folder / MANIFEST} is no selection's ({error})") from error

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.folder)

    def of_shard(self, shard: ShardIndex) -> ShardIndex:
        """
        Raises:
            UserError: for a shard of which the stage knows nothing.
        """
        return narrowed(shard, self._rows(shard))

    def _of_all(self, shards: Sequence[ShardIndex]) -> list[ShardIndex]:
        return list(shards)

    def part(self, shard: ShardIndex) -> Path:
        """Return the file of a shard.

        Raises:
            UserError: if there is none, or several that differ.
        """
        entries = self.entries.get(shard.digest, [])
        if not entries:
            raise UserError(
                f"select {self.folder}: shard {shard.name} is not in it, or has changed since: run `mmcontrast data"
                f" {self.stage}` over all shards, into another folder if some have changed"
            )
        if len(entries) > 1:  # equal keys and sizes: told apart by their paths
            alike = [_common_end(str(entry["name"]), shard.name) for entry in entries]
            entries = [entry for entry, length in zip(entries, alike, strict=True) if length == max(alike)]
            kept = {self._keep(self.folder / PARTS / entry["part"], len(shard)).tobytes() for entry in entries[1:]}
            if kept - {self._keep(self.folder / PARTS / entries[0]["part"], len(shard)).tobytes()}:
                names = " and ".join(str(entry["name"]) for entry in entries[:2])
                raise UserError(f"select {self.folder}: {shard.name} may be {names}: give it back its name, or its folder's")
        return self.folder / PARTS / entries[0]["part"]

    def _rows(self, shard: ShardIndex) -> np.ndarray:
        return np.flatnonzero(self._keep(self.part(shard), len(shard))).astype(np.int64)

    def _keep(self, path: Path, samples: int) -> np.ndarray:
        """Return bool [samples]. One column is read: a bit for each sample that was dropped."""
        column = self.read_part(path, ["keep"], samples)["keep"]
        if not pa.types.is_boolean(column.type) or column.null_count:
            raise UserError(f"select {path}: its column keep is {column.type} with {column.null_count} nulls, not truth values")
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)

    def read_part(self, path: Path, columns: list[str] | None, samples: int) -> pa.Table:
        """Return a shard's part, or some of its columns.

        Raises:
            UserError: if it cannot be read, or is of another number of samples.
        """
        try:
            table = pq.read_table(path, columns=columns)
        except (OSError, pa.ArrowException) as error:
            again = f"run `mmcontrast data {self.stage}` again into the same folder once it is removed"
            raise UserError(f"select {path} cannot be read ({' '.join(str(error).split())[:200]}): {again}") from error
        if len(table) != samples or (columns and set(columns) - set(table.column_names)):
            raise UserError(f"select {path}: {len(table)} rows for a shard of {samples} samples, {table.column_names}")
        return table


@dataclass
class NamedSamples(Selection):
    """A list of samples by their keys, their `sample_id`, or an entry of their json.

    Attributes:
        by: "key", "sample_id", or "json:NAME".
        names: of the samples that are kept: int64 of ids, large binary of anything else.
        dropped, reasons: names of samples that are not, where the list says why, and what it says.
    """

    name: str
    by: str
    names: pa.Array
    dropped: pa.Array | None = None
    reasons: pa.Array | None = None

    @classmethod
    def read(cls, path: Path) -> "NamedSamples":
        """
        Raises:
            UserError: if it has no such column, or keeps and drops one sample.
        """
        table = open_table(str(path))
        by = next((name for name in ("sample_id", "key", UID) if name in table.table.column_names), None)
        by = by or next((name for name in table.table.column_names if name.startswith(ENTRY)), None)
        if by is None:
            have = ", ".join(table.table.column_names)
            raise UserError(f"select {path}: it needs a column sample_id, key or json:NAME; it has {have}")
        names, problem = _checked_names(table.table[by], by)
        if problem:
            raise UserError(f"select {path}, {problem}")
        said: tuple[pa.Array, pa.Array] | tuple[()] = ()
        if "keep" in table.table.column_names:
            keep = _truths(table.table["keep"], path)
            if "reason" in table.table.column_names:
                reasons = table.table["reason"].cast(pa.string()).combine_chunks()
                why = pc.and_(pc.invert(keep), reasons.is_valid())
                said = names.filter(why), reasons.filter(why)
            names, dropped = names.filter(keep), names.filter(pc.invert(keep))
            both = pc.is_in(dropped, value_set=names)
            if pc.any(both).as_py():
                twice = dropped.filter(both)[0].as_py()
                shown = twice.decode("utf-8", "replace") if isinstance(twice, bytes) else twice
                raise UserError(f"select {path}: the {by} {shown!r} is there twice, once kept and once not")
        return cls(str(path), f"{ENTRY}{UID}" if by == UID else by, pc.unique(names), *said)

    def names_of(self, shards: Sequence[ShardIndex]) -> list[pa.Array]:
        """Return what the list would call the samples of each shard."""
        if self.by == "sample_id":
            return [pa.array(ids_of_shard(shard, name)) for shard, name in zip(shards, identities_of(shards), strict=True)]
        if self.by == "key":
            return [key_array(shard.keys) for shard in shards]
        return [_entries(shard, self.by.removeprefix(ENTRY)) for shard in shards]

    def reasons_of(self, names: pa.Array) -> list[str | None]:
        """Return why samples are dropped, where the list says so."""
        if self.dropped is None or self.reasons is None:
            return [None] * len(names)
        return self.reasons.take(pc.index_in(names, value_set=self.dropped, skip_nulls=True)).to_pylist()

    def _of_all(self, shards: Sequence[ShardIndex]) -> list[ShardIndex]:
        return self.narrowed(shards, self.names_of(shards))

    def narrowed(self, shards: Sequence[ShardIndex], asked: Sequence[pa.Array]) -> list[ShardIndex]:
        """
        Args:
            asked: what `names_of` returned.

        Raises:
            UserError: for a name that may mean samples of several shards.
        """
        kind = pa.int64() if self.by == "sample_id" else pa.large_binary()
        column = pa.chunked_array(asked, kind)
        known = pc.is_in(column, value_set=self.names, skip_nulls=True)
        masks = [np.asarray(mask.to_numpy(zero_copy_only=False), dtype=bool) for mask in _by_shard(known, shards)]
        rows = [np.flatnonzero(mask).astype(np.int64) for mask in masks]
        self._refuse_ambiguous(shards, asked, rows)
        if int(os.environ.get("RANK", "0")) == 0:
            met = len(pc.unique(column.filter(known)))
            kept, total = sum(map(len, rows)), sum(map(len, shards))
            unmet = f"; {len(self.names) - met} of its {len(self.names)} are no sample's" if met < len(self.names) else ""
            (logger.warning if unmet else logger.info)("select %s: %d of %d samples are kept%s", self.name, kept, total, unmet)
        return [narrowed(shard, of) for shard, of in zip(shards, rows, strict=True)]

    def _refuse_ambiguous(self, shards: Sequence[ShardIndex], names: Sequence[pa.Array], rows: Sequence[np.ndarray]) -> None:
        """
        Raises:
            UserError: if samples of two shards have one key: writers that number them from 0 in every shard mean nothing by it.
        """
        if self.by == "sample_id":
            return
        kept = [pc.unique(of.take(pa.array(chosen))) for of, chosen in zip(names, rows, strict=True)]
        whole = pa.chunked_array(kept, pa.large_binary())
        if pc.count_distinct(whole).as_py() == len(whole):
            return
        counts = pc.value_counts(whole)
        twice = next(entry["values"] for entry in counts.to_pylist() if entry["counts"] > 1)
        where = [shard.name for shard, of in zip(shards, kept, strict=True) if pc.index(of, twice).as_py() >= 0]
        raise UserError(
            f"select {self.name}: several samples have the {self.by} {twice.decode('utf-8', 'replace')!r}, in {where[0]} and"
            f" {where[1]}: name them by sample_id"
        )


def identities_of(shards: Sequence[ShardIndex]) -> list[str]:
    return identities([shard.name for shard in shards])


def ids_of_shard(shard: ShardIndex, identity: str) -> np.ndarray:
    """Return int64 [n], the `sample_id` of every sample of a shard; of those that say none, the one that they go by. Reads the
    json of each.

    Args:
        identity: of the shard among all shards, of `identities`.

    Raises:
        UserError: for one that is none.
    """
    row, ids = 0, np.empty(len(shard), dtype=np.int64)
    given = _table_values(shard, "sample_id")
    has_json = shard.has("json") if given is None and "json" in shard.extensions else None
    try:
        for row in range(len(shard)):
            value = given[row] if given is not None else None
            if has_json is not None and has_json[row]:
                value = read_json(shard.read(row, ["json"])["json"]).get("sample_id")
            if value is None or value == "":
                ids[row] = default_id(identity, shard.identity(row))
            else:
                ids[row] = id_of("sample_id", value, 0)
    except (DecodeError, ValueError, RecursionError) as error:
        raise UserError(f"shard {shard.name}, {shard.describe(row)}: {error}") from error
    return ids


def _entries(shard: ShardIndex, name: str) -> pa.Array:
    """Return an entry of every sample's json as text, null where it has none."""
    from mmcontrast.data.dataset import entry_of

    found: list[bytes | None] = [None] * len(shard)
    values = _table_values(shard, name)
    for row in np.flatnonzero(shard.has("json")).tolist() if "json" in shard.extensions else ():
        try:
            value = values[row] if values is not None else entry_of(read_json(shard.read(row, ["json"])["json"]), name)
        except (DecodeError, ValueError, RecursionError):
            continue  # of no list
        found[row] = None if value is None else str(value).encode()
    return pa.array(found, pa.large_binary())


def _table_values(shard: ShardIndex, column: str) -> list[Any] | None:
    """Return a column of a table whose metadata are nothing but its columns; None of anything else."""
    table = shard.shard if isinstance(shard, ShardPart) else shard
    if not isinstance(table, TableIndex) or "json" in table.table.column_names or column not in table.table.column_names:
        return None
    values = table.table[column]
    values = values.take(pa.array(shard.rows)) if isinstance(shard, ShardPart) else values
    return values.to_pylist()


def _by_shard(values: pa.ChunkedArray, shards: Sequence[ShardIndex]) -> Iterable[pa.ChunkedArray]:
    start = 0
    for shard in shards:
        yield values.slice(start, len(shard))
        start += len(shard)


def _checked_names(column: pa.ChunkedArray, by: str) -> tuple[pa.Array, str]:
    """Return the names as they are compared, and what is wrong with them."""
    if by == "sample_id" and pa.types.is_signed_integer(column.type) and not column.null_count:
        return column.cast(pa.int64()).combine_chunks(), ""
    names: list[Any] = []
    for row, value in enumerate(column.to_pylist()):
        if value is None or value == "":
            return None, f"row {row}: no {by}"
        try:
            names.append(id_of(by, value, 0) if by == "sample_id" else str(value).encode())
        except DecodeError as error:
            return None, f"row {row}: {error}"
    return pa.array(names, pa.int64() if by == "sample_id" else pa.large_binary()), ""


def _truths(column: pa.ChunkedArray, path: Path) -> pa.Array:
    if pa.types.is_boolean(column.type) and not column.null_count:
        return column.combine_chunks()
    words = {"true": True, "false": False, "1": True, "0": False}
    found = [words.get(str(value).lower()) for value in column.to_pylist()]
    if None in found:
        row = found.index(None)
        raise UserError(f"select {path}, row {row}: keep is {column[row].as_py()!r}, neither true nor false")
    return pa.array(found, pa.bool_())


def _uids(path: Path) -> list[bytes]:
    """Return what DataComp's lists hold: 128 bits each, as two numbers of 64, in the hexadecimal digits of a sample's uid."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"select {path} cannot be read ({error})") from error
    names = array.dtype.names or ()
    if len(names) != 2 or array.ndim != 1 or any(array.dtype[name] != np.uint64 for name in names):
        raise UserError(f"select {path}: {array.dtype} {array.shape}, not a list of uids as DataComp has them (u8,u8)")
    return [b"%016x%016x" % (high, low) for high, low in array.tolist()]


def _common_end(first: str, second: str) -> int:
    """Return how many parts of two paths are equal, from their ends."""
    pairs = zip(reversed(first.split("/")), reversed(second.split("/")), strict=False)
    return next((k for k, (one, other) in enumerate(pairs) if one != other), min(first.count("/"), second.count("/")) + 1)


def _named(shards: Sequence[ShardIndex]) -> str:
    return shards[0].name + (f" and {len(shards) - 1} more" if len(shards) > 1 else "") if shards else "no shard"
