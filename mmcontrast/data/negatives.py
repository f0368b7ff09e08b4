"""Reads mined negatives: a table names for each sample some others, which are read by their ids for it alone.

Which of them an epoch shows is a function of (seed, epoch, sample id), as the order and the augmentation are.
`open_candidates` reads such tables, for `neighbours.py` too.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmcontrast.data.ids import id_of
from mmcontrast.data.row_ids import refuse_other_rows
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError

if TYPE_CHECKING:
    from mmcontrast.data.dataset import ShardDataset
    from mmcontrast.data.mixture import MixtureDataset

COLUMNS = ("sample_id", "candidate_ids")
ROWS, LOOKED_UP = 2**16, 2**22  # rows, and candidates, that are in memory at a time beside the table
UnknownIds = Literal["error", "skip"]
logger = logging.getLogger("mmcontrast")


@dataclass(frozen=True)
class Candidates:
    """The candidates that a table names for the samples of a data set.

    Attributes:
        digest: of the table's contents.
        ids: int64 [R], sorted: the samples that have a row. starts: int64 [R + 1], where each one's candidates begin.
        positions: int64 [M] of the candidates in the data set, in the table's order.
    """

    digest: str
    ids: np.ndarray
    starts: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class MinedNegatives:
    """A table of negatives, opened for a data set.

    Attributes:
        field: whose member of a candidate is read.
        names: under which a batch has it: the first negative of each sample, the second, and so on.
        digest: of the table's contents.
        ids: int64 [R], sorted: the samples that have a row. starts: int64 [R + 1], where each one's candidates begin.
        positions: int64 [M] of the candidates in the data set.
    """

    field: str
    names: tuple[str, ...]
    seed: int
    digest: str
    ids: np.ndarray
    starts: np.ndarray
    positions: np.ndarray

    @classmethod
    def none(cls, field: str, names: Sequence[str], seed: int) -> "MinedNegatives":
        """Return the negatives of a table that is mined later: no sample has any."""
        empty = np.empty(0, dtype=np.int64)
        return cls(field, tuple(names), seed, f"none {field} {len(names)}", empty, np.zeros(1, dtype=np.int64), empty)

    def draw(self, epoch: int, sample_id: int) -> list[int]:
        """Return the positions of a sample's negatives in an epoch, in the table's order: fewer than `names`, or none, where
        its row has no more."""
        row = int(np.searchsorted(self.ids, sample_id))
        if row == len(self.ids) or self.ids[row] != sample_id:
            return []
        candidates = self.positions[self.starts[row] : self.starts[row + 1]]
        if len(candidates) > len(self.names):
            random = np.random.Generator(np.random.PCG64([self.seed, epoch, sample_id % 2**64]))
            candidates = candidates[np.sort(random.choice(len(candidates), len(self.names), replace=False))]
        return candidates.tolist()


def open_negatives(
    dataset: "ShardDataset | MixtureDataset",
    table: str,
    field: str,
    names: Sequence[str],
    seed: int,
    unknown_ids: UnknownIds = "error",
    known: np.ndarray | None = None,
) -> MinedNegatives:
    """Open a table of negatives.

    Args:
        field, names: as `MinedNegatives`.
        table, unknown_ids, known: as `open_candidates`.

    Raises:
        UserError: as `open_candidates`.
    """
    candidates = open_candidates(dataset, table, "data.negatives", unknown_ids, known=known)
    digest = f"{candidates.digest} {field} {len(names)}"
    return MinedNegatives(field, tuple(names), seed, digest, candidates.ids, candidates.starts, candidates.positions)


def open_candidates(
    dataset: "ShardDataset | MixtureDataset",
    table: str,
    option: str,
    unknown_ids: UnknownIds = "error",
    most: int | None = None,
    known: np.ndarray | None = None,
) -> Candidates:
    """Open a Parquet file with the columns `sample_id` and `candidate_ids`, a list, as `mmcontrast data mine` writes it; or a
    folder of such files, of which each has some of the rows.

    Args:
        option: of the config that names the table, for messages.
        unknown_ids: "skip": leave out samples and candidates that the data set lacks.
        most: so many candidates of a row are read, the first ones.
        known: the data set's `sample_ids()`, where they have been read.

    Raises:
        UserError: for a file that is none; for an id that is repeated, or that the data set lacks.
    """
    refuse_other_rows(table, dataset.shards, option)
    ids, counts, candidates = _read(table, option, most)
    digest = hashlib.blake2b(digest_size=8)
    for array in (ids, np.concatenate([[0], np.cumsum(counts)]), candidates):
        digest.update(np.ascontiguousarray(array, dtype="<i8").data)
    order = np.argsort(ids, kind="stable")
    if len(repeats := np.flatnonzero(np.diff(ids[order]) == 0)):
        rows = sorted(order[repeats[0] : repeats[0] + 2].tolist())
        raise UserError(f"{option}: {table}, rows {rows[0]} and {rows[1]} are both of the sample {ids[rows[0]]}")
    if not len(candidates):
        raise UserError(f"{option}: {table} names no candidate at all: whatever made it has removed all of them")
    sample_ids = dataset.sample_ids() if known is None else known
    by_id = np.argsort(sample_ids, kind="stable")
    sorted_ids = sample_ids[by_id]
    row_known = sorted_ids[_nearest_places(sorted_ids, ids)] == ids
    candidate_known = np.empty(len(candidates), dtype=bool)
    positions = np.empty(len(candidates), dtype=np.int32 if len(sorted_ids) < 2**31 else np.int64)
    for part in _slices(len(candidates), LOOKED_UP):
        places = _nearest_places(sorted_ids, candidates[part])
        candidate_known[part], positions[part] = sorted_ids[places] == candidates[part], by_id[places]
    if unknown_ids == "error" and not (row_known.all() and candidate_known.all()):
        _refuse(table, option, ids, candidates, counts, row_known, candidate_known)
    kept = candidate_known & np.repeat(row_known, counts)
    if not kept.any():
        raise UserError(f"{option}: no candidate of {table} is a sample of the training data")
    skipped = len(kept) - int(kept.sum())
    if skipped:
        kept_before = np.concatenate([[0], np.cumsum(kept)])
        positions, counts = positions[kept], np.diff(kept_before[np.concatenate([[0], np.cumsum(counts)])])
    if os.environ.get("RANK", "0") == "0":
        _warn(table, option, len(sample_ids) - int((counts > 0).sum()), len(sample_ids), skipped)
    rows = order[row_known[order]]
    starts, positions = rows_of(np.concatenate([[0], np.cumsum(counts)]), positions, rows)
    return Candidates(digest.hexdigest(), ids[rows], starts, positions)


def rows_of(starts: np.ndarray, values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return lists of values, as where each begins and all values, in another order: those of `rows`; −1 is an empty one."""
    counts = np.where(rows < 0, 0, np.diff(starts)[rows])
    new_starts = np.concatenate([[0], np.cumsum(counts)])
    new_values = np.empty(new_starts[-1], dtype=values.dtype)
    for part in _slices(len(rows), ROWS):
        shift = np.repeat(starts[rows[part]] - new_starts[part], counts[part])
        first, last = new_starts[part][0], new_starts[part][0] + len(shift)
        new_values[first:last] = values[shift + np.arange(first, last)]
    return new_starts, new_values


def _slices(number: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, number)) for first in range(0, number, size)]


def _warn(table: str, option: str, without: int, samples: int, skipped: int) -> None:
    if skipped:
        logger.warning("%s: %s: %d candidates are skipped: they, or their rows, are no samples here", option, table, skipped)
    if without:
        logger.warning("%s: %s has no candidates for %d of %d samples", option, table, without, samples)


def _nearest_places(sorted_ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return where each wanted id is, if it is among the sorted ones."""
    return np.minimum(np.searchsorted(sorted_ids, wanted), len(sorted_ids) - 1)


def _refuse(
    table: str,
    option: str,
    ids: np.ndarray,
    candidates: np.ndarray,
    counts: np.ndarray,
    row_known: np.ndarray,
    candidate_known: np.ndarray,
) -> None:
    number = int((~row_known).sum() + (~candidate_known).sum())
    if not candidate_known.all():
        place = int(np.argmin(candidate_known))
        row = int(np.searchsorted(np.cumsum(counts), place, side="right"))
        unknown = f"row {row} (sample_id {ids[row]}): its candidate {candidates[place]}"
    else:
        row = int(np.argmin(row_known))
        unknown = f"row {row}: the sample_id {ids[row]}"
    raise UserError(
        f"{option}: {table}, {unknown} is no sample of the training data ({number} ids are not): mine from a table of the"
        f" same shards, or set {option}.unknown_ids=skip, as with data.held_out and data.select"
    )


def _read(table: str, option: str, most: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (ids [R], number of candidates of each [R], candidates [M]) of a table, in one file or in all of a folder.

    Raises:
        UserError: if it has no such columns, or something in them is no id.
    """
    files = sorted(Path(table).glob("*.parquet")) if Path(table).is_dir() else [Path(table)]
    if not files:
        raise UserError(f"{option}: the folder {table} holds no Parquet file: name what `mmcontrast data mine` has written")
    parts = [part for file in files for part in _read_file(str(file), option, most)]
    ids, counts, candidates = ([part[k] for part in parts] for k in range(3))
    del parts
    return np.concatenate(ids), np.concatenate(counts), np.concatenate(candidates)


def _read_file(table: str, option: str, most: int | None) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    if not Path(table).is_file():
        raise UserError(f"{option}: no file {table}")
    empty = np.empty(0, dtype=np.int64)
    parts = [(empty, empty, empty)]
    try:
        with pq.ParquetFile(table) as file:
            schema = file.schema_arrow
            if missing := [name for name in COLUMNS if name not in schema.names]:
                raise UserError(
                    f"{option}: {table} needs the columns 'sample_id' and 'candidate_ids'; it lacks {missing[0]!r} and has"
                    f" {', '.join(schema.names)}"
                )
            kind = schema.field("candidate_ids").type
            is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
            if not is_list and file.metadata.num_rows:
                raise UserError(f"{option}: {table}: candidate_ids is {kind}, not a list of ids")
            for batch in file.iter_batches(columns=list(COLUMNS)) if is_list else ():
                parts.append(_rows(table, option, batch["sample_id"], batch["candidate_ids"], most))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{option}: {table} cannot be read ({' '.join(str(error).split())[:200]})") from error
    return parts


def _rows(
    table: str, option: str, ids: pa.Array, lists: pa.Array, most: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    candidates = _ids(table, option, pc.list_flatten(lists))
    if most is not None and len(counts) and counts.max() > most:
        rank = np.arange(len(candidates)) - np.repeat(np.cumsum(counts) - counts, counts)
        candidates, counts = candidates[rank < most], np.minimum(counts, most)
    return _ids(table, option, ids), counts, candidates


def _ids(table: str, option: str, column: Any) -> np.ndarray:
    if column.null_count:
        raise UserError(f"{option}: {table}: {column.null_count} ids are null")
    if pa.types.is_signed_integer(column.type):
        return column.to_numpy().astype(np.int64)
    try:
        return np.array([id_of("sample_id", value, -1) for value in column.to_pylist()], dtype=np.int64)
    except DecodeError as error:
        raise UserError(f"{option}: {table}: {error}") from error
