"""The primitive against a float64 form written out with plain loops over sets: values and every gradient."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcontrast.score import LogSumExp, Maximum, SoftplusSum, Sum, score_statistics
from mmcontrast.score.backends import SameGroup

REDUCTIONS = [
    kind(*arguments, over=over)
    for over in ("negatives", "positives", "all")
    for kind, arguments in [
        (LogSumExp, ()),
        (LogSumExp, (0.5,)),
        (LogSumExp, (0.0,)),
        (SoftplusSum, ()),
        (Sum, ()),
        (Maximum, ()),
    ]
]


def textbook(reduction, scores, same):
    """One anchor at a time: scores [m], same [m] bool."""
    chosen = {"negatives": ~same, "positives": same, "all": torch.ones_like(same)}[reduction.over]
    z = scores[chosen]
    if isinstance(reduction, LogSumExp):
        return torch.logsumexp(reduction.exponent * z, 0) if len(z) else z.new_tensor(-torch.inf)
    if isinstance(reduction, SoftplusSum):
        return torch.logaddexp(z, torch.zeros_like(z)).sum()
    if isinstance(reduction, Sum):
        return z.sum()
    return z.max().detach() if len(z) else z.new_tensor(-torch.inf)


def problem(n, d, seed, groups=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1) for _ in "xy")
    ids = torch.arange(n) if groups is None else torch.randint(groups, (n,), generator=generator)
    return x.to(dtype), y.to(dtype), ids


def finite_sum(values, seed):
    """A generic scalar of the finite entries: each weighted by its own random number."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for value in values:
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        total = total + (torch.where(value.isfinite(), value, 0.0) * weight).sum()
    return total


def run(function, leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    values = function(*leaves)
    grads = torch.autograd.grad(finite_sum(values, 0), leaves, allow_unused=True, materialize_grads=True)
    return [value.detach() for value in values], grads


def expected(reductions, ids, x, y, row_scale, column_scale, bias):
    dots, same = x @ y.T, ids[:, None] == ids
    out = []
    for s, scale in ((dots, row_scale), (dots.T, column_scale)):
        z = s * scale.reshape(-1, 1) + bias
        out.append(z.diagonal())
        out.extend(torch.stack([textbook(r, row, members) for row, members in zip(z, same, strict=True)]) for r in reductions)
    return out


def ours(reductions, ids, backend, tile, x, y, row_scale, column_scale, bias):
    options = {"column_scale": column_scale} if row_scale.dim() else {}
    directions = score_statistics(
        x, y, reductions, scale=row_scale, bias=bias, ids=ids, backend=backend, tile_size=tile, **options
    )
    return [value for d in directions for value in (d.positives, *(d[r] for r in reductions))]


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("per_anchor", [False, True], ids=["scalar", "per_anchor"])
def test_every_reduction_matches_the_textbook(reduction, backend, per_anchor):
    for n, groups, scale in [(1, None, 1.0), (7, None, 100.0), (13, 4, 20.0), (5, 1, 3.0)]:
        x, y, ids = problem(n, 5, n, groups)
        shape = (n,) if per_anchor else ()
        scales = [torch.full(shape, scale, dtype=torch.float64) * (1 + k / 10) for k in range(2)]
        bias = torch.tensor(-0.3, dtype=torch.float64)
        if not per_anchor:
            scales[1] = scales[0]
        leaves = [x, y, *(scales if per_anchor else scales[:1]), bias]

        def oracle(x, y, *rest, ids=ids):
            *s, b = rest
            return expected([reduction], ids, x, y, s[0], s[-1], b)

        def tiled(x, y, *rest, ids=ids):
            *s, b = rest
            return ours([reduction], ids, backend, 4, x, y, s[0], s[-1], b)

        (want, want_grads), (got, got_grads) = run(oracle, leaves), run(tiled, leaves)
        for a, b in itertools.chain(zip(want, got, strict=True), zip(want_grads, got_grads, strict=True)):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@given(
    n=st.integers(1, 70),
    d=st.integers(1, 9),
    groups=st.one_of(st.none(), st.integers(1, 40)),
    scale=st.sampled_from([1.0, 30.0, 100.0]),
    tile=st.integers(3, 40),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_shared_exponentials_are_exact_in_any_shape(n, d, groups, scale, tile, seed):
    x, y, ids = problem(n, d, seed, groups)
    leaves = [x, y, torch.tensor(scale, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)]
    want = run(lambda x, y, s, b: expected([LogSumExp()], ids, x, y, s, s, b), leaves)
    got = run(lambda x, y, s, b: ours([LogSumExp()], ids, "torch", tile, x, y, s, s, b), leaves)
    for a, b in itertools.chain(*(zip(w, g, strict=True) for w, g in zip(want, got, strict=True))):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_low_precision_is_no_worse_than_dense(dtype, scale, seed):
    """Against float64 on the same rounded inputs: the tiled error is at most that of the textbook form
    computed in that dtype, plus a quarter of its rounding step (in fp32: 1e-5) of the range."""
    x, y, ids = problem(67, 33, seed, 20, dtype)
    leaves = [x, y, torch.tensor(scale), torch.tensor(0.0)]
    exact = run(lambda x, y, s, b: expected([LogSumExp()], ids, x, y, s, s, b), [leaf.double() for leaf in leaves])
    dense = run(lambda x, y, s, b: expected([LogSumExp()], ids, x, y, s, s, b), leaves)
    tiled = run(lambda x, y, s, b: ours([LogSumExp()], ids, "torch", 16, x, y, s, s, b), leaves)
    for want, reference, got in zip(itertools.chain(*exact), itertools.chain(*dense), itertools.chain(*tiled), strict=True):
        allowed = (reference.double() - want).abs().max() + max(1e-5, torch.finfo(dtype).eps / 4) * max(1.0, want.abs().max())
        assert (got.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("margin", [-100.0, 100.0])
def test_margins_far_beyond_the_range_of_exponentials(margin):
    """Positives 100 above or below every negative: the range check must fall back, and gradients stay exact."""
    x = torch.eye(6, dtype=torch.float64)
    y = x if margin > 0 else torch.roll(x, 1, 0)
    leaves = [x, y, torch.tensor(100.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)]
    ids = torch.arange(6)
    want = run(lambda x, y, s, b: expected([LogSumExp()], ids, x, y, s, s, b), leaves)
    got = run(lambda x, y, s, b: ours([LogSumExp()], ids, "torch", 4, x, y, s, s, b), leaves)
    for a, b in itertools.chain(*(zip(w, g, strict=True) for w, g in zip(want, got, strict=True))):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_large_groups_are_compared_tile_by_tile_and_small_ones_listed():
    many = SameGroup(torch.zeros(400, dtype=torch.int64), torch.zeros(400, dtype=torch.int64))
    few = SameGroup(torch.arange(400), torch.arange(400))
    assert isinstance(many.tile(slice(0, 100), slice(0, 100)), torch.Tensor)
    assert few.tile(slice(0, 100), slice(100, 200)) is None
    rows, columns = few.tile(slice(0, 100), slice(50, 150))
    assert rows.tolist() == list(range(50, 100)) and columns.tolist() == list(range(50))
    assert many.row_counts.tolist() == [400] * 400 and few.column_counts.tolist() == [1] * 400


def test_a_rectangle_of_rows_alone():
    x, _, _ = problem(5, 4, 0)
    y, _, _ = problem(9, 4, 1)
    row_ids, column_ids = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 0, 7, 8, 9, 10, 11, 1, -2])
    d, none = score_statistics(
        x, y, [LogSumExp()], scale=10.0, ids=row_ids, column_ids=column_ids, paired=False, columns=False, tile_size=2
    )
    assert none is None and d.num_negatives.tolist() == [7, 8, 9, 9, 9]
    z = (10 * x @ y.T).masked_fill(row_ids[:, None] == column_ids, -torch.inf)
    torch.testing.assert_close(d[LogSumExp()], z.logsumexp(1), rtol=1e-12, atol=0)


def test_what_does_not_fit_is_refused():
    x, y, _ = problem(4, 3, 0)
    with pytest.raises(ValueError, match="matched pairs"):
        score_statistics(x, y[:3], [LogSumExp()], scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        score_statistics(x, y.float(), [LogSumExp()], scale=1.0)
    with pytest.raises(ValueError, match="unknown backend 'tirton'"):
        score_statistics(x, y, [LogSumExp()], scale=1.0, backend="tirton")
    with pytest.raises(ValueError, match="column_scale"):
        score_statistics(x, y, [LogSumExp()], scale=torch.ones(4))
