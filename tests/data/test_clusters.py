"""Batches within clusters: one cluster a step, each sample once an epoch, the same for any number of ranks."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmcontrast.data import ClusterOrder, MixtureDataset, ShardDataset, clusters_of, training_batches, write_shard
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality

TEXT = {"text": TextModality(context_length=8)}
RANDOM = np.random.default_rng(0)
CLUSTERS = RANDOM.permutation(np.repeat(np.arange(6), (100, 3, 57, 8, 16, 29)))  # 213 samples


def order(batch_size=8, seed=1):
    return ClusterOrder(batch_size, seed, 4, "data", "table", CLUSTERS)


def test_a_step_is_of_one_cluster_and_an_epoch_of_all():
    of = order()
    epochs = []
    for epoch in range(3):
        steps = [of.places(epoch * of.steps_per_epoch + step) for step in range(of.steps_per_epoch)]
        assert all(e == epoch for step in steps for e, _ in step)
        seen = Counter(position for step in steps for _, position in step)
        assert set(seen.values()) == {1} and 213 - len(seen) < 8
        pure = sum(len({CLUSTERS[position] for _, position in step}) == 1 for step in steps)
        assert pure >= sum(size // 8 for size in (100, 3, 57, 8, 16, 29)) == 25 and len(steps) == 26
        epochs.append(steps)
    assert epochs[0] != epochs[1] and {p for s in epochs[0] for _, p in s} != {p for s in epochs[1] for _, p in s}
    assert [CLUSTERS[step[0][1]] for step in epochs[0]] != sorted(CLUSTERS[step[0][1]] for step in epochs[0])
    within = [[p for _, p in step] for step in epochs[0]]
    assert any(sorted(a) not in [sorted(b) for b in ([p for _, p in step] for step in epochs[1])] for a in within)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world_size):
    for step in (0, 7, 60):
        parts = [order().places(step, rank, world_size) for rank in range(world_size)]
        assert [place for part in parts for place in part] == order().places(step)
        assert {len(part) for part in parts} == {8 // world_size}
    with pytest.raises(UserError, match="3 ranks cannot share"):
        order().places(0, 0, 3)


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match="213 samples, fewer than train.batch_size=512"):
        order(512)


@pytest.fixture
def shards(tmp_path):
    samples = [
        {"__key__": f"k{k:02d}", "txt": f"number {k}", **({"json": {"sample_id": 100 + k}} if k != 7 else {})}
        for k in range(40)
    ]
    write_shard(tmp_path / "a.tar", samples[:25])
    write_shard(tmp_path / "b.tar", samples[25:])
    return str(tmp_path / "*.tar")


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_tables_by_key_and_by_sample_id(shards, tmp_path):
    """In any order, of more samples than there are, with names of clusters."""
    dataset = ShardDataset(shards, TEXT, {}, training=True)
    wanted = [k % 3 for k in range(40)]
    numbers = RANDOM.permutation(60)
    names = [f"cluster {k % 3}" for k in numbers]
    by_key = table(tmp_path / "k.parquet", key=[f"k{k:02d}" for k in numbers], cluster=names)
    by_id = table(
        tmp_path / "s.parquet", sample_id=[dataset.sample_id(7) if k == 7 else 100 + k for k in numbers], cluster=names
    )
    (tmp_path / "c.csv").write_text("key,cluster\n" + "\n".join(f"k{k:02d},{k % 3}" for k in numbers))
    for name in (by_key, by_id, str(tmp_path / "c.csv")):
        found, digest = clusters_of(dataset, name)
        assert found.tolist() == wanted and len(digest) == 16
    of = ClusterOrder(4, 0, 2, dataset.digest, digest, found)
    found = list(training_batches(dataset, of, range(10), rank=0, world_size=1, num_workers=2, pin_memory=False))
    assert sum(len({int(entry["key"][1:]) % 3 for entry in batch.metadata}) == 1 for batch in found) == 9, "14, 13 and 13 by 4"


def test_of_several_sources(shards, tmp_path):
    folder = shards.removesuffix("/*.tar")
    sources = {name: ShardDataset(f"{folder}/{name}.tar", TEXT, {}, training=True) for name in "ab"}
    mixture = MixtureDataset(sources, TEXT, ["b"])
    name = table(tmp_path / "k.parquet", key=[f"k{k:02d}" for k in range(40)], cluster=[k % 2 for k in range(40)])
    found, digest = clusters_of(mixture, name)
    assert found.tolist() == [k % 2 for k in range(40)]
    ids = table(tmp_path / "s.parquet", sample_id=[mixture.sample_id(k) for k in range(40)], cluster=[k % 2 for k in range(40)])
    assert clusters_of(mixture, ids)[0].tolist() == found.tolist() and mixture.sample_id(30) > 1000
    of = ClusterOrder(8, 0, 2, mixture.digest, digest, found)
    (batch, *_) = training_batches(mixture, of, range(5), rank=0, world_size=1, num_workers=0, pin_memory=False)
    assert {entry["source"] for entry in batch.metadata} <= {"a", "b"} and len(batch) == 8


def test_what_is_missing_is_named(shards, tmp_path):
    dataset = ShardDataset(shards, TEXT, {})
    short = table(tmp_path / "short.parquet", key=[f"k{k:02d}" for k in range(39)], cluster=[0] * 39)
    with pytest.raises(UserError, match="no cluster for the sample with key='k39'"):
        clusters_of(dataset, short)
    with pytest.raises(UserError, match="needs the columns 'cluster' and 'key' or 'sample_id'; it has a, cluster"):
        clusters_of(dataset, table(tmp_path / "other.parquet", a=[1], cluster=[1]))
    with pytest.raises(UserError, match="no file nowhere"):
        clusters_of(dataset, "nowhere.parquet")


def test_lanes_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(UserError, match="data.lanes=8 must divide train.batch_size=12"):
        ClusterOrder(12, 0, 8, "", "", CLUSTERS)
