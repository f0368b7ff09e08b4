"""The order: every sample once an epoch, the same for any number of ranks, a function of the step alone."""

import itertools
import tracemalloc

import numpy as np
import pytest

from mmcontrast.data import SampleOrder
from mmcontrast.errors import UserError

ORDER = SampleOrder((100, 37, 64, 5), batch_size=16, seed=3, lanes=8, block=10, window=12)


def test_every_sample_once_an_epoch_but_for_a_stated_tail():
    epochs = []
    for epoch in range(2):
        seen = np.concatenate([ORDER.batch(epoch * ORDER.steps_per_epoch + s)[1] for s in range(ORDER.steps_per_epoch)])
        assert len(seen) == len(set(seen)) == ORDER.steps_per_epoch * 16
        assert 206 - len(seen) < ORDER.lanes + ORDER.batch_size
        assert set(seen) <= set(range(206))
        epochs.append(seen.tolist())
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_same_global_batch(world_size):
    for step in (0, 5, ORDER.steps_per_epoch + 2):
        whole = ORDER.batch(step)[1].tolist()
        parts = [ORDER.batch(step, rank, world_size)[1].tolist() for rank in range(world_size)]
        assert [sample for part in parts for sample in part] == whole
        assert {len(part) for part in parts} == {16 // world_size}


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="3 ranks cannot share"):
        ORDER.batch(0, 0, 3)
    with pytest.raises(UserError, match="must divide train.batch_size=10"):
        SampleOrder((100,), 10, 0, 4, 8, 8)
    with pytest.raises(UserError, match="20 samples, fewer than train.batch_size=64"):
        SampleOrder((20,), 64, 0, 8, 8, 8)


def written_out(order, epoch):
    """[lanes, lane_length] positions of an epoch, as the module's first lines describe them."""
    starts, blocks = np.concatenate([[0], np.cumsum(order.shard_sizes)]), []
    for start, end in itertools.pairwise(starts):
        blocks += [np.arange(first, min(first + order.block, end)) for first in range(start, end, order.block)]
    generator = np.random.Generator(np.random.PCG64([order.seed, epoch]))
    stream = np.concatenate([blocks[k] for k in generator.permutation(len(blocks))])
    lanes = stream[: order.lanes * order.lane_length].reshape(order.lanes, -1)
    for lane, samples in enumerate(lanes):
        for number, start in enumerate(range(0, order.lane_length, order.window)):
            generator = np.random.Generator(np.random.PCG64([order.seed, epoch, lane, number]))
            generator.shuffle(samples[start : start + order.window])
    return lanes


@pytest.mark.parametrize("sizes", [(100, 37, 64, 5), (1000, 100, 10, 1), (0, 206, 0)])
def test_the_order_is_what_it_says_it_is(sizes):
    """Steps taken at random, so that no window is at hand by luck."""
    order = SampleOrder(sizes, batch_size=16, seed=3, lanes=4, block=10, window=6)
    for epoch in (1, 0, 7):
        lanes = written_out(order, epoch)
        for step in np.random.default_rng(epoch).permutation(order.steps_per_epoch):
            found_epoch, positions = order.batch(epoch * order.steps_per_epoch + int(step))
            assert found_epoch == epoch
            assert positions.tolist() == lanes[:, step * 4 : (step + 1) * 4].flatten().tolist()


def test_a_thousand_million_samples_take_little_memory():
    order = SampleOrder((10_000,) * 100_000, batch_size=65_536, seed=0, lanes=64, block=256, window=8192)
    tracemalloc.start()
    for step in (0, 1, order.steps_per_epoch - 1):
        epoch, positions = order.batch(step)
        assert epoch == 0 and len(set(positions.tolist())) == 65_536 and positions.max() < 10**9
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400 * 2**20
