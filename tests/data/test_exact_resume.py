"""The batches of a run that was interrupted, and went on with other ranks and workers, are those of one left alone."""

import hashlib
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from mmcontrast.data import SampleOrder, ShardDataset, training_batches, write_shard
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


def run_of(shards):
    modalities = {
        "image": ImageModality(8, augment=[{"type": "RandomCrop", "size": 8}]),
        "text": TextModality(context_length=8),
    }
    dataset = ShardDataset(shards, modalities, {}, seed=4, training=True)
    order = SampleOrder(tuple(map(len, dataset.shards)), BATCH, 4, 4, 5, 20, dataset.digest)
    return dataset, order


def global_batches(shards, steps, world_size, num_workers):
    """(sample ids, hash of all pixels and tokens, what was replaced) of every step, put together from all ranks."""
    dataset, order = run_of(shards)
    ranks = [
        training_batches(dataset, order, steps, rank=r, world_size=world_size, num_workers=num_workers, pin_memory=False)
        for r in range(world_size)
    ]
    for parts in zip(*ranks, strict=True):
        ids = [int(i) for part in parts for i in part.sample_ids]
        pixels = b"".join(part.values["image"].numpy().tobytes() for part in parts)
        tokens = [row[row > 0].tolist() for part in parts for row in part.values["text"]]
        replaced = [error for part in parts for error in part.replaced]
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


@pytest.mark.parametrize("first", range(9))
def test_interrupted_twice_in_an_epoch_and_once_across_its_end(shards, uninterrupted, first):
    """World sizes 1, 2, 4 × workers 0, 2, 3, another of them after every interruption."""
    settings = list(itertools.product((1, 2, 4), (0, 2, 3)))
    _, order = run_of(shards)
    stops = [0, 3, 6, order.steps_per_epoch + 1, 2 * order.steps_per_epoch + 2]
    for part, (start, stop) in enumerate(itertools.pairwise(stops)):
        world_size, num_workers = settings[(first + 4 * part) % 9]
        assert list(global_batches(shards, range(start, stop), world_size, num_workers)) == uninterrupted[start:stop]
