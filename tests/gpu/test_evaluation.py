"""Ranks, neighbours and scores on a GPU are those of the CPU."""

import pytest
import torch
import torch.nn.functional as F

from mmcontrast.evaluation.neighbours import nearest
from mmcontrast.evaluation.rankings import Pairs, rank
from mmcontrast.evaluation.scoring import ScoreCorrection

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_ranks_in_double_precision():
    queries, candidates = torch.randn(3000, 64, dtype=torch.float64), torch.randn(20_000, 64, dtype=torch.float64)
    pairs = Pairs.of_groups(torch.randint(900, (3000,)), torch.randint(900, (20_000,)))
    here = rank(queries, candidates, pairs, both=True)
    there = rank(queries, candidates, pairs, both=True, device="cuda")
    for ours, theirs in zip(there, here, strict=True):
        assert torch.equal(ours.queries, theirs.queries) and torch.equal(ours.ranks, theirs.ranks)


def test_equal_candidates_tie_on_a_gpu_too():
    rows = F.normalize(torch.randn(1, 100), dim=1).repeat(5000, 1)
    (found,) = rank(rows, rows, Pairs.of_groups(torch.arange(5000), torch.arange(5000)), device="cuda")
    assert found.ranks.tolist() == [5000] * 5000


@pytest.mark.parametrize("kind", ["csls", "inverted_softmax", "margin"])
def test_scores_that_make_up_for_hubs(kind):
    queries, candidates = (F.normalize(torch.randn(n, 32, dtype=torch.float64), dim=1) for n in (500, 700))
    pairs = Pairs.of_groups(torch.arange(500), torch.arange(700))
    (here,) = rank(queries, candidates, pairs, scoring=ScoreCorrection.of(kind, queries, candidates))
    on_gpu = ScoreCorrection.of(kind, queries.cuda(), candidates.cuda())
    (there,) = rank(queries, candidates, pairs, scoring=on_gpu, device="cuda")
    assert torch.equal(here.ranks, there.ranks)


def test_neighbours():
    queries, candidates = torch.randn(1000, 48, dtype=torch.float64), torch.randn(30_000, 48, dtype=torch.float64)
    (scores, indices), (expected, places) = nearest(queries.cuda(), candidates.cuda(), 10), nearest(queries, candidates, 10)
    assert torch.equal(indices.cpu(), places)
    torch.testing.assert_close(scores.cpu(), expected)
