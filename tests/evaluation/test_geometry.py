"""Measures of the space against their definitions written out, and their intervals against resamples that are computed anew."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from mmcontrast.evaluation.bootstrap import intervals
from mmcontrast.evaluation.geometry import alignment, effective_rank, hubness, modality_gap, uniformity


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def pairs(number=80, dim=6):
    x = F.normalize(torch.randn(number, dim, dtype=torch.float64) * torch.linspace(1, 0.1, dim) + 0.2, dim=1)
    return x, F.normalize(x + 0.4 * torch.randn_like(x) - 0.3, dim=1)


def rank_of(rows):
    shares = torch.linalg.svdvals(rows)
    shares = shares / shares.sum()
    return math.exp(-sum(p * math.log(p) for p in shares.tolist() if p > 1e-12))


def test_values_are_the_definitions():
    x, y = pairs()
    assert alignment(x, y).value == pytest.approx(np.mean([float((a - b).norm()) ** 2 for a, b in zip(x, y, strict=True)]))
    assert modality_gap(x, y).value == pytest.approx(float((x.mean(0) - y.mean(0)).norm()))
    assert effective_rank(x).value == pytest.approx(rank_of(x))
    assert effective_rank(x, centred=True).value == pytest.approx(rank_of(x - x.mean(0)))
    everyone = [math.exp(-2 * float((x[i] - x[j]).norm()) ** 2) for i in range(80) for j in range(80) if i != j]
    assert uniformity(x).value == pytest.approx(math.log(np.mean(everyone)))


def test_values_at_the_ends():
    same = unit(1, 5).repeat(9, 1)
    assert uniformity(same).value == pytest.approx(0, abs=1e-9) and math.isnan(uniformity(same[:1]).value)
    assert alignment(same, same).value == modality_gap(same, same).value == 0
    assert modality_gap(same, -same).value == pytest.approx(2)
    assert effective_rank(same).value == pytest.approx(1)
    assert effective_rank(torch.eye(7)).value == pytest.approx(7)
    assert math.isnan(effective_rank(same[:0]).value) and math.isnan(alignment(same[:0], same[:0]).value)


def test_hubs_are_counted():
    rows = F.normalize(torch.randn(120, 30, dtype=torch.float64) + 0.5, dim=1)
    rows[0] = 30**-0.5  # near to all
    scores = (rows @ rows.T).fill_diagonal_(-2)
    occurrences = np.bincount(scores.topk(10).indices.flatten().numpy(), minlength=120)
    skewness, antihubs = hubness(rows, rows, exclude=torch.arange(120))
    assert skewness.value == pytest.approx(scipy.stats.skew(occurrences)) and skewness.value > 2
    assert antihubs.value == pytest.approx(np.mean(occurrences == 0))
    low, high = intervals([skewness, antihubs])
    counts = np.random.default_rng(0).choice(occurrences, (2000, 120))
    theirs = np.quantile(scipy.stats.skew(counts, axis=1), [0.025, 0.975])
    assert [low[0].item(), high[0].item()] == pytest.approx(theirs.tolist(), abs=0.15 * (theirs[1] - theirs[0]))


def uniformity_of(x, drawn):
    """Return the uniformity of drawn rows, without the pairs of a row with itself, which are no pairs of different rows."""
    times = drawn.bincount(minlength=len(x)).double()
    kernel = (-4 + 4 * x @ x.T).exp().fill_diagonal_(0)
    return float((times @ kernel @ times / (times.sum() ** 2 - times.square().sum())).log())


torch.manual_seed(0)  # of what is drawn while pytest collects
X, Y = pairs(400)
MEASURES = {  # the estimate, and the same of drawn rows
    "alignment": (alignment(X, Y), lambda drawn: alignment(X[drawn], Y[drawn]).value),
    "modality gap": (modality_gap(X, Y), lambda drawn: modality_gap(X[drawn], Y[drawn]).value),
    "uniformity": (uniformity(X), lambda drawn: uniformity_of(X, drawn)),
    "effective rank": (effective_rank(X), lambda drawn: effective_rank(X[drawn]).value),
    "centred": (effective_rank(X, centred=True), lambda drawn: effective_rank(X[drawn], centred=True).value),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_intervals_are_those_of_measures_computed_anew(measure):
    estimate, of_rows = MEASURES[measure]
    anew = np.quantile([of_rows(torch.randint(400, (400,))) for _ in range(800)], [0.025, 0.975])
    (low,), (high,) = intervals([estimate])
    assert [low.item(), high.item()] == pytest.approx(anew.tolist(), abs=0.25 * (anew[1] - anew[0]))
    assert low < estimate.value < high


@pytest.mark.parametrize(("measure", "number", "many"), [(uniformity, 150, 2500), (effective_rank, 2000, 10_000)])
def test_intervals_hold_the_truth(measure, number, many):
    spread = torch.linspace(1, 0.2, 8, dtype=torch.float64)

    def draw(number):
        return F.normalize(torch.randn(number, 8, dtype=torch.float64) * spread, dim=1)

    truth = np.mean([measure(draw(many)).value for _ in range(50_000 // many)])
    bounds = [intervals([measure(draw(number))], resamples=300) for _ in range(300)]
    assert 0.88 <= np.mean([bool(low <= truth <= high) for low, high in bounds]) < 1
