"""The batches of a run that was interrupted, and went on with other ranks and workers, are those of one left alone."""

import hashlib
import io
import itertools
from functools import partial

import numpy as np
import pytest
from PIL import Image

from mmcontrast.data import (
    ClusterOrder,
    MixtureDataset,
    MixtureOrder,
    NeighbourOrder,
    SampleOrder,
    ShardDataset,
    training_batches,
    write_shard,
)
from mmcontrast.data.neighbours import Neighbours
from mmcontrast.modalities import ImageModality, TextModality

SIZES = (60, 6, 33, 17)  # ten to one, among them
BATCH = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Noisy pictures, of which two are no pictures."""
    folder, generator = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    number = itertools.count()
    for shard, size in enumerate(SIZES):
        samples = []
        for _ in range(size):
            target, k = io.BytesIO(), next(number)
            Image.fromarray(generator.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(target, "PNG")
            data = b"no picture" if k in (5, 80) else target.getvalue()
            samples.append({"__key__": f"k{k:03d}", "png": data, "txt": f"number {k}", "json": {"sample_id": k, "group_id": k}})
        write_shard(folder / f"{shard}.tar", samples)
    return str(folder / "*.tar")


def run_of(shards, kind="plain"):
    modalities = {
        "image": ImageModality(8, augment=[{"type": "RandomCrop", "size": 8}]),
        "text": TextModality(context_length=8),
    }

    def ordered(shards, by=None):
        dataset = ShardDataset(shards, modalities, {}, seed=4, training=True)
        lengths = partial(dataset.lengths, by) if by else None
        sizes = tuple(map(len, dataset.shards))
        return dataset, SampleOrder(sizes, BATCH, 4, 4, 5, 20, dataset.digest, by, lengths)

    dataset, order = ordered(shards, "image" if kind == "buckets" else None)
    if kind == "clusters":
        clusters = np.arange(len(dataset)) * 7 % 3
        return dataset, ClusterOrder(BATCH, 4, 4, dataset.digest, "", clusters)
    if kind == "neighbours":
        rows = (7 * np.arange(len(dataset))[:, None] + np.arange(10)) % len(dataset)
        neighbours = Neighbours("", np.arange(0, 10 * len(dataset) + 1, 10), rows.ravel())
        return dataset, NeighbourOrder(BATCH, 4, 4, dataset.digest, "", 10, 4, 0.5, neighbours)
    if kind in ("mixed", "single"):
        sources = {name: ordered(shards.replace("*", name)) for name in ("[03]", "[12]")}
        mixture = MixtureDataset({name: dataset for name, (dataset, _) in sources.items()}, modalities)
        return mixture, MixtureOrder(tuple(order for _, order in sources.values()), (0.3, 0.7), kind)
    return dataset, order


def global_batches(shards, steps, world_size, num_workers, kind="plain"):
    """(sample ids, hash of all pixels and tokens, what was replaced) of every step, put together from all ranks."""
    dataset, order = run_of(shards, kind)
    ranks = [
        training_batches(dataset, order, steps, rank=r, world_size=world_size, num_workers=num_workers, pin_memory=False)
        for r in range(world_size)
    ]
    for parts in zip(*ranks, strict=True):
        ids = [int(i) for part in parts for i in part.sample_ids]
        pixels = b"".join(part.values["image"].numpy().tobytes() for part in parts)
        tokens = [row[row > 0].tolist() for part in parts for row in part.values["text"]]
        replaced = [bad["error"] for part in parts for bad in part.replaced]
        yield ids, hashlib.sha256(pixels + repr(tokens).encode()).hexdigest(), replaced


@pytest.fixture(scope="module")
def uninterrupted(shards):
    _, order = run_of(shards)
    return list(global_batches(shards, range(3 * order.steps_per_epoch), 1, 0))


def test_each_sample_once_an_epoch(shards, uninterrupted):
    """But for the dropped tail, other ones each epoch; those that cannot be decoded have others in their place."""
    _, order = run_of(shards)
    total, left_out = sum(SIZES), []
    for epoch in range(3):
        batches = uninterrupted[epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch]
        ids = [i for batch, _, _ in batches for i in batch]
        replaced = sum(len(errors) for _, _, errors in batches)
        assert len(ids) - len(set(ids)) <= replaced and not {5, 80} & set(ids)
        assert total - len(ids) < order.lanes + order.batch_size
        left_out.append(set(range(total)) - set(ids))
    assert len(set(map(frozenset, left_out))) == 3
    assert sum(len(errors) for _, _, errors in uninterrupted) >= 4


@pytest.mark.parametrize(
    "first",
    [0, 1, 2, 7, *(pytest.param(first, marks=pytest.mark.slow) for first in (3, 4, 5, 6, 8))],  # each setting is in the four
)
def test_interrupted_twice_in_an_epoch_and_once_across_its_end(shards, uninterrupted, first):
    """World sizes 1, 2, 4 × workers 0, 2, 3, another of them after every interruption."""
    settings = list(itertools.product((1, 2, 4), (0, 2, 3)))
    _, order = run_of(shards)
    stops = [0, 3, 6, order.steps_per_epoch + 1, 2 * order.steps_per_epoch + 2]
    for part, (start, stop) in enumerate(itertools.pairwise(stops)):
        world_size, num_workers = settings[(first + 4 * part) % 9]
        assert list(global_batches(shards, range(start, stop), world_size, num_workers)) == uninterrupted[start:stop]


@pytest.mark.parametrize("kind", ["mixed", "single", "clusters", "neighbours", "buckets"])
def test_so_are_those_of_every_other_order(shards, kind):
    """Interrupted three times, with other ranks and workers each time."""
    whole = list(global_batches(shards, range(24), 1, 0, kind))
    for start, stop, world_size, num_workers in ((0, 4, 2, 2), (4, 11, 4, 0), (11, 19, 1, 3), (19, 24, 4, 2)):
        assert list(global_batches(shards, range(start, stop), world_size, num_workers, kind)) == whole[start:stop]
    assert sum(len(replaced) for _, _, replaced in whole) >= 2
