"""The loss inside of somebody's autocast, and of scales that are Python's numbers: the same bits as without."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from mmcontrast import contrastive_loss, score_statistics
from mmcontrast.components import build
from mmcontrast.objectives import OBJECTIVES, PAIRINGS
from mmcontrast.score import LogSumExp, SoftplusSum

FIELDS, N, D = "abc", 9, 24
IDS = torch.tensor([0, 1, 2, 3, 3, 5, -1, 7, 8])


def rows(seed, dtype=torch.float32, n=N):
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1).to(dtype)


def bits(loss_of, leaves, forward, backward):
    """[loss, gradients …] with autocast of some dtype, or of none, around the forward and around the backward."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", forward, enabled=forward is not None):
        loss = loss_of(*leaves)
        if backward is forward:
            loss.backward()
    if backward is not forward:
        with torch.autocast("cpu", backward, enabled=backward is not None):
            loss.backward()
    return [loss.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def pairings():
    yield from ("all_pairs", {"type": "anchor", "field": "b"})
    yield from ({"type": "multilinear", "negatives": kind} for kind in ("n", "n_squared"))


def test_every_pairing_is_here():
    assert {p if isinstance(p, str) else p["type"] for p in pairings()} == set(PAIRINGS)


def refused(objective, pairing):
    """What makes no sense: positives or teachers of random products."""
    name = pairing if isinstance(pairing, str) else pairing["type"]
    return name == "multilinear" and (
        objective == "distillation" or (objective in ("multi_positive", "hybrid") and pairing["negatives"] == "n")
    )


CASES = [(o, p) for o in OBJECTIVES for p in pairings() if not refused(o, p)]


@pytest.mark.parametrize(("objective", "pairing"), CASES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_autocast_changes_no_bit_of_the_loss_or_its_gradients(objective, pairing, backend):
    extra, signals = rows(9, n=4), {}

    def loss_of(a, b, c, scale, bias, extra):
        torch.manual_seed(0)  # of the random products
        return contrastive_loss(
            dict(zip(FIELDS, (a, b, c), strict=True)),
            objective=build(objective, OBJECTIVES, "objective"),  # anew: one remembers
            pairing=pairing,
            logit_scale=scale,
            logit_bias=bias,
            ids=IDS,
            sample_ids=torch.arange(N),
            extra_negatives=None if "multilinear" in str(pairing) or objective == "distillation" else {"b": extra},
            teacher=dict(zip(FIELDS, map(rows, range(5, 8)), strict=True)) if objective == "distillation" else None,
            teacher_scale=3.0,
            backend=backend,
            signals=signals,
        )

    leaves = [*map(rows, range(3)), torch.tensor(100.0), torch.tensor(-0.3), extra]
    want, seen = bits(loss_of, leaves, None, None), dict(signals)
    assert want[0].dtype == torch.float32 and all(gradient.any() for gradient in want[1:4])
    for dtype in (torch.bfloat16, torch.float16):
        for backward in (dtype, None):
            got = bits(loss_of, leaves, dtype, backward)
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True)), (dtype, backward)
            assert seen.keys() == signals.keys() and all(torch.equal(signals[name], seen[name]) for name in seen)


@pytest.mark.parametrize("per_anchor", [False, True])
def test_autocast_changes_no_bit_of_the_statistics(per_anchor):
    def loss_of(x, y, scale):
        column = scale.flip(0) if per_anchor else None
        there, back = score_statistics(x, y, [LogSumExp(), SoftplusSum()], scale=scale, column_scale=column, bias=-1.0)
        return sum((d.positives * 3 + d[LogSumExp()] + d[SoftplusSum()]).sum() for d in (there, back))

    leaves = [rows(0), rows(1), torch.full((N,), 100.0) if per_anchor else torch.tensor(100.0)]
    want = bits(loss_of, leaves, None, None)
    for backward in (torch.bfloat16, None):
        assert all(map(torch.equal, bits(loss_of, leaves, torch.bfloat16, backward), want))


def test_it_stays_open_clips_exact_loss_where_open_clips_own_loss_is_rounded():
    """As our documentation puts it into open_clip's trainer: features of fp32, inside of its autocast."""
    x, y, scale = rows(0, n=64), rows(1, n=64), torch.tensor(100.0)
    y = F.normalize(x + 3 * y, dim=1)
    exact = open_clip.loss.ClipLoss()(x.double(), y.double(), scale.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours = contrastive_loss({"image": x, "text": y}, logit_scale=scale)
        theirs = open_clip.loss.ClipLoss()(x, y, scale)
    assert (ours - exact).abs() < 1e-4 < 1e-3 < (theirs - exact).abs()


@pytest.mark.parametrize("number", [float, np.float64, lambda v: torch.tensor(v, dtype=torch.float64), np.asarray])
def test_numbers_are_not_rounded_for_rows_of_float64(number):
    x, y = rows(0, torch.float64), rows(1, torch.float64)
    z = 14.3 * x @ y.T - 10.1
    want = (F.cross_entropy(z, torch.arange(N)) + F.cross_entropy(z.T, torch.arange(N))) / 2
    given = {"logit_scale": number(14.3), "logit_bias": number(-10.1)}
    for scales in (given, {name: {("b", "a"): value} for name, value in given.items()}):
        got = contrastive_loss({"a": x, "b": y}, **scales)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    there, _ = score_statistics(x, y, [LogSumExp(over="all")], scale=number(14.3), bias=number(-10.1))
    torch.testing.assert_close(there[LogSumExp(over="all")], z.logsumexp(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(there.positives, z.diagonal(), rtol=1e-14, atol=0)


def test_whole_numbers_are_scales_too():
    x, y = rows(0, torch.float64), rows(1, torch.float64)
    for scale in (20, np.int64(20), torch.tensor(20)):
        torch.testing.assert_close(
            contrastive_loss({"a": x, "b": y}, logit_scale=scale), contrastive_loss({"a": x, "b": y}, logit_scale=20.0)
        )
