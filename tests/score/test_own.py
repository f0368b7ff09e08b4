"""Candidates of each anchor alone: the reductions of N × K scores, as of candidates that all share."""

import torch

from mmcontrast.score import LogSumExp, Maximum, SoftplusSum, Sum, own_statistics, score_statistics
from tests.objectives.textbook import unit

REDUCTIONS = [
    LogSumExp(),
    LogSumExp(exponent=0.5),
    LogSumExp(over="all"),
    LogSumExp(over="positives"),
    Sum(),
    SoftplusSum(),
    Maximum(),
]


def test_each_anchor_alone_with_its_candidates():
    x, own = unit(5, 6, seed=0), unit(5, 3, 6, seed=1)
    there = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    got = own_statistics(x, own, there, REDUCTIONS, scale=torch.tensor(7.0).double(), bias=-1.0)
    assert got.num_negatives.tolist() == [3, 2, 0, 2, 3]
    for i in range(5):
        want, _ = score_statistics(
            x[i : i + 1], own[i][there[i]], REDUCTIONS, scale=7.0, bias=-1.0, paired=False, columns=False, backend="dense"
        )
        for reduction in REDUCTIONS:
            torch.testing.assert_close(got[reduction][i : i + 1], want[reduction], rtol=1e-12, atol=1e-12)


def test_an_anchor_without_candidates_has_no_gradient():
    x, own = unit(2, 4, seed=0).requires_grad_(), unit(2, 3, 4, seed=1).requires_grad_()
    got = own_statistics(x, own, torch.tensor([[False] * 3, [True] * 3]), [LogSumExp()], scale=torch.tensor(5.0).double())
    got[LogSumExp()][1].backward()
    assert x.grad.isfinite().all() and not x.grad[0].any() and not own.grad[0].any() and own.grad[1].any()
