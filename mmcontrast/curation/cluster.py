"""Clusters the samples of an embedding table, for `data.clusters` to draw batches within clusters."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmcontrast.curation.blocks import Blocks
from mmcontrast.curation.kmeans import check_clusters, kmeans
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
from mmcontrast.training.log import make_progress

SCHEMA = pa.schema([("sample_id", pa.int64()), ("key", pa.string()), ("cluster", pa.int64()), ("distance", pa.float32())])
NONE = -1  # the cluster of samples that lack the field
SHOWN, NEAREST = 24, 8  # clusters on the page, and of each the samples nearest to its centroid


def cluster(
    table: Path, out: Path, field: str, clusters: int, seed: int = 0, iterations: int = 20, progress: bool = True
) -> dict[str, Any]:
    """Cluster a table by spherical k-means, and return the counts, which are also in the file's metadata and beside it.

    Args:
        out: a Parquet file with a row a sample, in the table's order: `sample_id`, `key`, `cluster` from 0 on, and `distance`,
            1 − the cosine with the centroid. Samples that lack the field are cluster −1, without a distance.

    Raises:
        UserError: for a table that is damaged or lacks the field, a file that exists, more clusters than rows,
            blocks that a run with other options has left.
    """
    check_out(out)
    stored = open_stored(table, {"--field": field})
    ids = ids_of_table(stored)
    check_clusters(stored, field, clusters)
    options = {"field": field, "clusters": clusters, "seed": seed, "iterations": iterations}
    blocks = Blocks(out, stored, options)
    with make_progress(progress) as bar, parquet_file(out, SCHEMA) as writer:
        task = bar.add_task(f"{clusters} clusters of {field}", total=None, note="")
        clustering = kmeans(stored, field, clusters, seed, iterations, blocks)
        bar.remove_task(task)
        numbers, distances = np.full(len(ids), NONE, dtype=np.int64), np.full(len(ids), np.nan, dtype=np.float32)
        numbers[clustering.rows], distances[clustering.rows] = clustering.clusters, 1 - clustering.similarities
        start = 0
        for part in stored.columns("key"):
            rows = slice(start, start := start + len(part))
            distance = pa.array(distances[rows], mask=np.isnan(distances[rows]))
            writer.write_table(pa.table([ids[rows], part["key"], numbers[rows], distance], schema=SCHEMA))
        stored.check_unchanged()
        sizes = np.bincount(clustering.clusters, minlength=clusters)
        summary: dict[str, Any] = {
            "stage": "cluster",
            "table": about_table(stored),
            "options": options,
            "samples": len(ids),
            "without_field": len(ids) - len(clustering.rows),
            "empty_clusters": int((sizes == 0).sum()),
            "smallest": int(sizes.min()),
            "largest": int(sizes.max()),
            "median": float(np.median(sizes)),
            "mean_distance": float(1 - clustering.similarities.mean(dtype=np.float64)),
        }
        order = np.lexsort((-clustering.similarities, clustering.clusters))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        nearest_members = [order[starts[k] : starts[k + 1]][:NEAREST] for k in spread(SHOWN, clusters)]
        shown = [
            f'<div class="row"><div class="query">{sizes[clustering.clusters[members[0]]]:,} samples</div>'
            + "".join(
                sample_cell(stored, int(clustering.rows[member]), f"{clustering.similarities[member]:.3f}")
                for member in members
            )
            + "</div>"
            for members in nearest_members
            if len(members)
        ]
        counts = {name.replace("_", " "): value for name, value in summary.items() if isinstance(value, int | float)}
        tables = [counts_table("Options", summary["options"]), counts_table("Counts", counts)]
        finish(out, writer, summary, [*tables, "<h2>Clusters, and the samples nearest to their centroids</h2>", *shown])
    blocks.remove()
    return summary
