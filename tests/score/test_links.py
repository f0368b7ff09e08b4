"""Hyperbolic distances: against geometry that is known, and where a formula would break."""

import pytest
import torch

from mmcontrast.score import LogSumExp, Lorentz, score_statistics
from tests.objectives.textbook import unit


def distance(v, w, curvature):
    lorentz = Lorentz(curvature)
    return -lorentz.value((lorentz.rows(v, columns=False) * lorentz.rows(w, columns=True)).sum(-1))


@pytest.mark.parametrize("curvature", [0.1, 1.0, 3.0])
def test_distances_along_a_line_through_the_origin_are_lengths_of_tangents(curvature):
    direction = unit(5, 4, seed=0)
    got = distance(0.7 * direction, -1.9 * direction, curvature)
    torch.testing.assert_close(got, torch.full((5,), 2.6, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_it_is_a_metric_and_flat_where_curvature_vanishes():
    a, b, c = (1.5 * unit(200, 3, seed=k) * torch.rand(200, 1, dtype=torch.float64) for k in range(3))
    torch.testing.assert_close(distance(a, b, 1.0), distance(b, a, 1.0))
    assert (distance(a, b, 1.0) <= distance(a, c, 1.0) + distance(c, b, 1.0) + 1e-12).all()
    torch.testing.assert_close(distance(a, b, 1e-8), (a - b).norm(dim=1), rtol=1e-5, atol=1e-5)


def test_slopes_are_those_of_the_value():
    product, c = torch.linspace(-9.0, -1.6, 40, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    leaves = [product.requires_grad_(), c.requires_grad_()]
    value = Lorentz(leaves[1]).value(leaves[0])
    by_product, by_c = Lorentz(c).slopes(product)
    want = torch.autograd.grad(value.sum(), leaves)
    torch.testing.assert_close(by_product, want[0])
    torch.testing.assert_close(by_c.sum(), want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_points_meet_nothing_is_infinite(dtype):
    x = unit(6, 4, seed=0, dtype=dtype).requires_grad_()
    c = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    rows, _ = score_statistics(x, x.detach().clone(), [LogSumExp(over="all")], scale=10.0, link=Lorentz(c))
    (rows.positives.sum() + rows[LogSumExp(over="all")].sum()).backward()
    assert x.grad.isfinite().all() and c.grad.isfinite()
    zero = Lorentz().rows(torch.zeros(2, 3, dtype=dtype, requires_grad=True), columns=False)
    zero.sum().backward()


def test_a_curvature_is_a_number_above_0():
    for wrong in (0.0, -1.0, float("inf"), float("nan"), torch.ones(2)):
        with pytest.raises(ValueError, match="curvature is .*, it must be one number above 0"):
            Lorentz(wrong)
    Lorentz(torch.ones((), device="meta"))  # of a learnt one, nobody asks a device for the value


def test_what_is_far_stays_finite():
    far = (1e4 * unit(6, 4, seed=0, dtype=torch.float32)).requires_grad_()
    scores = Lorentz(10.0).scores(far, far.detach().flip(0))
    scores.sum().backward()
    assert scores.isfinite().all() and far.grad.isfinite().all() and scores.min() < -3
