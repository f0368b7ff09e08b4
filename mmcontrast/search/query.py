"""Open an index and search it for the rows nearest to a vector."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.search.table import ChangedError, StoredTable, refuse_paths, stamp

FORMAT = "mmcontrast index 1"
INDEX, BRIDGE, TEXTS = "index.json", "bridge.safetensors", "bridge.txt"
CODES_CANDIDATES = 10  # times k, and 100 at least: candidates from codes, which are scored again from the table
SCORED_TOGETHER = 64  # queries
ROUNDING = 1e-3  # by which a unit vector's length may differ from 1


def faiss_module() -> ModuleType:
    """Import faiss.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError(f"faiss is not installed ({error}): pip install 'mmcontrast[cpu]'") from error
    return faiss


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Hit:
    """A row of a search's result. `score`: the cosine, or −distance of hyperbolic embeddings; `metadata`: the sample's json."""

    row: int
    score: float
    key: str
    metadata: dict[str, Any]


def nearest_rows(
    index: Any, table: StoredTable, field: str, kind: str, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores [Q, k], best first; rows int64 [Q, k], −1 where there are fewer). Candidates from codes, and those of
    hyperbolic scores, are scored again from the stored vectors."""
    prepared = table.compared(queries).astype(np.float32, copy=False)
    if kind != "ivf_pq" and table.distances is None:
        return index.search(prepared, min(k, index.ntotal))
    candidates = index.search(prepared, min(max(CODES_CANDIDATES * k, 100), index.ntotal))[1]
    scores = np.full(candidates.shape, -np.inf, dtype=np.float32 if table.distances is None else np.float64)
    for first in range(0, len(queries), SCORED_TOGETHER):
        block = candidates[first : first + SCORED_TOGETHER]
        vectors = table.vectors(field, block.clip(0).ravel()).reshape(*block.shape, -1)
        scores[first : first + len(block)] = table.scores(queries[first : first + len(block)], vectors)
    scores[candidates < 0] = -np.inf
    order = np.argsort(-scores, 1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)


class SearchIndex:
    """The indexes of a table's fields, and the table. An index is read at its first search, and checked by its SHA-256.

    Attributes:
        about: `index.json`: model, checkpoint, shards, bridge, and per field kind, reason, rows, recall.
        table: the indexed table.
        fields: those that have an index.

    Raises:
        UserError: for a folder without a complete index, or whose table is missing or has changed since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._stamp, self._reading = folder, stamp(folder / INDEX), Lock()
        try:
            self.about: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
            if self.about["format"] != FORMAT:
                raise UserError(f"{folder / INDEX} is of the format {self.about['format']!r}, not {FORMAT!r}: index again")
            self.fields: list[str] = list(self.about["fields"])
            table, digest = folder / self.about["table"], self.about["table_digest"]
            sizes = {field: (entry["kind"], entry["rows"], entry["bytes"]) for field, entry in self.about["fields"].items()}
        except OSError as error:
            raise UserError(f"{folder} holds no whole index (no {INDEX}): make one with mmcontrast index TABLE") from error
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder / INDEX} is damaged ({error!r}): index again") from error
        refuse_paths(self.fields, folder / INDEX)
        for field, (_, _, size) in sizes.items():
            path = folder / f"{field}.faiss"
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path}: missing or not of {size} bytes: index again")
        self.table = StoredTable(table)
        if self.table.digest != digest:
            raise UserError(f"{folder} is of another table than {table} holds now: index it again")
        if (bridge_entry := self.about.get("bridge")) is not None:
            self.table.bridge = self._read_bridge(bridge_entry)
        self._index = lru_cache(maxsize=None)(self._read)

    @classmethod
    def open(cls, folder: str | Path) -> "SearchIndex":
        return cls(Path(folder))

    def __len__(self) -> int:
        return len(self.table)

    def check_unchanged(self) -> None:
        """Check that the index and its table are those that were opened.

        Raises:
            ChangedError: if one was rebuilt since.
        """
        if stamp(self.folder / INDEX) != self._stamp:
            raise ChangedError(f"{self.folder} was rebuilt since it was opened: open it again")
        self.table.check_unchanged()

    def _read_bridge(self, entry: dict[str, Any]) -> Bridge:
        path = self.folder / BRIDGE
        try:
            if sha256_of(path) != entry["sha256"]:
                raise UserError(f"{path} is damaged (its SHA-256 is not the one that {INDEX} has): index again")
            bank = load_file(path)["bank"]
            return Bridge(bank, bank, entry["scale"], entry["scale"])
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): index again") from error
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error!r}): index again") from error

    def _read(self, field: str) -> Any:
        path, rows = self.folder / f"{field}.faiss", self.about["fields"][field]["rows"]
        digest = self.about["fields"][field].get("sha256")  # older indexes have none
        try:
            if digest and sha256_of(path) != digest:
                raise UserError(f"{path} is damaged (its SHA-256 is not the one that {INDEX} has): index again")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): index again") from error
        try:
            index = faiss_module().read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path} is damaged ({str(error).split('Error: ')[-1][:200]}): index again") from error
        if (index.ntotal, index.d) != (rows, self.table.product_dim):
            raise UserError(
                f"{path} holds {index.ntotal} rows of {index.d} numbers, not {rows} of {self.table.product_dim}: index again"
            )
        return index

    def check_field(self, field: str) -> None:
        """Check that a field has an index.

        Raises:
            UserError: if it has none.
        """
        if field not in self.fields:
            raise UserError(f"no index of a field {field!r}; {suggestion(field, self.fields)}")

    def check_row(self, row: int) -> None:
        """Check that a row exists.

        Raises:
            UserError: if it does not.
        """
        if not 0 <= row < len(self):
            raise UserError(f"no row {row}: rows are 0 to {len(self) - 1}")

    def search(self, vectors: Tensor | np.ndarray, field: str, k: int = 10, without: Sequence[int] = ()) -> list[Any]:
        """Return the rows nearest to an embedding [D], best first, as `Hit`s; for [Q, D], a list of them for each. Where scores
        are cosines, embeddings of any length are made unit vectors.

        Args:
            field: whose index is searched.
            k: number of hits; all where there are fewer.
            without: rows that are left out.

        Raises:
            UserError: if the field has no index; for vectors of another width, not finite, or zero.
        """
        self.check_field(field)
        if k < 1:
            raise UserError(f"k={k}: at least 1 hit")
        queries = np.ascontiguousarray(torch.as_tensor(vectors, dtype=torch.float32).detach().cpu().numpy())
        if queries.ndim not in (1, 2) or queries.shape[-1] != self.table.query_dim:
            raise UserError(
                f"a query of shape {tuple(queries.shape)}: the index takes vectors of {self.table.query_dim} numbers"
            )
        if not np.isfinite(queries).all():
            raise UserError("a query's vector is not finite (NaN or infinity)")
        if self.table.distances is None:
            lengths = np.linalg.norm(queries, axis=-1, keepdims=True)
            if not lengths.all():
                raise UserError("a query's vector is zero: it has no direction, and so no nearest row")
            queries = np.where(np.abs(lengths - 1) > ROUNDING, queries / lengths, queries)
        kind = self.about["fields"][field]["kind"]
        with self._reading:
            index = self._index(field)
        results = nearest_rows(index, self.table, field, kind, np.atleast_2d(queries), k + len(without))
        hits = []
        for scores, rows in zip(*results, strict=True):
            pairs = [(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True) if row >= 0]
            if any(row >= len(self) for row, _ in pairs):
                raise UserError(f"{self.folder / f'{field}.faiss'} has rows that the table has not: index again")
            kept = [(row, score) for row, score in pairs if row not in without][:k]
            hits.append([self.hit(row, score) for row, score in kept])
        self.check_unchanged()  # after all is read
        return hits if queries.ndim == 2 else hits[0]

    def hit(self, row: int, score: float) -> Hit:
        hit = Hit(row, score, *self.table.about(row))
        self.check_unchanged()
        return hit

    def vector(self, row: int, field: str) -> Tensor:
        """Return the stored embedding [D] of a row.

        Raises:
            UserError: if the row or its field is missing.
        """
        self.check_row(row)
        if field not in self.table.fields:
            raise UserError(f"the table has no field {field!r}; {suggestion(field, self.table.fields)}")
        if not self.table.has(row, field):
            raise UserError(f"row {row} has no {field!r}")
        return torch.from_numpy(self.table.vectors(field, np.array([row]))[0])

    def neighbours(self, row: int, field: str, k: int = 10, of: str | None = None) -> list[Hit]:
        """Return the rows nearest to a row, without itself.

        Args:
            field: whose index is searched.
            of: the field of the row whose embedding is the query; default: the same.

        Raises:
            UserError: if the row, its field or the index is missing.
        """
        return self.search(self.vector(row, of or field), field, k, without=[row])
