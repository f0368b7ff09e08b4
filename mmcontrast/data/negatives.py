"""Mined negatives: for each sample some others, named by a table, whose members are read by their ids for it alone.

Which of them an epoch shows is a function of (seed, epoch, sample id), as the order and the augmentation are.
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
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError

if TYPE_CHECKING:
    from mmcontrast.data.dataset import ShardDataset
    from mmcontrast.data.mixture import MixtureDataset

COLUMNS = ("sample_id", "candidate_ids")
UnknownIds = Literal["error", "skip"]
logger = logging.getLogger("mmcontrast")


@dataclass(frozen=True)
class MinedNegatives:
    """A table of negatives, opened for a data set.

    Attributes:
        field: whose member of a candidate is read.
        names: under which a batch has it: the first negative of each sample, the second, and so on.
        digest: of what the table says.
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
) -> MinedNegatives:
    """Open a Parquet file with the columns `sample_id` and `candidate_ids`, a list, as `mmcontrast data mine` writes it.

    Args:
        field, names: as `MinedNegatives`.
        unknown_ids: "skip": leave out samples and candidates that the data set lacks.

    Raises:
        UserError: for a file that is none; for an id that is repeated, or that the data set lacks.
    """
    ids, starts, candidates = _read(table)
    digest = hashlib.blake2b(b"".join(part.astype("<i8").tobytes() for part in (ids, starts, candidates)), digest_size=8)
    order = np.argsort(ids, kind="stable")
    if len(again := np.flatnonzero(np.diff(ids[order]) == 0)):
        rows = sorted(order[again[0] : again[0] + 2].tolist())
        raise UserError(f"data.negatives: {table}, rows {rows[0]} and {rows[1]} are both of the sample {ids[rows[0]]}")
    there = dataset.sample_ids()
    by_id = np.argsort(there, kind="stable")
    known = there[by_id]
    owners = np.repeat(np.arange(len(ids)), np.diff(starts))
    own, asked = _found(known, ids), _found(known, candidates)
    if unknown_ids == "error" and not (own.all() and asked.all()):
        _refuse(table, ids, candidates, owners, own, asked)
    kept = asked & own[owners]
    new_row = np.empty(len(ids), dtype=np.int64)
    new_row[order[own[order]]] = np.arange(int(own.sum()))
    owners, candidates = new_row[owners[kept]], candidates[kept]
    if not len(candidates):
        raise UserError(f"data.negatives: no candidate of {table} is a sample of the training data")
    arranged = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=int(own.sum()))
    if os.environ.get("RANK", "0") == "0":
        _tell(table, len(there) - int((counts > 0).sum()), len(there), len(asked) - len(candidates))
    return MinedNegatives(
        field,
        tuple(names),
        seed,
        f"{digest.hexdigest()} {field} {len(names)}",
        ids[order][own[order]],
        np.concatenate([[0], np.cumsum(counts)]),
        by_id[np.searchsorted(known, candidates[arranged])],
    )


def _tell(table: str, without: int, samples: int, skipped: int) -> None:
    if skipped:
        logger.warning(
            "data.negatives: %s: %d candidates are skipped: they, or their rows, are no samples here", table, skipped
        )
    if without:
        logger.warning("data.negatives: %s has no candidates for %d of %d samples", table, without, samples)


def _found(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return known[places] == asked


def _refuse(
    table: str, ids: np.ndarray, candidates: np.ndarray, owners: np.ndarray, own: np.ndarray, asked: np.ndarray
) -> None:
    number = int((~own).sum() + (~asked).sum())
    if not asked.all():
        place = int(np.argmin(asked))
        what = f"row {owners[place]} (sample_id {ids[owners[place]]}): its candidate {candidates[place]}"
    else:
        what = f"row {int(np.argmin(own))}: the sample_id {ids[int(np.argmin(own))]}"
    raise UserError(
        f"data.negatives: {table}, {what} is no sample of the training data ({number} ids are not): mine from a table of the"
        " same shards, or set data.negatives.unknown_ids=skip, as with data.held_out and data.select"
    )


def _read(table: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [R], starts [R + 1], candidates [M]) of a table's rows.

    Raises:
        UserError: if it has no such columns, or what is in them is no id.
    """
    if not Path(table).is_file():
        raise UserError(f"data.negatives: no file {table}")
    try:
        schema = pq.read_schema(table)
        if missing := [name for name in COLUMNS if name not in schema.names]:
            raise UserError(
                f"data.negatives: {table} needs the columns 'sample_id' and 'candidate_ids'; it lacks {missing[0]!r} and has"
                f" {', '.join(schema.names)}"
            )
        kind = schema.field("candidate_ids").type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise UserError(f"data.negatives: {table}: candidate_ids is {kind}, not a list of ids")
        read = pq.read_table(table, columns=list(COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data.negatives: {table} cannot be read ({' '.join(str(error).split())[:200]})") from error
    lists = read["candidate_ids"].combine_chunks()
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return _ids(table, read["sample_id"]), starts, _ids(table, pc.list_flatten(lists))


def _ids(table: str, column: Any) -> np.ndarray:
    if column.null_count:
        raise UserError(f"data.negatives: {table}: {column.null_count} ids are null")
    if pa.types.is_signed_integer(column.type):
        return column.to_numpy().astype(np.int64)
    try:
        return np.array([id_of("sample_id", value, -1) for value in column.to_pylist()], dtype=np.int64)
    except DecodeError as error:
        raise UserError(f"data.negatives: {table}: {error}") from error
