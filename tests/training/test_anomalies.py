"""Warnings while training: what leaps and what sticks is told of, ordinary noise and learning are not."""

import random

import pytest

from mmcontrast.training.anomalies import Anomalies


def warnings_of(losses, scales=None, max_scale=100.0):
    watch = Anomalies(max_scale)
    scales = scales or [14.0] * len(losses)
    pairs = enumerate(zip(losses, scales, strict=True))
    return {step: list(found) for step, (loss, scale) in pairs if (found := list(watch.see(step, loss, scale)))}


@pytest.mark.parametrize("seed", range(5))
def test_a_leap_is_told_of_and_learning_is_not(seed):
    chooser = random.Random(seed)
    losses = [3 + 5 * 0.99**k + chooser.gauss(0, 0.1) for k in range(2000)]
    assert not warnings_of(losses)
    losses[1200] += 2
    found = warnings_of(losses)
    assert list(found) == [1200] and "the loss of step 1200 is" in found[1200][0]


def test_a_level_that_stays_is_told_of_a_few_times_only():
    losses = [3 + 0.01 * (k % 7) for k in range(500)] + [6 + 0.01 * (k % 7) for k in range(500)]
    assert 1 <= len(warnings_of(losses)) < 10 and min(warnings_of(losses)) == 500


def test_scales_at_their_bounds():
    steady = [2.0] * 1000
    collapsed = warnings_of(steady, [14.0] * 500 + [1.0] * 500)
    assert list(collapsed) == [699] and "collapsed to 1.00" in collapsed[699][0]
    high = warnings_of(steady, [99.95] * 150 + [90.0] + [100.0] * 849)
    assert list(high) == [350] and "at its bound, model.max_logit_scale=100" in high[350][0]
