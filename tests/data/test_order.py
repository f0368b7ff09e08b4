"""The order: every sample once an epoch, the same for any number of ranks, a function of the step alone."""

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
