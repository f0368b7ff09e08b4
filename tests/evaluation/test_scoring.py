"""Scores that make up for hubs against their formulas in float64, on data with hubs; whitening; ranks over languages."""

import pytest
import torch
import torch.nn.functional as F

from mmcontrast.errors import UserError
from mmcontrast.evaluation.consistency import mean_rank_variance
from mmcontrast.evaluation.scoring import ScoreCorrection
from mmcontrast.evaluation.whitening import whiten


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def dense(kind, cosines, k, beta):
    r_q = cosines.topk(min(k, cosines.shape[1]), dim=1).values.mean(1)[:, None]
    r_c = cosines.topk(min(k, cosines.shape[0]), dim=0).values.mean(0)
    return {
        "csls": 2 * cosines - r_q - r_c,
        "inverted_softmax": beta * cosines - (beta * cosines).exp().sum(0).log(),
        "margin": cosines / ((r_q + r_c) / 2),
    }[kind]


@pytest.mark.parametrize("kind", ["csls", "inverted_softmax", "margin"])
@pytest.mark.parametrize(("number", "k", "beta"), [(40, 10, 30.0), (6, 10, 3.0)])
def test_scores_are_the_formulas(kind, number, k, beta):
    queries, candidates = (F.normalize(torch.randn(n, 5, dtype=torch.float64) + 2, dim=1) for n in (number, 33))
    cosines = queries @ candidates.T
    scoring, expected = ScoreCorrection.of(kind, queries, candidates, k=k, beta=beta), dense(kind, cosines, k, beta)
    rows = torch.tensor([5, 0, 3])
    torch.testing.assert_close(scoring(cosines[rows, 4:20], rows, slice(4, 20)), expected[rows, 4:20])
    torch.testing.assert_close(scoring(cosines[1:4].clone(), slice(1, 4), slice(None)), expected[1:4])
    single = ScoreCorrection.of(kind, queries.float(), candidates.float(), k=k, beta=beta)
    found = single(cosines.float(), slice(None), slice(None))
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_they_find_more_where_there_are_hubs():
    samples = unit(400, 16)
    centre = F.normalize(torch.ones(16, dtype=torch.float64), dim=0)
    candidates = samples.clone()
    candidates[:20] = F.normalize(samples[:20] + 3 * centre, dim=1)
    queries = F.normalize(samples + 0.17 * torch.randn_like(samples) + 0.8 * centre, dim=1)  # all lean towards the hubs
    cosines = queries @ candidates.T

    def recall_and_antihubs(scores):
        best = scores.argmax(1)
        return (best == torch.arange(400)).double().mean().item(), (best.bincount(minlength=400) == 0).double().mean().item()

    recall, antihubs = recall_and_antihubs(cosines)
    for kind in ("csls", "inverted_softmax", "margin"):
        scores = ScoreCorrection.of(kind, queries, candidates)(cosines.clone(), slice(None), slice(None))
        better, fewer = recall_and_antihubs(scores)
        assert better > recall + 0.05 and fewer < 0.8 * antihubs, (kind, recall, better, antihubs, fewer)


def test_a_margin_without_a_positive_denominator_goes_by_the_cosine():
    queries = -unit(1, 4).repeat(5, 1)
    candidates = F.normalize(-queries + 0.1 * torch.randn_like(queries), dim=1)
    cosines = queries @ candidates.T
    scores = ScoreCorrection.of("margin", queries, candidates)(cosines.clone(), slice(None), slice(None))
    assert (cosines < 0).all() and torch.equal(scores.argsort(1), cosines.argsort(1)) and scores.isfinite().all()


def test_options_that_cannot_be():
    with pytest.raises(UserError, match="scoring 'cslss' is unknown; did you mean 'csls'"):
        ScoreCorrection.of("cslss", unit(3, 2), unit(3, 2))
    with pytest.raises(UserError, match="scoring csls: k = 0 and beta = 30.0 must be more than 0"):
        ScoreCorrection.of("csls", unit(3, 2), unit(3, 2), k=0)
    with pytest.raises(UserError, match="with 9 components and epsilon 0.001: it is pca or zca, with 1 to 4 components"):
        whiten(unit(30, 4), components=9)
    with pytest.raises(UserError, match="3 rows have no variance in some of 4 components: give fewer, or an epsilon"):
        whiten(unit(3, 4), epsilon=0)
    with pytest.raises(UserError, match="no variance"):
        whiten(torch.ones(5, 4))


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitened_rows_have_no_covariance(kind):
    turned = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    rows = torch.randn(500, 6, dtype=torch.float64) * torch.linspace(1, 5, 6) @ turned + 2
    whitening = whiten(rows, kind=kind, epsilon=0)
    plain = (rows - whitening.mean) @ whitening.matrix
    torch.testing.assert_close(plain.T.cov(correction=0), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(whitening(rows).norm(dim=1), torch.ones(500, dtype=torch.float64))
    if kind == "zca":
        torch.testing.assert_close(whitening.matrix, whitening.matrix.T)


def test_components_are_those_with_the_most_variance():
    rows = torch.randn(400, 4, dtype=torch.float64) * torch.tensor([1.0, 9.0, 0.1, 3.0])
    first, second = whiten(rows, components=2).matrix.T.abs()
    assert first.argmax() == 1 and second.argmax() == 3
    assert whiten(rows, components=2)(rows).shape == (400, 2)
    assert torch.linalg.matrix_rank(whiten(rows, kind="zca", components=2).matrix) == 2
    strong = whiten(rows.float(), epsilon=1e6)  # all the same weight: rows as they are, but for the mean and a rotation
    centred = F.normalize(rows.float() - rows.float().mean(0), dim=1)
    torch.testing.assert_close(strong(rows.float()) @ strong(rows.float()).T, centred @ centred.T, atol=1e-4, rtol=1e-4)


def test_the_variance_of_ranks_is_that_of_languages_of_a_sample():
    ranks = torch.tensor([[1, 1, 1], [1, 4, 1], [9, 0, 2]])
    assert mean_rank_variance(ranks).value == pytest.approx((0 + (1 + 4 + 1) / 3) / 2)
