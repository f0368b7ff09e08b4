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


def bucketed(batch_size=16, window=50, lanes=4, seed=3, sizes=(400, 137, 64, 5)):
    lengths = np.random.default_rng(1).integers(1, 1000, sum(sizes))
    order = SampleOrder(sizes, batch_size, seed, lanes, 10, window, "", "text", lambda positions: lengths[positions])
    return order, lengths


def test_steps_of_samples_about_as_long():
    """Each sample once an epoch, the same for any number of ranks, and a step's longest near its shortest; the left-out are
    not the longest."""
    order, lengths = bucketed()
    plain = SampleOrder(order.shard_sizes, 16, 3, 4, 10, 50)
    spread, plain_spread, left_out = [], [], []
    for epoch in range(3):
        seen = []
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            positions = order.batch(step)[1]
            parts = [order.batch(step, rank, 2)[1].tolist() for rank in range(2)]
            assert [p for part in parts for p in part] == positions.tolist()
            seen += positions.tolist()
            spread.append(np.ptp(lengths[positions]))
            plain_spread.append(np.ptp(lengths[plain.batch(step)[1]]))
        assert len(seen) == len(set(seen)) == order.steps_per_epoch * 16 > 606 - 20
        left_out += list(set(range(606)) - set(seen))
    assert np.mean(spread) < 0.45 * np.mean(plain_spread)
    assert lengths[left_out].mean() < 800
    means = [lengths[order.batch(step)[1]].mean() for step in range(12)]
    assert means != sorted(means), "short and long steps come in turn"
    assert order.state()["bucket_by"] == "text" and "lengths" not in order.state()
    other, _ = bucketed(seed=4)
    assert other.batch(0)[1].tolist() != order.batch(0)[1].tolist()


def test_a_window_smaller_than_a_step_is_a_step():
    order, _ = bucketed(batch_size=64, window=3)
    seen = np.concatenate([order.batch(step)[1] for step in range(order.steps_per_epoch)])
    assert len(set(seen)) == len(seen) == 64 * order.steps_per_epoch
