"""Opens selections: which samples of shards are kept, in tables beside the shards instead of in copies of them.

A stage (`mmcontrast data filter` and others) writes a folder, `mmcontrast.curation.run_stage`:

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
from mmcontrast.data.ids import id_of
from mmcontrast.data.keys import ENTRY
from mmcontrast.data.parts import key_array, narrowed
from mmcontrast.data.row_ids import refuse_other_rows
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.shard_values import ids_of_shard, json_entries
from mmcontrast.data.tables import SUFFIXES, TableIndex, open_table
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError

MANIFEST, PARTS = "manifest.json", "parts"
FORMAT = "mmcontrast selection 1"
UID = "uid"  # of DataComp's samples
OWN = ("key", "row", "keep", "reason")  # columns of every part: others are what was measured
logger = logging.getLogger("mmcontrast")


class Selection(ABC):
    """A choice of the samples of shards that are kept."""

    name: str

    def of_shard(self, shard: ShardIndex) -> ShardIndex:
        """Return a shard with the samples that are kept alone, where that is known of each shard by itself; else as it is."""
        return shard

    def of_all(self, shards: Sequence[ShardIndex]) -> list[ShardIndex]:
        """Return shards, each of which `of_shard` returned, with the samples that are kept alone.

        Raises:
            UserError: if none is.
        """
        kept = self._narrow_all(shards)
        if not sum(map(len, kept)):
            raise UserError(f"select {self.name}: no sample of {_summarize(shards)} is kept")
        return kept

    @abstractmethod
    def _narrow_all(self, shards: Sequence[ShardIndex]) -> list[ShardIndex]: ...


def open_selection(path: str | Path) -> Selection:
    """Open a stage's folder, or a file that lists samples.

    Raises:
        UserError: if it is not there, not complete, or no selection.
    """
    path = Path(path)
    if path.is_dir():
        return StageSelection.read(path)
    if not path.is_file():
        raise UserError(f"select: no file or folder {path}")
    if path.suffix.lower() == ".npy":
        return NamedSamples(str(path), f"{ENTRY}{UID}", pa.array(_read_uids(path), pa.large_binary()))
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
    """A selection that a stage wrote.

    Attributes:
        stage: its command.
        entries: the manifest's entries of each shard, by digest.
    """

    folder: Path
    stage: str
    entries: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, folder: Path) -> "StageSelection":
        """Read a stage's folder.

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
        """Return a shard with the samples that the stage kept alone.

        Raises:
            UserError: for a shard that is not in the stage's manifest.
        """
        return narrowed(shard, self._rows(shard))

    def _narrow_all(self, shards: Sequence[ShardIndex]) -> list[ShardIndex]:
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
            lengths = [_common_end(str(entry["name"]), shard.name) for entry in entries]
            entries = [entry for entry, length in zip(entries, lengths, strict=True) if length == max(lengths)]
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
            remedy = f"run `mmcontrast data {self.stage}` again into the same folder once it is removed"
            raise UserError(f"select {path} cannot be read ({' '.join(str(error).split())[:200]}): {remedy}") from error
        if len(table) != samples or (columns and set(columns) - set(table.column_names)):
            raise UserError(f"select {path}: {len(table)} rows for a shard of {samples} samples, {table.column_names}")
        return table


@dataclass
class NamedSamples(Selection):
    """A list of samples by their keys, their `sample_id`, or an entry of their json.

    Attributes:
        by: "key", "sample_id", or "json:NAME".
        names: of the samples that are kept: int64 of ids, large binary of anything else.
        dropped, reasons: names of the samples that are dropped with a reason, and these reasons.
    """

    name: str
    by: str
    names: pa.Array
    dropped: pa.Array | None = None
    reasons: pa.Array | None = None

    @classmethod
    def read(cls, path: Path) -> "NamedSamples":
        """Read a Parquet or CSV file that lists samples.

        Raises:
            UserError: if it has no such column, or keeps and drops one sample.
        """
        index = open_table(str(path))
        table = index.table
        by = next((name for name in ("sample_id", "key", UID) if name in table.column_names), None)
        by = by or next((name for name in table.column_names if name.startswith(ENTRY)), None)
        if by is None:
            columns = ", ".join(table.column_names)
            raise UserError(f"select {path}: it needs a column sample_id, key or json:NAME; it has {columns}")
        names, problem = _parse_names(index, by)
        if problem:
            raise UserError(f"select {path}, {problem}")
        dropped_with_reasons: tuple[pa.Array, pa.Array] | tuple[()] = ()
        if "keep" in table.column_names:
            keep = _parse_keep(table["keep"], path)
            if "reason" in table.column_names:
                reasons = table["reason"].cast(pa.string()).combine_chunks()
                has_reason = pc.and_(pc.invert(keep), reasons.is_valid())
                dropped_with_reasons = names.filter(has_reason), reasons.filter(has_reason)
            names, dropped = names.filter(keep), names.filter(pc.invert(keep))
            in_both = pc.is_in(dropped, value_set=names)
            if pc.any(in_both).as_py():
                name = dropped.filter(in_both)[0].as_py()
                shown = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
                raise UserError(f"select {path}: the {by} {shown!r} is there twice, once kept and once not")
        return cls(str(path), f"{ENTRY}{UID}" if by == UID else by, pc.unique(names), *dropped_with_reasons)

    def names_of(self, shards: Sequence[ShardIndex]) -> list[pa.Array]:
        """Return the names of the samples of each shard, of the kind that the list has."""
        if self.by == "sample_id":
            refuse_other_rows(self.name, shards, "select")
            names = identities([shard.name for shard in shards])
            return [pa.array(ids_of_shard(shard, name)) for shard, name in zip(shards, names, strict=True)]
        if self.by == "key":
            return [key_array(shard.keys) for shard in shards]
        return [json_entries(shard, self.by.removeprefix(ENTRY)) for shard in shards]

    def reasons_of(self, names: pa.Array) -> list[str | None]:
        """Return why samples are dropped, where the list says so."""
        if self.dropped is None or self.reasons is None:
            return [None] * len(names)
        return self.reasons.take(pc.index_in(names, value_set=self.dropped, skip_nulls=True)).to_pylist()

    def _narrow_all(self, shards: Sequence[ShardIndex]) -> list[ShardIndex]:
        return self.narrowed(shards, self.names_of(shards))

    def narrowed(self, shards: Sequence[ShardIndex], sample_names: Sequence[pa.Array]) -> list[ShardIndex]:
        """Return the shards with the samples that the list keeps alone.

        Args:
            sample_names: what `names_of` returned.

        Raises:
            UserError: for a name that may mean samples of several shards.
        """
        kind = pa.int64() if self.by == "sample_id" else pa.large_binary()
        column = pa.chunked_array(sample_names, kind)
        is_kept = pc.is_in(column, value_set=self.names, skip_nulls=True)
        masks = [np.asarray(mask.to_numpy(zero_copy_only=False), dtype=bool) for mask in _split_by_shard(is_kept, shards)]
        rows = [np.flatnonzero(mask).astype(np.int64) for mask in masks]
        self._refuse_ambiguous(shards, sample_names, rows)
        if int(os.environ.get("RANK", "0")) == 0:
            unknown = len(self.names) - len(pc.unique(column.filter(is_kept)))
            text = f"select {self.name}: {sum(map(len, rows))} of {sum(map(len, shards))} samples are kept"
            if unknown:
                logger.warning("%s; %d of its %d are no sample's", text, unknown, len(self.names))
            else:
                logger.info("%s", text)
        return [narrowed(shard, kept_rows) for shard, kept_rows in zip(shards, rows, strict=True)]

    def _refuse_ambiguous(self, shards: Sequence[ShardIndex], names: Sequence[pa.Array], rows: Sequence[np.ndarray]) -> None:
        """Refuse a list by keys where samples of two shards have one key, as with writers that number from 0 in every shard.

        Raises:
            UserError: for such a key.
        """
        if self.by == "sample_id":
            return
        kept = [pc.unique(shard_names.take(pa.array(kept_rows))) for shard_names, kept_rows in zip(names, rows, strict=True)]
        all_kept = pa.chunked_array(kept, pa.large_binary())
        if pc.count_distinct(all_kept).as_py() == len(all_kept):
            return
        counts = pc.value_counts(all_kept)
        repeated = next(entry["values"] for entry in counts.to_pylist() if entry["counts"] > 1)
        holders = [shard.name for shard, names in zip(shards, kept, strict=True) if pc.index(names, repeated).as_py() >= 0]
        raise UserError(
            f"select {self.name}: several samples have the {self.by} {repeated.decode('utf-8', 'replace')!r}, in"
            f" {holders[0]} and {holders[1]}: name them by sample_id"
        )


def _split_by_shard(values: pa.ChunkedArray, shards: Sequence[ShardIndex]) -> Iterable[pa.ChunkedArray]:
    start = 0
    for shard in shards:
        yield values.slice(start, len(shard))
        start += len(shard)


def _parse_names(index: TableIndex, by: str) -> tuple[pa.Array, str]:
    """Return the names as they are compared, and what is wrong with them."""
    column = index.table[by]
    if by == "sample_id" and pa.types.is_signed_integer(column.type) and not column.null_count:
        return column.cast(pa.int64()).combine_chunks(), ""
    names: list[Any] = []
    for row, scalar in enumerate(column):
        value = index.entry(by, scalar) if by == "sample_id" else scalar.as_py()
        if value is None or value == "":
            return None, f"row {row}: no {by}"
        try:
            names.append(id_of(by, value, 0) if by == "sample_id" else str(value).encode())
        except DecodeError as error:
            return None, f"row {row}: {error}"
    return pa.array(names, pa.int64() if by == "sample_id" else pa.large_binary()), ""


def _parse_keep(column: pa.ChunkedArray, path: Path) -> pa.Array:
    """Return a column `keep` of truth values, numbers or words as truth values."""
    if pa.types.is_boolean(column.type) and not column.null_count:
        return column.combine_chunks()
    words = {"true": True, "false": False, "1": True, "0": False}
    keep = [words.get(str(value).lower()) for value in column.to_pylist()]
    if None in keep:
        row = keep.index(None)
        raise UserError(f"select {path}, row {row}: keep is {column[row].as_py()!r}, neither true nor false")
    return pa.array(keep, pa.bool_())


def _read_uids(path: Path) -> list[bytes]:
    """Return the uids of a DataComp list, each two numbers of 64 bits, in the hexadecimal digits that samples have."""
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
    length = 0
    for part, other_part in zip(reversed(first.split("/")), reversed(second.split("/")), strict=False):
        if part != other_part:
            break
        length += 1
    return length


def _summarize(shards: Sequence[ShardIndex]) -> str:
    return shards[0].name + (f" and {len(shards) - 1} more" if len(shards) > 1 else "") if shards else "no shard"
