"""Makes an embedding table of vectors that another program wrote: .npy files, or columns of Parquet files."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
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
from mmcontrast.data.column_types import is_list, plain_type
from mmcontrast.data.files import expand_shards, is_remote
from mmcontrast.data.ids import ids_of, stable_hash
from mmcontrast.data.row_ids import VECTORS
from mmcontrast.data.tables import TableIndex, open_table
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
    """Write an embedding table of vectors in files, and return its number of rows. One part of it at a time is in memory.

    Row i of every field is sample i. A vector of zeros, or a null in Parquet, is absent. Vectors of length 1 but for the
    rounding of half precision become float32 of length 1.

    Args:
        out: the folder of the table.
        fields: per field its files, a pattern as of shards: .npy of [rows, dim], or Parquet with ":COLUMN" behind it. Several
            are read in the order of the numbers in their names.
        metadata: tables with a row a sample, whose columns are the samples' json. `sample_id`, `group_id` and `key` are the
            samples' own, in place of the rows' numbers.
        key, group: columns of it to take in place of `key` and `group_id`.
        model: the name and `pretrained` of the model that made the vectors, as of `load`: queries are embedded with it.
        normalize: take vectors of any length.

    Raises:
        UserError: for files that hold no such vectors, or not equally many; a vector that is not finite, or of another length
            than 1 without `normalize`; a repeated sample_id; a folder that holds a table.
    """
    EmbeddingTable.refuse_to_overwrite(out)
    vectors = {field: Vectors.of(pattern) for field, pattern in fields.items()}
    columns = {files.column for files in vectors.values() if isinstance(files, ParquetVectors)}
    records = Records(metadata, key, group, columns) if metadata else None
    if not records and (key or group):
        raise UserError("--key and --group name columns of the metadata: name its files with --metadata")
    total = check_rows(vectors | ({"metadata": records} if records else {}))
    description = {"vectors": dict(fields)} | (identity(model[0], "last", model[1]) if model else {})
    if not records or not records.has_sample_ids:
        description["row_ids"] = {VECTORS: ""}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: no folder for a table ({error.strerror})") from error
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


def check_rows(files: Mapping[str, "Files"]) -> int:
    """Return how many rows the files of every field have.

    Raises:
        UserError: if their numbers differ, or are 0; if, of as many files of each, those that go together have other numbers in
            their names, or of rows.
    """
    (first, reference), *others = files.items()
    for name, other in others:
        aligned = len(other.files) == len(reference.files) > 1
        for mine, yours in zip(reference.files, other.files, strict=True) if aligned else ():
            numbers = [re.findall(r"\d+", Path(file).name) for file in (mine, yours)]
            if all(numbers) and int(numbers[0][-1]) != int(numbers[1][-1]):
                raise UserError(f"{mine} of {first} would go with {yours} of {name}: name the files so that all are there")
    rows = {name: len(each) for name, each in files.items()}
    if set(rows.values()) != {len(reference)} or not len(reference):
        counts = ", ".join(f"{name} has {number}" for name, number in rows.items())
        raise UserError(f"row i of all files is sample i, but their numbers of rows differ or are 0: {counts}")
    return len(reference)


class Files(ABC):
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

    @abstractmethod
    def rows_of(self, file: str) -> int:
        """Return how many rows a file has."""

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
    def of(pattern: str) -> "Vectors":
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
        rows = np.concatenate([self.read(*part, width) for part in slices])
        values = torch.from_numpy(rows.astype(np.float64 if normalize else np.float32))
        if normalize:  # whose squares may be too large or small for a float
            values /= values.abs().amax(1, keepdim=True).nan_to_num(1.0).where(values.any(1, keepdim=True), 1.0)
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

    def open(self, file: str) -> pq.ParquetFile:
        """Open a file whose column holds lists of numbers.

        Raises:
            UserError: if it does not.
        """
        try:
            opened = pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: not a Parquet file ({' '.join(str(error).split())[:200]})") from error
        names = opened.schema_arrow.names
        if self.column not in names:
            raise UserError(f"{file} has no column {self.column!r}; {suggestion(self.column, names)}")
        kind = plain_type(opened.schema_arrow.field(self.column).type)
        if not is_list(kind) or not pa.types.is_floating(kind.value_type):
            raise UserError(f"{file}: column {self.column!r} holds {kind}, where vectors are lists of floats")
        return opened

    def rows_of(self, file: str) -> int:
        with self.open(file) as opened:
            return opened.metadata.num_rows

    def width_of(self, file: str) -> int | None:
        with self.open(file) as opened:
            kind = plain_type(opened.schema_arrow.field(self.column).type)
            if pa.types.is_fixed_size_list(kind):
                return kind.list_size
            batches = opened.iter_batches(1024, columns=[self.column])
            return next((len(vector) for batch in batches for vector in batch.column(0).drop_null()), None)

    def read(self, file: str, first: int, stop: int, width: int) -> np.ndarray:
        with self.open(file) as opened:
            starts = [0, *accumulate(opened.metadata.row_group(k).num_rows for k in range(opened.num_row_groups))]
            groups = [k for k in range(opened.num_row_groups) if starts[k] < stop and starts[k + 1] > first]
            column = opened.read_row_groups(groups, [self.column]).column(0).slice(first - starts[groups[0]], stop - first)
        column = column.cast(plain_type(column.type)).combine_chunks()
        lengths = pc.unique(pc.list_value_length(column.drop_null())).to_pylist()
        if any(length != width for length in lengths):
            raise UserError(
                f"{file}: column {self.column!r} has vectors of {min(lengths)} to {max(lengths)} numbers, not {width}"
            )
        rows, present = np.zeros((len(column), width)), column.is_valid().to_numpy(zero_copy_only=False)
        rows[present] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        return rows


class Records(Files):
    """The samples' json and ids: the columns of tables, but for those of vectors."""

    def __init__(self, pattern: str, key: str | None, group: str | None, vectors: Collection[str]) -> None:
        self.tables: dict[str, TableIndex] = {}
        super().__init__(pattern)
        self.key, self.group, self.vectors = key or "key", group or "group_id", vectors
        columns = {name for table in self.tables.values() for name in table.table.column_names}
        self.has_sample_ids, self.has_groups = "sample_id" in columns, self.group in columns
        for option, name in (("--key ", key), ("--group ", group), ("", "key"), ("", "group_id"), ("", "sample_id")):
            for file, table in self.tables.items():
                if (option and name and name not in table.table.column_names) or name in table.undescribed:
                    why = f"holds {table.table.schema.field(name).type}" if name in table.undescribed else "is not there"
                    names = [one for one in table.table.column_names if one not in table.undescribed]
                    raise UserError(
                        f"{option}{name}: a column of numbers or texts, which in {file} {why}; {suggestion(name, names)}"
                    )

    def rows_of(self, file: str) -> int:
        self.tables[file] = table = open_table(file)
        return len(table)

    def read(self, start: int, stop: int) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]:
        """Return (sample id, group id) and the json of rows. A row without an id among others that have one gets one that no
        other has."""
        ids: list[tuple[int, int]] = []
        entries: list[dict[str, Any]] = []
        for file, first, last in self.slices(start, stop):
            for row in range(first, last):
                number = start + len(entries)
                own = stable_hash(f"row {number}")
                try:
                    entry = json.loads(self.tables[file].read(row, ["json"])["json"])
                    entry = {name: value for name, value in entry.items() if name not in self.vectors}
                    group = entry.get(self.group, own if self.has_groups else None)
                    ids.append(ids_of(entry | {"group_id": group}, own if self.has_sample_ids else number))
                except DecodeError as error:
                    raise UserError(f"{file}, row {row}: {error}") from error
                key = entry.get(self.key, number)
                entries.append(entry | {"key": str(int(key) if isinstance(key, float) and key.is_integer() else key)})
        return ids, entries


def by_numbers(name: str) -> list[tuple[int, str]]:
    """Return what sorts names by the numbers in them: img_emb_2.npy before img_emb_10.npy."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
