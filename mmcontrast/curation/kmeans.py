"""Runs spherical k-means on a field of an embedding table, by faiss: learnt from a sample, then every row is assigned."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmcontrast.curation.blocks import Blocks
from mmcontrast.errors import UserError
from mmcontrast.search.query import faiss_module
from mmcontrast.search.table import StoredTable
from mmcontrast.whole_files import write_whole

POINTS, LEAST = 64, 100_000  # rows from which a centroid is learnt, and from which all are learnt at least
MEMORY = 2**30  # bytes of these rows at most, unless that is fewer than faiss wants
WANTED = 39  # rows of a centroid that faiss wants
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
    """Check the number of clusters.

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
        index = _learn(table, field, clusters, seed, iterations)
        write_whole(path, lambda partial: faiss_module().write_index(index, str(partial)))
    index = faiss_module().read_index(str(path))
    assigned, similarities = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.float32)
    start = 0
    for number, (block_rows, vectors) in enumerate(table.blocks(field)):
        if not blocks.has(ASSIGNED, number):
            best, nearest = index.search(vectors, 1)
            blocks.write(ASSIGNED, number, pa.table({"cluster": nearest[:, 0], "similarity": best[:, 0]}))
        part, _ = blocks.read(ASSIGNED, number)
        block = slice(start, start := start + len(block_rows))
        assigned[block], similarities[block] = part["cluster"].to_numpy(), part["similarity"].to_numpy()
    return Clustering(rows, assigned, similarities)


def _learn(table: StoredTable, field: str, clusters: int, seed: int, iterations: int) -> Any:
    """Return faiss's index of the centroids."""
    faiss, rows = faiss_module(), table.present(field)
    limit = max(WANTED * clusters, MEMORY // (4 * table.dim))
    number = min(len(rows), max(POINTS * clusters, LEAST), limit)
    random = np.random.Generator(np.random.PCG64(seed))
    sample = rows if number == len(rows) else np.sort(random.choice(rows, number, replace=False))
    trainer = faiss.Kmeans(
        table.dim, clusters, niter=iterations, spherical=True, seed=seed % 2**31,
        min_points_per_centroid=1, max_points_per_centroid=math.ceil(number / clusters),
    )  # fmt: skip
    trainer.train(table.vectors(field, sample))
    table.release()
    return trainer.index
