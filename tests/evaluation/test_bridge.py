"""Scores through a bank against the dense form in float64, written out."""

import pytest
import torch
import torch.nn.functional as F

from mmcontrast.evaluation import bridge
from mmcontrast.evaluation.bridge import Bridge, mean_rows
from mmcontrast.evaluation.rankings import Pairs, rank


def unit(n, d, seed, dtype=torch.float64):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1).to(dtype)


def dense(queries, candidates, bank_q, bank_c, scale_q, scale_c):
    """One pair at a time."""
    out = torch.zeros(len(queries), len(candidates), dtype=torch.float64)
    for i, q in enumerate(queries):
        p = torch.softmax(torch.tensor([scale_q * float(q @ b) for b in bank_q], dtype=torch.float64), 0)
        for j, c in enumerate(candidates):
            r = torch.softmax(torch.tensor([scale_c * float(c @ b) for b in bank_c], dtype=torch.float64), 0)
            out[i, j] = sum((x * y).sqrt() for x, y in zip(p, r, strict=True))
    return out


@pytest.fixture(params=[2**23, 40], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(bridge, "WEIGHTS", request.param)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (100.0, 20.0)])
def test_scores_are_the_dense_form_of_two_models(scales, blocks):
    queries, candidates, banks = unit(7, 6, 0), unit(9, 4, 1), (unit(23, 6, 2), unit(23, 4, 3))
    found = Bridge(*banks, *scales).scores(queries, candidates)
    want = dense(queries, candidates, *banks, *scales)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)
    single = Bridge(*banks, *scales).scores(queries.float(), candidates.float())
    assert single.dtype == torch.float32 and (single - want).abs().max() < 2e-5


def test_expected_rows_are_means_of_the_candidates_bank(blocks):
    queries, bank_q, bank_c = unit(5, 6, 0), unit(23, 6, 2), unit(23, 4, 3)
    p = torch.softmax(10.0 * queries @ bank_q.T, 1)
    torch.testing.assert_close(Bridge(bank_q, bank_c, 10.0, 30.0).expected(queries), F.normalize(p @ bank_c, dim=1))
    rows = unit(5, 4, 4)
    r = torch.softmax(30.0 * rows @ bank_c.T, 1)
    found = Bridge(bank_q, bank_c, 10.0, 30.0).expected(rows, candidates=True)
    torch.testing.assert_close(found, F.normalize(r @ bank_c, dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ranks_by_a_bridge_both_ways(dtype):
    """In fp32 two candidates that are nearer than its rounding may change places."""
    queries, candidates, bank = unit(40, 8, 0, dtype), unit(60, 8, 1, dtype), unit(30, 8, 2, dtype)
    groups = torch.randint(20, (40,), generator=torch.Generator().manual_seed(0)), torch.arange(60) % 20
    pairs = Pairs.of_groups(*groups)
    made = Bridge(bank, bank, 15.0, 15.0)
    scores = made.scores(queries, candidates)
    there, back = rank(queries, candidates, pairs, both=True, bridge=made)
    for ranking, of, wanted in ((there, scores, groups), (back, scores.T, groups[::-1])):
        for query in ranking.queries.unique().tolist():
            relevant = wanted[1] == wanted[0][query]
            order = of[query].argsort(descending=True)
            want = relevant[order].nonzero().squeeze(1) + 1
            found = ranking.ranks[ranking.queries == query]
            assert torch.equal(found, want) if dtype == torch.float64 else (found - want).abs().max() <= 1


def test_equal_rows_are_tied_and_count_against_the_query():
    row, bank = unit(1, 8, 0, torch.float32), unit(30, 8, 2, torch.float32)
    pairs = Pairs.of_groups(torch.tensor([0]), torch.arange(50))
    (ranking,) = rank(row, row.repeat(50, 1), pairs, bridge=Bridge(bank, bank, 50.0, 50.0))
    assert ranking.ranks.tolist() == [50]


def test_an_entry_a_group():
    rows = unit(4, 3, 0)
    found = mean_rows(rows, torch.tensor([7, 2, 7, 9]))
    torch.testing.assert_close(found, torch.stack([rows[1], F.normalize(rows[0] + rows[2], dim=0), rows[3]]))


def test_what_cannot_be_a_bank():
    with pytest.raises(ValueError, match="same entries"):
        Bridge(unit(3, 4, 0), unit(4, 4, 0), 1.0, 1.0)
    with pytest.raises(ValueError, match="one entry"):
        Bridge(unit(0, 4, 0), unit(0, 4, 0), 1.0, 1.0)
    with pytest.raises(ValueError, match="more than 0"):
        Bridge(unit(3, 4, 0), unit(3, 4, 0), 0.0, 1.0)
