"""Drops near duplicates by their embeddings: SemDeDup (arXiv:2303.09540).

Spherical k-means; each cluster's samples in an order; a sample is dropped if its largest similarity with an earlier one of its
cluster is more than 1 − ε. The running maximum is taken over tiles, so memory does not grow with a cluster.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmcontrast.curation.blocks import Blocks
from mmcontrast.curation.kmeans import Clustering, check_clusters, kmeans
from mmcontrast.curation.looking import number_of
from mmcontrast.curation.outputs import (
    about_table,
    check_out,
    counts_table,
    finish,
    ids_of_table,
    open_stored,
    parquet_file,
    sample_cell,
    spread,
)
from mmcontrast.errors import UserError
from mmcontrast.search.table import StoredTable
from mmcontrast.training.log import make_progress

SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("key", pa.string()),
        ("keep", pa.bool_()),
        ("reason", pa.string()),
        ("duplicate_of", pa.int64()),
        ("similarity", pa.float32()),
        ("cluster", pa.int64()),
    ]
)
REASON = "near duplicate"
TILE = 4096  # rows that are multiplied with as many others
CLUSTER = 1000  # rows of a cluster, about, where no number is given
MAPPED = 2**30  # bytes that are read at random before their pages are released
EPSILONS = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)  # for which the number that is dropped is reported
KEPT = 2**18  # rows whose comparison is kept together
SHOWN = 24  # pairs on the page
COMPARED = "compared"


def drop_near_duplicates(
    table: Path,
    out: Path,
    field: str,
    epsilon: float = 0.05,
    clusters: int | None = None,
    best: str | None = None,
    seed: int = 0,
    iterations: int = 20,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a selection without near duplicates, and return the counts, which are also in the file's metadata and beside it.
    The blocks that a killed run has finished are kept beside `out`, and not done again.

    Args:
        out: a Parquet file with a row a sample, in the table's order: `sample_id`, `key`, `keep`, `reason`, `duplicate_of` (the
            sample_id of the most similar of those before it; it may be dropped itself, for another), `similarity` with the most
            similar before it (of samples that stay too, so that another ε can be judged), `cluster`. Samples that lack the
            field stay.
        epsilon: ε.
        clusters: of k-means; default: so many that a cluster has about 1,000 samples.
        best: of the table's metadata, the number by which the order of a cluster is made, the largest first, those without one
            last; default: the farthest from the centroid first, as in the paper.

    Raises:
        UserError: for a table that is damaged or lacks the field, a file that exists, an ε that is none, blocks that a run
            with other options has left.
    """
    if not 0 < epsilon < 2:
        raise UserError(
            f"--epsilon {epsilon}: samples are dropped whose similarity is more than 1 − ε: it is above 0 and below 2"
        )
    check_out(out)
    stored = open_stored(table, {"--field": field})
    ids, present = ids_of_table(stored), stored.present(field)
    clusters = clusters or max(1, round(len(present) / CLUSTER))
    values = None if best is None else _numbers(stored, best)
    check_clusters(stored, field, clusters)
    options = {"field": field, "clusters": clusters, "best": best, "seed": seed, "iterations": iterations}
    blocks = Blocks(out, stored, options)  # without ε: the comparison does not depend on it
    duplicates, similarities = np.full(len(ids), -1, dtype=np.int64), np.full(len(ids), np.nan)
    cluster_of = np.full(len(ids), -1, dtype=np.int64)
    with make_progress(progress) as bar, parquet_file(out, SCHEMA) as writer:
        task = bar.add_task(f"{clusters} clusters of {field}", total=None, note="")
        clustering = kmeans(stored, field, clusters, seed, iterations, blocks)
        bar.remove_task(task)
        cluster_of[clustering.rows] = clustering.clusters
        task = bar.add_task("comparing within clusters", total=len(present), note="")
        for number, batch in enumerate(_batches(_order_clusters(clustering, ids, values))):
            if not blocks.has(COMPARED, number):
                blocks.write(COMPARED, number, _compare_block(stored, field, batch))
            part, _ = blocks.read(COMPARED, number)
            rows = np.concatenate(batch)
            duplicates[rows], similarities[rows] = part["earlier"].to_numpy(), part["similarity"].to_numpy()
            bar.advance(task, len(rows))
        dropped = similarities > 1 - epsilon  # of NaN: stays
        start = 0
        for part in stored.columns("key"):
            span = slice(start, start := start + len(part))
            is_dropped, part_clusters = dropped[span], cluster_of[span]
            part_similarities = similarities[span]
            columns = [
                pa.array(ids[span]),
                part["key"],
                pa.array(~is_dropped),
                pa.array(np.where(is_dropped, REASON, ""), pa.string(), mask=~is_dropped),
                pa.array(ids[duplicates[span]], mask=~is_dropped),
                pa.array(part_similarities.astype(np.float32), mask=np.isnan(part_similarities)),
                pa.array(part_clusters, mask=part_clusters < 0),
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA))
        stored.check_unchanged()
        options = {"field": field, "epsilon": epsilon} | options
        summary = _summary(stored, options, dropped, similarities, len(present), clustering)
        finish(out, writer, summary, _sections(stored, summary, dropped, duplicates, similarities))
    blocks.remove()
    return summary


def _batches(clusters: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yield clusters, so many at a time that they have about `KEPT` rows."""
    batch: list[np.ndarray] = []
    number = 0
    for rows in clusters:
        batch.append(rows)
        number += len(rows)
        if number >= KEPT:
            yield batch
            batch, number = [], 0
    if batch:
        yield batch


def _compare_block(stored: StoredTable, field: str, clusters: list[np.ndarray]) -> pa.Table:
    """Return `earlier` and `similarity`, as `nearest_before`, of the rows of some clusters."""
    results, read_bytes = [], 0
    for rows in clusters:
        results.append(nearest_before(lambda batch: stored.vectors(field, batch, check=False), rows))
        read_bytes += 4 * stored.dim * len(rows)
        if read_bytes > MAPPED:
            stored.release()
            read_bytes = 0
    stored.release()
    earlier, similarity = zip(*results, strict=True)
    return pa.table({"earlier": np.concatenate(earlier), "similarity": np.concatenate(similarity)})


def nearest_before(read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of n rows the most similar of those before it, int64 [n], and the similarity, float64 [n]; −1 and NaN for
    the first.

    Args:
        read: the vectors, float32 [R, D], of R rows.
    """
    earlier, similarity = np.full(len(rows), -1, dtype=np.int64), np.full(len(rows), np.nan)
    for start in range(0, len(rows), TILE):
        later = read(rows[start : start + TILE])
        best, best_place = torch.full((len(later),), -torch.inf), torch.full((len(later),), -1)
        for first in range(0, start + len(later), TILE):
            is_own_tile = first == start
            scores = torch.from_numpy(later if is_own_tile else read(rows[first : first + TILE])) @ torch.from_numpy(later).T
            if is_own_tile:
                scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).tril_(), -torch.inf)
            value, tile_place = scores.max(0)
            better = value > best
            best, best_place = torch.where(better, value, best), torch.where(better, tile_place + first, best_place)
        has_earlier = np.flatnonzero(best_place.numpy() >= 0)
        earlier_rows = rows[best_place.numpy()[has_earlier]]
        earlier[start + has_earlier] = earlier_rows
        exact = np.einsum("nd,nd->n", later[has_earlier].astype(np.float64), read(earlier_rows).astype(np.float64))
        similarity[start + has_earlier] = exact
    return earlier, similarity


def _order_clusters(clustering: Clustering, ids: np.ndarray, values: np.ndarray | None) -> list[np.ndarray]:
    """Return the rows of each cluster, in the order in which they may stay."""
    keys = [ids[clustering.rows], clustering.similarities]  # the last one counts first
    if values is not None:
        numbers = values[clustering.rows]
        keys += [np.where(np.isnan(numbers), 0.0, -numbers), np.isnan(numbers)]
    order = np.lexsort((*keys, clustering.clusters))
    ends = np.cumsum(np.bincount(clustering.clusters))
    return [part for part in np.split(clustering.rows[order], ends[:-1]) if len(part)]


def _numbers(table: StoredTable, name: str) -> np.ndarray:
    """Return a number of every row's metadata, float64 [N], NaN where there is none.

    Raises:
        UserError: if no row has it.
    """
    numbers: list[float] = []
    for part in table.columns("metadata"):
        for text in part["metadata"].to_pylist():
            number = number_of(json.loads(text).get(name))
            numbers.append(np.nan if number is None else number)
    values = np.array(numbers)
    if np.isnan(values).all():
        raise UserError(f"--best {name}: no sample of {table.folder} has a number of this name in its metadata")
    return values


def _summary(
    table: StoredTable,
    options: dict[str, Any],
    dropped: np.ndarray,
    similarities: np.ndarray,
    present: int,
    clustering: Clustering,
) -> dict[str, Any]:
    return {
        "stage": "dedup-near",
        "table": about_table(table),
        "options": options,
        "samples": len(dropped),
        "kept": int((~dropped).sum()),
        "dropped": int(dropped.sum()),
        "without_field": len(dropped) - present,
        "largest_cluster": int(np.bincount(clustering.clusters).max()),
        "dropped_at_epsilon": {str(epsilon): int((similarities > 1 - epsilon).sum()) for epsilon in EPSILONS},
    }


def _sections(
    table: StoredTable, summary: dict[str, Any], dropped: np.ndarray, duplicates: np.ndarray, similarities: np.ndarray
) -> list[str]:
    counts = {name.replace("_", " "): value for name, value in summary.items() if isinstance(value, int)}
    counts |= {f"dropped at ε = {epsilon}": number for epsilon, number in summary["dropped_at_epsilon"].items()}
    options = {name: value for name, value in summary["options"].items() if value is not None}
    rows = np.flatnonzero(dropped)
    rows = rows[np.argsort(similarities[rows], kind="stable")]  # the least similar first: those to look at
    shown = [
        f'<div class="row">{sample_cell(table, int(row), f"dropped, {similarities[row]:.4f}", "query")}'
        f"{sample_cell(table, int(duplicates[row]), 'before it')}</div>"
        for row in rows[spread(SHOWN, len(rows))]
    ]
    heading = "<h2>Dropped samples, the least similar first, and the most similar before each</h2>"
    return [counts_table("Options", options), counts_table("Counts", counts), heading, *shown]
