"""Teachers' softmaxes, limits of anchors and links in tiles, against dense float64 forms: values and all gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mmcontrast.score import CrossSum, Limits, LogSumExp, Lorentz, SoftplusSum, Teacher, score_statistics
from tests.objectives.textbook import unit

N = 23
REDUCTIONS = [CrossSum(), LogSumExp(over="all"), LogSumExp(below=True), SoftplusSum(below=True)]
SCALES = (3.0, 7.0)  # of the two teachers


def textbook(x, y, scale, bias, curvature, teachers, ids, link, guided, margin):
    """[values of each reduction, of both directions]."""
    s = x @ y.T
    if link:
        (a, a_time), (b, b_time) = (Lorentz(curvature).lifted(rows) for rows in (x, y))
        s = -torch.acosh(-curvature * (a @ b.T - a_time @ b_time.T)) / curvature.sqrt()
    same, values = ids[:, None] == ids, []
    for turn in (lambda t: t, torch.t):
        z = turn(s) * (scale if scale.dim() == 0 else scale[:, None]) + bias
        p = torch.stack([torch.softmax(turn(k * u @ v.T), 1) for k, (u, v) in zip(SCALES, teachers, strict=True)]).mean(0)
        compared = turn(teachers[0][0] @ teachers[0][1].T) if guided else z.detach()
        dropped = same | (compared > compared.diagonal()[:, None] + margin)
        left = z.masked_fill(dropped, -torch.inf).logsumexp(1)
        values += [z.diagonal(), (p * z).sum(1), z.logsumexp(1), left, F.softplus(z).masked_fill(dropped, 0.0).sum(1)]
    return values


def weighted(values):
    """A scalar that has a gradient by every finite one, each its own."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(len(value), generator=generator, dtype=torch.float64) for value in values]
    return sum((torch.where(v.isfinite(), v, 0.0) * w).sum() for v, w in zip(values, weights, strict=True))


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize(("link", "guided", "per_anchor"), itertools.product([False, True], repeat=3))
def test_values_and_gradients_are_the_textbooks(link, guided, per_anchor, backend):
    x, y, ids = unit(N, 8, seed=0), unit(N, 8, seed=1), torch.randint(12, (N,), generator=torch.Generator().manual_seed(2))
    teachers = [(unit(N, 5, seed=k), unit(N, 5, seed=k + 1)) for k in (3, 5)]
    scale = 4.0 + unit(1, N, seed=9)[0].abs() if per_anchor else torch.tensor(5.0).double()
    leaves = [2.0 * x if link else x, y, scale, torch.tensor(-0.3).double(), torch.tensor(0.7).double()]
    leaves, margin = [leaf.requires_grad_() for leaf in leaves], 0.1 if guided else 0.5
    want = textbook(*leaves, teachers, ids, link, guided, margin)
    positives = (teachers[0][0] * teachers[0][1]).sum(1) if guided else want[0].detach()
    there, back = score_statistics(
        *leaves[:2],
        REDUCTIONS,
        scale=leaves[2],
        column_scale=leaves[2] if per_anchor else None,
        bias=leaves[3],
        ids=ids,
        backend=backend,
        tile_size=(8, 5),
        link=Lorentz(leaves[4]) if link else None,
        limits=Limits(positives + margin, positives + margin, Teacher(*teachers[0]) if guided else None),
        teachers=[Teacher(*rows, k) for k, rows in zip(SCALES, teachers, strict=True)],
    )
    got = [value for d in (there, back) for value in (d.positives, *(d[r] for r in REDUCTIONS))]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(weighted(v), leaves, allow_unused=True, materialize_grads=True) for v in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_low_precision_is_near(dtype, scale):
    x, y, u, v = (unit(300, 16, seed=k) for k in range(4))

    def losses(rows, backend):
        x, y = rows
        there, back = score_statistics(
            x, y, REDUCTIONS[:2], scale=scale, backend=backend, tile_size=64, teachers=[Teacher(u, v, 50.0)]
        )
        return torch.stack([d[LogSumExp(over="all")] - d[CrossSum()] for d in (there, back)])

    rounded = x.to(dtype), y.to(dtype)
    exact = losses([rows.double() for rows in rounded], "dense")
    near = losses(rounded, "torch")
    assert near.dtype == torch.float32
    last_place = torch.finfo(dtype).eps * scale  # of a score
    torch.testing.assert_close(near.double(), exact, rtol=1e-5, atol=(2 if dtype == torch.bfloat16 else 50) * last_place)


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("locked", ["x", "y", "both"])
def test_a_side_without_gradient_costs_no_product_and_changes_no_other(locked, backend, monkeypatch):
    """The scale's gradient is made of the side that is left, or of one product where none is."""
    x, y, scale = unit(30, 6, seed=0), unit(30, 6, seed=1), torch.tensor(9.0).double()
    want = gradients_of([x, y, scale], "", backend)
    products, mm = [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *a, **b: products.append(1) or mm(*a, **b))
    got = gradients_of([x, y, scale], locked, backend)
    assert [g is None for g in got] == [locked in ("x", "both"), locked in ("y", "both"), False]
    for a, b in zip(got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert len(products) == (16 if backend == "torch" else 0)  # of 4 × 4 tiles, not two each


def gradients_of(leaves, locked, backend):
    needs = [locked not in ("x", "both"), locked not in ("y", "both"), True]
    leaves = [leaf.clone().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
    there, back = score_statistics(*leaves[:2], [LogSumExp()], scale=leaves[2], backend=backend, tile_size=8)
    (there[LogSumExp()] - there.positives + 2.0 * back[LogSumExp()]).sum().backward()
    return [leaf.grad for leaf in leaves]


def test_mistakes_are_named():
    x, y = unit(4, 3, seed=0), unit(4, 3, seed=1)
    with pytest.raises(ValueError, match="CrossSum needs teachers"):
        score_statistics(x, y, [CrossSum()], scale=1.0)
    with pytest.raises(ValueError, match=r"a teacher's rows and columns must be \[4, E\] and \[4, E\], not \(3, 3\)"):
        score_statistics(x, y, [CrossSum()], scale=1.0, teachers=[Teacher(x[:3], y)])
    with pytest.raises(ValueError, match="reductions with below need limits"):
        score_statistics(x, y, [LogSumExp(below=True)], scale=1.0)
    with pytest.raises(ValueError, match=r"limits must be \[4\] of rows and, with columns, \[4\] of columns"):
        score_statistics(x, y, [LogSumExp(below=True)], scale=1.0, limits=Limits(x[:, 0]))


def test_kernels_refuse_by_name(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, y = (unit(4, 16, seed=k, dtype=torch.float32) for k in range(2))
    limits = Limits(x[:, 0], y[:, 0])
    for lacking, given, reduction in (
        ("link Lorentz", {"link": Lorentz()}, LogSumExp()),
        ("limits of anchors", {"limits": limits}, LogSumExp(below=True)),
        ("reduction CrossSum", {"teachers": [Teacher(x, y)]}, CrossSum()),
    ):
        with pytest.raises(ValueError, match=f"backend 'triton' has no {lacking}.*'torch' and 'dense' has"):
            score_statistics(x, y, [reduction], scale=1.0, backend="triton", **given)
