"""Orders samples into batches within clusters: similar samples are each other's hard negatives."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.ids import id_of
from mmcontrast.data.mixture import MixtureDataset
from mmcontrast.data.order import check_lanes, recent, share_of
from mmcontrast.data.row_ids import refuse_other_rows
from mmcontrast.data.tables import open_table
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError


@dataclass(frozen=True)
class ClusterOrder:
    """Every step's samples are of one cluster; a pure function of (seed, epoch), as every order.

    An epoch permutes each cluster's samples and cuts them into batches; what is left of the clusters, one after the other in
    a random order, makes further batches of a few clusters each. The batches come in a random order, each sample once, but for
    fewer than a batch. Samples are read one by one, wherever they are, not in blocks.

    Attributes:
        batch_size: of all ranks together. lanes: the number of ranks must divide it.
        data: digest of the shards. table: of the clusters.
        clusters: [N] int64, of each sample by position, from 0 on.
    """

    batch_size: int
    seed: int
    lanes: int
    data: str
    table: str
    clusters: np.ndarray = field(compare=False, repr=False)
    epochs: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_lanes(self.lanes, self.batch_size)
        if self.steps_per_epoch < 1:
            raise UserError(
                f"the training data has {len(self.clusters)} samples, fewer than train.batch_size={self.batch_size}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.clusters) // self.batch_size

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one."""
        return {attribute.name: getattr(self, attribute.name) for attribute in fields(self) if attribute.compare}

    def places(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """Return (epoch, position) of each sample of one rank at a global step."""
        epoch, step = divmod(step, self.steps_per_epoch)
        steps = recent(self.epochs, epoch, lambda number: _epoch(self, number))
        share = share_of(self.batch_size, self.lanes, rank, world_size)
        return [(epoch, position) for position in steps[step, share].tolist()]


def _epoch(order: ClusterOrder, epoch: int) -> np.ndarray:
    """Return the positions of an epoch's batches, [steps, batch]."""
    random = np.random.Generator(np.random.PCG64([order.seed, epoch]))
    size, clusters = order.batch_size, order.clusters
    cluster_order = random.permutation(int(clusters.max()) + 1)[clusters]  # clusters in a random order
    shuffled = random.permutation(len(clusters))
    stream = shuffled[np.argsort(cluster_order[shuffled], kind="stable")]
    _, first, count = np.unique(cluster_order[stream], return_index=True, return_counts=True)
    within = np.arange(len(stream)) - np.repeat(first, count)
    in_whole_batch = within < np.repeat(count // size * size, count)
    steps = np.concatenate([stream[in_whole_batch], stream[~in_whole_batch]])[: order.steps_per_epoch * size].reshape(-1, size)
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
