"""Read an embedding table from disk by row, without loading it into memory."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmcontrast.errors import UserError
from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.evaluation.embed import MANIFEST
from mmcontrast.evaluation.finite import check_finite, check_unit
from mmcontrast.score import Lorentz

FORMATS = ("mmcontrast embedding table 1", "mmcontrast embedding table 2")  # 2: of a hyperbolic model
BLOCK_ROWS = 16_384  # read at a time
KEPT_GROUPS = 8  # row groups of metadata that stay in memory


class ChangedError(UserError):
    """A table or an index was rebuilt while a program has it open."""


def refuse_paths(names: Iterable[Any], file: Path) -> None:
    """Check names that become file names.

    Raises:
        UserError: for a name that is not that of a file in the same folder.
    """
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise UserError(f"{file} names {str(name)[:100]!r}: not a name of a field or a part, so this file is not ours")


def stamp(file: Path) -> tuple[int, int, int] | None:
    """Return inode, size and time of a file, which change when it is rewritten; None if it is missing."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class StoredTable:
    """A table of N rows of D numbers on disk. Parts are memory-mapped: only the rows that are used are read.

    Attributes:
        manifest: as `mmcontrast embed` wrote it.
        fields: the names of its fields.
        distances: of a hyperbolic model, whose embeddings are tangent vectors; None: scores are cosines.

    Raises:
        UserError: if the folder holds no complete table, or a part is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._stamp = folder, stamp(folder / MANIFEST)
        self.bridge: Bridge | None = None
        try:
            text = (folder / MANIFEST).read_bytes()
            self.manifest: dict[str, Any] = json.loads(text)
            if self.manifest["format"] not in FORMATS:
                raise UserError(f"{folder / MANIFEST} is of the format {self.manifest['format']!r}, not {FORMATS[0]!r}")
            curvature = self.manifest.get("curvature")
            self.distances = None if curvature is None else Lorentz(float(curvature))
            self.digest = hashlib.blake2b(text, digest_size=8).hexdigest()
            self.fields: list[str] = list(self.manifest["fields"])
            self.dim, self._names = int(self.manifest["dim"]), [part["name"] for part in self.manifest["parts"]]
            self._starts = np.cumsum([0, *(int(part["rows"]) for part in self.manifest["parts"])])
        except OSError as error:
            raise UserError(
                f"{folder} holds no complete embedding table (no {MANIFEST}): mmcontrast embed makes one, and docs/tables.md"
                " one of vectors of your own"
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder / MANIFEST} is damaged ({error!r}): embed again") from error
        refuse_paths([*self.fields, *self._names], folder / MANIFEST)
        self.release()
        self._group = lru_cache(maxsize=KEPT_GROUPS)(self._read_group)
        self._group_starts = lru_cache(maxsize=None)(self._read_group_starts)

    def _opened(self, name: str, rows: int) -> dict[str, Tensor]:
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                part = {key: file.get_tensor(key) for field in self.fields for key in (field, f"present.{field}")}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: missing or damaged ({error}): embed again") from error
        for field in self.fields:
            if part[field].shape != (rows, self.dim) or part[f"present.{field}"].shape != (rows,):
                raise UserError(
                    f"{path}: {field!r} is not of {rows} rows of {self.dim} numbers, as {MANIFEST} says: embed again"
                )
        return part

    @property
    def query_dim(self) -> int:
        """Return the width of a query."""
        return self.dim if self.bridge is None else self.bridge.queries.shape[1]

    @property
    def product_dim(self) -> int:
        """Return the width of a `compared` row."""
        return self.dim + (self.distances is not None)

    def compared(self, vectors: np.ndarray, columns: bool = False) -> np.ndarray:
        """Return vectors [..., D] for products: the greater the product of a query and a row (`columns`), the better the match.
        Of a hyperbolic model float64 points of the hyperboloid, [..., D + 1]; through a bridge expected entries."""
        if self.bridge is not None:
            rows = torch.from_numpy(vectors.reshape(-1, vectors.shape[-1]))
            return self.bridge.expected(rows, candidates=columns).numpy().reshape(*vectors.shape[:-1], self.dim)
        if self.distances is None:
            return vectors
        return self.distances.rows(torch.from_numpy(vectors).double(), columns).numpy()

    def scores(self, queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Return cosines, or −distances, [Q, C] of queries [Q, D] and of rows for each of them [Q, C, D]."""
        products = np.einsum("qcd,qd->qc", self.compared(vectors, columns=True), self.compared(queries))
        return products if self.distances is None else self.distances.value(torch.from_numpy(products)).numpy()

    def check_unchanged(self) -> None:
        """Check that the table is the one that was opened.

        Raises:
            ChangedError: if it was rebuilt since.
        """
        if stamp(self.folder / MANIFEST) != self._stamp:
            raise ChangedError(f"{self.folder} was rebuilt since it was opened: index it again, then open it again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, row: int) -> tuple[int, int]:
        assert 0 <= row < len(self)
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, row - int(self._starts[part])

    def present(self, field: str) -> np.ndarray:
        """Return the rows that have the field, int64, ascending."""
        masks = [part[f"present.{field}"].numpy() for part in self._parts]
        return np.flatnonzero(np.concatenate(masks)) if masks else np.empty(0, dtype=np.int64)

    def has(self, row: int, field: str) -> bool:
        part, inner = self._locate(row)
        return bool(self._parts[part][f"present.{field}"][inner])

    def vectors(self, field: str, rows: np.ndarray, check: bool = True) -> np.ndarray:
        """Return the vectors float32 [R, D] of rows in any order.

        Args:
            check: False for rows that `blocks` has already checked.

        Raises:
            UserError: for a vector that is not finite.
        """
        vectors = np.empty((len(rows), self.dim), dtype=np.float32)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(parts):
            positions = np.flatnonzero(parts == part)
            inner = torch.from_numpy(rows[positions] - self._starts[part])
            vectors[positions] = self._parts[part][field][inner].float().numpy()
        if check:
            self._check_rows(field, vectors, rows, rows_may_lack_it=True)
        return vectors

    def _check_rows(self, field: str, vectors: np.ndarray, rows: np.ndarray, rows_may_lack_it: bool = False) -> None:
        def name_of(position: int) -> str:
            return f"{self.folder}, field {field!r}, row {rows[position]}, sample {self.about(int(rows[position]))[0]!r}"

        check_finite(torch.from_numpy(vectors), name_of)
        if self.distances is None:
            check_unit(torch.from_numpy(vectors), name_of, zero_too=rows_may_lack_it)

    def blocks(self, field: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (rows int64 [R], vectors float32 [R, D]) of all rows that have the field, in order.

        Raises:
            UserError: for a vector that is not finite.
        """
        for name, part, start in zip(self._names, self._parts, self._starts.tolist(), strict=False):
            for first in range(0, len(part[field]), BLOCK_ROWS):
                inner = part[f"present.{field}"][first : first + BLOCK_ROWS].nonzero().squeeze(1)
                if not len(inner):
                    continue
                with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:  # its pages are freed at the end
                    vectors = file.get_slice(field)[first : first + BLOCK_ROWS][inner].float().numpy()
                rows = inner.numpy() + first + start
                self._check_rows(field, vectors, rows)
                yield rows, vectors

    def columns(self, *names: str) -> Iterator[pa.Table]:
        """Yield columns of all rows, a part at a time: `key`, `sample_id`, `group_id`, or `metadata`, which is JSON.

        Raises:
            UserError: if they cannot be read.
        """
        for name, rows in zip(self._names, np.diff(self._starts), strict=True):
            path = self.folder / f"{name}.parquet"
            try:
                table = pq.read_table(path, columns=list(names)).select(names)
            except (OSError, KeyError, pa.ArrowException) as error:
                raise UserError(f"{path}: missing or damaged ({error}): embed again") from error
            if len(table) != rows:
                raise UserError(f"{path} is not of {rows} rows, as {MANIFEST} says: embed again")
            yield table

    def ids(self, column: str) -> np.ndarray:
        """Return `sample_id` or `group_id` of all rows, int64 [N].

        Raises:
            UserError: if they cannot be read.
        """
        parts = [np.empty(0, dtype=np.int64)]
        for part in self.columns(column):
            if not pa.types.is_int64(part[column].type) or part[column].null_count:
                raise UserError(f"{self.folder}: its column {column} is not of whole numbers: embed again")
            parts.append(part[column].to_numpy())
        return np.concatenate(parts)

    def release(self) -> None:
        """Free the pages that were read, which count as this process's memory while they are mapped."""
        self._parts = [self._opened(name, int(rows)) for name, rows in zip(self._names, np.diff(self._starts), strict=True)]

    def about(self, row: int) -> tuple[str, dict[str, Any]]:
        """Return (key, metadata) of a row.

        Raises:
            UserError: if they cannot be read.
        """
        part, inner = self._locate(row)
        path = self.folder / f"{self._names[part]}.parquet"
        try:
            starts = self._group_starts(part)
            group = int(np.searchsorted(starts, inner, side="right")) - 1
            columns, row_in_group = self._group(part, group), inner - int(starts[group])
            return str(columns["key"][row_in_group].as_py()), json.loads(columns["metadata"][row_in_group].as_py())
        except (OSError, IndexError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{path}: missing or damaged ({error}): embed again") from error

    def _read_group_starts(self, part: int) -> np.ndarray:
        parquet_metadata = pq.read_metadata(self.folder / f"{self._names[part]}.parquet")
        return np.cumsum([0, *(parquet_metadata.row_group(group).num_rows for group in range(parquet_metadata.num_row_groups))])

    def _read_group(self, part: int, group: int) -> pa.Table:
        return pq.ParquetFile(self.folder / f"{self._names[part]}.parquet").read_row_group(group, columns=["key", "metadata"])
