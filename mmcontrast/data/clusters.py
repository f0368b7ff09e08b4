"""Orders samples into batches within clusters: similar samples are each other's hard negatives."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.ids import id_of
from mmcontrast.data.mixture import MixtureDataset
from mmcontrast.data.order import WholeEpochs
from mmcontrast.data.row_ids import refuse_other_rows
from mmcontrast.data.tables import open_table
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError


@dataclass(frozen=True)
class ClusterOrder(WholeEpochs):
    """Every step's samples are of one cluster.

    An epoch permutes each cluster's samples and cuts them into batches; what is left of the clusters, one after the other in
    a random order, makes further batches of a few clusters each. The batches come in a random order, each sample once, but for
    fewer than a batch. Samples are read one by one, wherever they are, not in blocks.

    Attributes:
        clusters: [N] int64, of each sample by position, from 0 on.
    """

    clusters: np.ndarray = field(compare=False, repr=False)

    @property
    def samples(self) -> int:
        return len(self.clusters)

    def make_epoch(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        size, clusters = self.batch_size, self.clusters
        cluster_order = random.permutation(int(clusters.max()) + 1)[clusters]  # clusters in a random order
        shuffled = random.permutation(len(clusters))
        stream = shuffled[np.argsort(cluster_order[shuffled], kind="stable")]
        _, first, count = np.unique(cluster_order[stream], return_index=True, return_counts=True)
        within = np.arange(len(stream)) - np.repeat(first, count)
        in_whole_batch = within < np.repeat(count // size * size, count)
        stream = np.concatenate([stream[in_whole_batch], stream[~in_whole_batch]])
        steps = stream[: self.steps_per_epoch * size].reshape(-1, size)
        return steps[random.permutation(len(steps))]


def clusters_of(dataset: ShardDataset | MixtureDataset, table: str) -> tuple[np.ndarray, str]:
    """Return (the cluster of every sample [N], digest of the table), from a Parquet or CSV file with the columns `cluster` and
    `key` or `sample_id`.

    Raises:
        UserError: if a sample is not in the table.
    """
    if not Path(table).is_file():
        raise UserError(f"data.clusters: no file {table}")
    index = open_table(table)
    if "cluster" not in index.extensions or not {"key", "sample_id"} & set(index.extensions):
        columns = ", ".join(index.extensions)
        raise UserError(f"data.clusters: {table} needs the columns 'cluster' and 'key' or 'sample_id'; it has {columns}")
    by = "sample_id" if "sample_id" in index.extensions else "key"
    if by == "sample_id":
        refuse_other_rows(table, dataset.shards, "data.clusters")
    column = index.table["cluster"]
    if column.null_count:
        raise UserError(f"data.clusters: {table} has {column.null_count} rows without a cluster")
    _, numbers = np.unique(np.asarray(column.to_pylist()), return_inverse=True)
    cluster_of: dict[Any, int] = {}
    for row, (name, cluster) in enumerate(zip(index.table[by].to_pylist(), numbers.tolist(), strict=True)):
        try:
            name = str(name) if by == "key" else id_of(by, name, -1)
        except DecodeError as error:
            raise UserError(f"data.clusters: {table}, row {row}: {error}") from error
        if cluster_of.setdefault(name, cluster) != cluster:
            raise UserError(f"data.clusters: {table}, row {row}: the {by} {name!r} is in another cluster already")
    names: Iterable[Any] = map(dataset.key, range(len(dataset))) if by == "key" else dataset.sample_ids().tolist()
    clusters, seen = np.empty(len(dataset), dtype=np.int64), set()
    for position, name in enumerate(names):
        if (cluster := cluster_of.get(name)) is None:
            raise UserError(f"data.clusters: {table} has no cluster for the sample with {by}={name!r}; every sample needs one")
        if name in seen and by == "key":
            raise UserError(f"data.clusters: several samples have the key {name!r}: name them by sample_id in {table}")
        seen.add(name)
        clusters[position] = cluster
    return clusters, index.digest
