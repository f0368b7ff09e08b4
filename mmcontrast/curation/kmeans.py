"""Spherical k-means of a field of an embedding table, by faiss: learnt from a sample, and then every row assigned."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmcontrast.curation.blocks import Blocks
from mmcontrast.curation.stage import write_whole
from mmcontrast.errors import UserError
from mmcontrast.search.query import faiss_module
from mmcontrast.search.table import StoredTable

POINTS, LEAST = 64, 100_000  # rows from which a centroid is learnt, and all of them are, if they are not fewer
MEMORY = 2**30  # bytes of them, unless that were fewer than faiss asks for
ASKED = 39  # by faiss, of a centroid
LEARNT, ASSIGNED = "centroids.faiss", "assigned"


@dataclass(frozen=True)
class Clustering:
    """The clusters of n rows of a table.

    Attributes:
        rows: int64 [n], those that have the field, ascending.
        clusters: int64 [n], from 0 on.
        similarities: float32 [n], with the centroid of the row's cluster.
    """

    rows: np.ndarray
    clusters: np.ndarray
    similarities: np.ndarray


def check_clusters(table: StoredTable, field: str, clusters: int) -> None:
    """
    Raises:
        UserError: for more clusters than rows.
    """
    rows = len(table.present(field))
    if not 1 <= clusters <= rows:
        raise UserError(f"--clusters {clusters}: {rows} rows of {table.folder} have the field {field!r}")


def kmeans(table: StoredTable, field: str, clusters: int, seed: int, iterations: int, blocks: Blocks) -> Clustering:
    """Cluster the rows that have a field; the table is read once, and a random sample of it.

    Args:
        blocks: keep the centroids once they are learnt, and the rows that are assigned.
    """
    rows, path = table.present(field), blocks.folder / LEARNT
    if not path.exists():
        index = _learnt(table, field, clusters, seed, iterations)
        write_whole(path, lambda partial: faiss_module().write_index(index, str(partial)))
    index = faiss_module().read_index(str(path))
    found, scores = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.float32)
    start = 0
    for number, (numbers, vectors) in enumerate(table.blocks(field)):
        if not blocks.has(ASSIGNED, number):
            best, nearest = index.search(vectors, 1)
            blocks.write(ASSIGNED, number, pa.table({"cluster": nearest[:, 0], "similarity": best[:, 0]}))
        part, _ = blocks.read(ASSIGNED, number)
        block = slice(start, start := start + len(numbers))
        found[block], scores[block] = part["cluster"].to_numpy(), part["similarity"].to_numpy()
    return Clustering(rows, found, scores)


def _learnt(table: StoredTable, field: str, clusters: int, seed: int, iterations: int) -> Any:
    """Return faiss's index of the centroids."""
    faiss, rows = faiss_module(), table.present(field)
    most = max(ASKED * clusters, MEMORY // (4 * table.dim))
    number = min(len(rows), max(POINTS * clusters, LEAST), most)
    random = np.random.Generator(np.random.PCG64(seed))
    sample = rows if number == len(rows) else np.sort(random.choice(rows, number, replace=False))
    learning = faiss.Kmeans(
        table.dim, clusters, niter=iterations, spherical=True, seed=seed % 2**31,
        min_points_per_centroid=1, max_points_per_centroid=math.ceil(number / clusters),
    )  # fmt: skip
    learning.train(table.vectors(field, sample))
    table.release()
    return learning.index
