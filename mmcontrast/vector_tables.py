"""Makes an embedding table of vectors that another program wrote: .npy files, or columns of Parquet files."""

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.components import suggestion
from mmcontrast.data.column_types import is_list, is_metadata, plain_type
from mmcontrast.data.files import expand_shards, is_remote
from mmcontrast.data.ids import ids_of
from mmcontrast.embedder import identity
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.embed import MANIFEST, PART_ROWS
from mmcontrast.evaluation.finite import LENGTH
from mmcontrast.modalities import DecodeError
from mmcontrast.training.log import make_progress
from mmcontrast.whole_files import write_json

PARQUET = (".parquet", ".pq")


def write_vector_table(
    out: Path,
    fields: Mapping[str, str],
    metadata: str | None = None,
    key: str | None = None,
    group: str | None = None,
    model: tuple[str, str | None] | None = None,
    normalize: bool = False,
) -> int:
    """Write an embedding table of vectors in files, and return its number of rows. One part of it at a time is in memory, of
    Parquet the columns of one file.

    Row i of every field is sample i. A vector of zeros, or a null in Parquet, is absent. Vectors of length 1 but for the
    rounding of half precision become float32 of length 1.

    Args:
        out: the folder of the table.
        fields: per field its files, a pattern as of shards: .npy of [rows, dim], or Parquet with ":COLUMN" behind it. Several
            are read in the order of the numbers in their names.
        metadata: Parquet with a row a sample, whose columns are the samples' json. `sample_id`, `group_id` and `key` are the
            samples' own, in place of the rows' numbers.
        key, group: columns of it to take in place of `key` and `group_id`.
        model: the name and `pretrained` of the model that made the vectors, as of `load`: queries are embedded with it.
        normalize: take vectors of any length.

    Raises:
        UserError: for files that hold no such vectors, or not equally many; a vector that is not finite, or of another length
            than 1 without `normalize`; a repeated sample_id; a folder that holds a table.
    """
    EmbeddingTable.refuse_to_overwrite(out)
    vectors = {field: Vectors.open(pattern) for field, pattern in fields.items()}
    columns = {files.column for files in vectors.values() if isinstance(files, ParquetVectors)}
    records = Records(metadata, key, group, columns) if metadata else None
    if not records and (key or group):
        raise UserError("--key and --group name columns of the metadata: name its files with --metadata")
    rows = {name: len(files) for name, files in [*vectors.items(), *([("metadata", records)] if records else [])]}
    total = next(iter(rows.values()))
    if set(rows.values()) != {total} or not total:
        numbers = ", ".join(f"{name} has {number}" for name, number in rows.items())
        raise UserError(f"row i of all files is sample i, but their numbers of rows differ or are 0: {numbers}")
    description = {"vectors": dict(fields)} | (identity(model[0], "last", model[1]) if model else {})
    out.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Any]] = []
    sample_ids = torch.empty(total, dtype=torch.int64)
    with make_progress(True) as progress:
        task = progress.add_task("writing", total=total, note="")
        for start in range(0, total, PART_ROWS):
            stop = min(start + PART_ROWS, total)
            tensors = {field: files.unit_rows(start, stop, normalize) for field, files in vectors.items()}
            present = {field: values.any(1) for field, values in tensors.items()}
            ids, entries = records.read(start, stop) if records else ([(n, n) for n in range(start, stop)], None)
            entries = entries or [{"key": str(number)} for number in range(start, stop)]
            id_columns = torch.tensor(ids)
            table = EmbeddingTable(tensors, present, id_columns[:, 0], id_columns[:, 1], entries)
            table.check_shapes(", ".join(fields.values()))
            sample_ids[start:stop] = table.sample_ids
            manifest = table.write_parts(out, len(parts))
            parts += manifest["parts"]
            progress.update(task, completed=stop)
    unique, counts = sample_ids.unique(return_counts=True)
    if len(unique) < total:
        first, second = (sample_ids == unique[counts.argmax()]).nonzero().squeeze(1)[:2].tolist()
        raise UserError(f"{metadata}: rows {first} and {second} have one sample_id: what several rows are about is a group_id")
    write_json(out / MANIFEST, manifest | description | {"rows": total, "parts": parts})
    return total


class Files:
    """Rows of several files, numbered through.

    Attributes:
        files: in the order of the numbers in their names.
        ends: of each file, the number of the row after its last.
    """

    def __init__(self, pattern: str) -> None:
        self.files = sorted(expand_shards(pattern), key=by_numbers)
        for file in self.files:
            if is_remote(file):
                raise UserError(f"{file}: vectors are read from local files; copy them first")
        self.ends = list(accumulate(map(self.rows_of, self.files)))

    def __len__(self) -> int:
        return self.ends[-1]

    def rows_of(self, file: str) -> int:
        return parquet(file).metadata.num_rows

    def slices(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Return (file, first row, row after the last) of the files that hold rows."""
        found = []
        for file, begin, end in zip(self.files, [0, *self.ends], self.ends, strict=False):
            if max(start, begin) < min(stop, end):
                found.append((file, max(start, begin) - begin, min(stop, end) - begin))
        return found


class Vectors(Files):
    """Vectors of .npy files [rows, dim]."""

    @staticmethod
    def open(pattern: str) -> "Vectors":
        """Return the vectors of a pattern, which ends with ":COLUMN" for Parquet."""
        files, colon, column = pattern.rpartition(":")
        if colon and files.lower().endswith(PARQUET):
            return ParquetVectors(files, column)
        if pattern.lower().endswith(PARQUET):
            raise UserError(f"{pattern}: name the column of the vectors, as {pattern}:embedding")
        return Vectors(pattern)

    def rows_of(self, file: str) -> int:
        return len(self.array(file))

    def array(self, file: str) -> np.ndarray:
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{file}: not an .npy file of numbers ({error})") from error
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
            shape = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive of several arrays"
            raise UserError(f"{file}: {shape}, where vectors are floating-point numbers [rows, dim]")
        return array

    def width_of(self, file: str) -> int | None:
        """Return how many numbers the vectors of a file have; None if it has none."""
        return self.array(file).shape[1]

    def read(self, file: str, first: int, stop: int, width: int) -> np.ndarray:
        """Return rows [rows, width] of a file."""
        return self.array(file)[first:stop]

    def unit_rows(self, start: int, stop: int, normalize: bool) -> Tensor:
        """Return rows as float32 of length 1; of length 0 as they are.

        Raises:
            UserError: for one that is not finite, or of another length unless `normalize`; for widths that differ.
        """
        width = next((width for file in self.files if (width := self.width_of(file))), 0)
        slices = self.slices(start, stop)
        for file, _, _ in slices:
            if self.width_of(file) not in (None, width):
                raise UserError(f"{file}: vectors of {self.width_of(file)} numbers, where others have {width}")
        values = torch.from_numpy(np.concatenate([self.read(*part, width) for part in slices]).astype(np.float64))
        lengths = values.norm(dim=1)
        of_other_length = ((lengths - 1).abs() > LENGTH) & (lengths > 0) & (not normalize)
        for wrong, what in (
            (~lengths.isfinite(), "is not finite"),
            (of_other_length, "has not length 1: if only directions count, --normalize"),
        ):
            if wrong.any():
                row = start + int(wrong.nonzero()[0])
                ((file, number, _),) = self.slices(row, row + 1)
                length = f"length {lengths[row - start]:.4g}; {int(wrong.sum())} are so"
                raise UserError(f"{file}, row {number}: the vector {what} ({length})")
        return F.normalize(values, dim=1).float()


class ParquetVectors(Vectors):
    """Vectors of a column of Parquet files: lists of numbers, null where absent."""

    def __init__(self, pattern: str, column: str) -> None:
        self.column = column
        super().__init__(pattern)

    def rows_of(self, file: str) -> int:
        check_column(file, self.column, "")
        return parquet(file).metadata.num_rows

    def column_of(self, file: str) -> pa.Array:
        """Return the column of a file as lists of numbers.

        Raises:
            UserError: if it holds anything else.
        """
        column = column_of(file, self.column)
        kind = plain_type(column.type)
        if not is_list(kind) or not pa.types.is_floating(kind.value_type):
            raise UserError(f"{file}: column {self.column!r} holds {column.type}, where vectors are lists of floats")
        return column.cast(kind).combine_chunks()

    @lru_cache(maxsize=4096)  # noqa: B019 - as long as its files are read
    def width_of(self, file: str) -> int | None:
        widths = sorted(pc.unique(pc.list_value_length(self.column_of(file)).drop_null()).to_pylist())
        if len(widths) > 1:
            raise UserError(f"{file}: column {self.column!r} has vectors of {widths[0]} and of {widths[-1]} numbers")
        return widths[0] if widths else None

    def read(self, file: str, first: int, stop: int, width: int) -> np.ndarray:
        column = self.column_of(file).slice(first, stop - first)
        rows = np.zeros((len(column), width))
        rows[column.is_valid().to_numpy(zero_copy_only=False)] = (
            column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        )
        return rows


class Records(Files):
    """The samples' json and ids: the columns of Parquet files, without those of vectors."""

    def __init__(self, pattern: str, key: str | None, group: str | None, vectors: Collection[str]) -> None:
        super().__init__(pattern)
        self.key, self.group, self.vectors = key, group, vectors
        for option, column in (("--key ", key), ("--group ", group)):
            if column:
                check_column(self.files[0], column, option)

    def read(self, start: int, stop: int) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]:
        """Return (sample id, group id) and the json of rows."""
        ids: list[tuple[int, int]] = []
        entries: list[dict[str, Any]] = []
        for file, first, last in self.slices(start, stop):
            names = [name for name in parquet(file).schema_arrow.names if name not in self.vectors]
            names = [name for name in names if is_metadata(column_of(file, name))]
            columns = {name: column_of(file, name).slice(first, last - first).to_pylist() for name in names}
            for row in range(last - first):
                entry = {name: values[row] for name, values in columns.items() if values[row] is not None}
                number = start + len(entries)
                try:
                    ids.append(ids_of(entry | {"group_id": entry.get(self.group or "group_id")}, number))
                except DecodeError as error:
                    raise UserError(f"{file}, row {first + row}: {error}") from error
                entries.append(entry | {"key": str(entry.get(self.key or "key", number))})
        return ids, entries


def by_numbers(name: str) -> list[tuple[int, str]]:
    """Return what sorts names by the numbers in them: img_emb_2.npy before img_emb_10.npy."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@lru_cache(maxsize=4096)
def parquet(file: str) -> pq.ParquetFile:
    """Return an open Parquet file."""
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: not a Parquet file ({' '.join(str(error).split())[:200]})") from error


@lru_cache(maxsize=16)
def column_of(file: str, name: str) -> pa.ChunkedArray:
    return parquet(file).read([name]).column(name)


def check_column(file: str, name: str, option: str) -> None:
    names = parquet(file).schema_arrow.names
    if name not in names:
        raise UserError(f"{option}{name}: {file} has no such column; {suggestion(name, names)}")
