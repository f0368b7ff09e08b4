"""Percentile intervals: against scipy's, against resamples that are written out, and how often they hold the truth."""

import numpy as np
import pytest
import scipy.stats
import torch

from mmcontrast.evaluation import bootstrap
from mmcontrast.evaluation.bootstrap import Estimate, intervals, mean_interval, quantile_interval, weights


def test_the_interval_of_a_mean_is_scipys():
    values = torch.randn(200, 3, dtype=torch.float64).exp()
    low, high = mean_interval(values, resamples=4000)
    for column in range(3):
        theirs = scipy.stats.bootstrap(
            (values[:, column].numpy(),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        width = theirs.high - theirs.low
        assert abs(low[column] - theirs.low) < 0.1 * width and abs(high[column] - theirs.high) < 0.1 * width


def test_statistics_are_those_of_the_resamples_written_out(monkeypatch):
    monkeypatch.setattr(bootstrap, "BLOCK", 150)  # several blocks
    values = torch.randn(37, 2, dtype=torch.float64)
    counts = torch.cat(list(weights(37, None, 50, 5))).long()
    assert counts.shape == (50, 37) and (counts.sum(1) == 37).all()
    drawn = torch.stack([values.repeat_interleave(row, dim=0) for row in counts])
    tails = torch.tensor([0.05, 0.95], dtype=torch.float64)
    for (low, high), each in [
        (mean_interval(values, 50, 5, level=0.9), drawn.mean(1)),
        (quantile_interval(values, 0.5, 50, 5, level=0.9), drawn.quantile(0.5, dim=1)),
        (quantile_interval(values, 0.9, 50, 5, level=0.9), drawn.quantile(0.9, dim=1)),
    ]:
        torch.testing.assert_close(torch.stack([low, high]), each.quantile(tails, dim=0))


def test_estimates_are_resampled_together():
    x = torch.randn(60, dtype=torch.float64)
    mean, other = Estimate.of_mean(x), Estimate.of_mean(-x)
    low, high = intervals([mean, other], seed=3)
    assert mean.value == pytest.approx(x.mean().item())
    torch.testing.assert_close(torch.stack([low[0], high[0]]), -torch.stack([high[1], low[1]]))
    torch.testing.assert_close(torch.stack([low[:1], high[:1]]), torch.stack(mean_interval(x[:, None], seed=3)))
    with pytest.raises(ValueError, match="estimates over \\[59, 60\\] samples"):
        intervals([mean, Estimate.of_mean(x[1:])])


def test_samples_of_a_cluster_are_drawn_together():
    values, clusters = torch.randn(50, 2, dtype=torch.float64), torch.randperm(10**6)[:50]
    once = torch.stack(mean_interval(values))
    fourfold = torch.stack(mean_interval(values.repeat(4, 1), clusters=clusters.repeat(4)))
    order = clusters.argsort()  # clusters are numbered in their order
    torch.testing.assert_close(fourfold, torch.stack(mean_interval(values[order])))
    naive = torch.stack(mean_interval(values.repeat(4, 1)))
    assert ((once[1] - once[0]) > 1.6 * (naive[1] - naive[0])).all()
    low, high = quantile_interval(values.repeat(4, 1), clusters=clusters.repeat(4))
    assert (low <= values.median(0).values).all() and (values.median(0).values <= high).all()


@pytest.mark.parametrize(("interval", "truth"), [(mean_interval, 1.0), (quantile_interval, float(np.log(2)))])
def test_they_hold_the_truth_as_often_as_they_say(interval, truth):
    sets = -torch.rand(60, 1000, dtype=torch.float64).log()  # 1000 data sets of 60 exponential values
    low, high = interval(sets, resamples=500)
    assert 0.90 <= ((low <= truth) & (truth <= high)).double().mean() <= 0.98


def test_clustered_data_keep_their_coverage():
    covered = []
    for _ in range(400):
        values = (torch.randn(40, 1) + 0.5 * torch.randn(40, 5)).flatten()[:, None]
        low, high = mean_interval(values, 300, clusters=torch.arange(40).repeat_interleave(5))
        covered.append(bool(low <= 0 <= high))
    assert 0.88 <= np.mean(covered) <= 0.99


def test_no_sample_has_no_interval():
    assert all(bound.isnan().all() for bound in mean_interval(torch.empty(0, 2)))
    assert np.isnan(Estimate.of_mean(torch.empty(0)).value)
