"""Spherical k-means of a field of an embedding table, by faiss: learnt from a sample, and then every row assigned."""

import math
from dataclasses import dataclass

import numpy as np

from mmcontrast.errors import UserError
from mmcontrast.search.query import faiss_module
from mmcontrast.search.table import StoredTable

POINTS, LEAST = 64, 100_000  # rows from which a centroid is learnt, and all of them are, if they are not fewer
MEMORY = 2**30  # bytes of them, unless that were fewer than faiss asks for
ASKED = 39  # by faiss, of a centroid


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


def kmeans(table: StoredTable, field: str, clusters: int, seed: int = 0, iterations: int = 20) -> Clustering:
    """Cluster the rows that have a field; the table is read once, and a random sample of it.

    Raises:
        UserError: for more clusters than rows.
    """
    faiss, rows = faiss_module(), table.present(field)
    if not 1 <= clusters <= len(rows):
        raise UserError(f"--clusters {clusters}: {len(rows)} rows of {table.folder} have the field {field!r}")
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
    found, scores = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.float32)
    start = 0
    for numbers, vectors in table.blocks(field):
        block = slice(start, start := start + len(numbers))
        best, nearest = learning.index.search(vectors, 1)
        found[block], scores[block] = nearest[:, 0], best[:, 0]
    return Clustering(rows, found, scores)
