"""The primitive against a float64 form written out with plain loops over sets: values and every gradient.

Reduction × backend; drivers in tests/distributed. `dense` and `torch` in float64 to 1e-10; `triton`, whose kernels
know fp32 and less, in Triton's interpreter (on a GPU where there is one), by the error of the reference in that dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcontrast.score import LogSumExp, Maximum, Reduction, SoftplusSum, score_statistics
from mmcontrast.score.backends import BACKENDS, SameGroup
from tests.score.problems import DEVICE, REDUCTIONS, assert_exact, assert_no_worse, expected, ours, problem

SHAPES = [(1, None, 1.0), (7, None, 100.0), (13, 4, 20.0), (5, 1, 3.0)]  # (n, groups, scale): one group: no negatives


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("per_anchor", [False, True], ids=["scalar", "per_anchor"])
def test_every_reduction_matches_the_textbook(reduction, backend, per_anchor):
    for n, groups, scale in SHAPES:
        leaves, ids = problem(n, 5, n, groups, scale, per_anchor)
        assert_exact(ours([reduction], ids, backend=backend, tile_size=4), expected([reduction], ids), leaves)


@pytest.mark.parametrize("over", ["negatives", "positives", "all"])
@pytest.mark.parametrize(
    ("per_anchor", "dtype"),
    [
        pytest.param(False, torch.float16, id="scalar-float16"),
        pytest.param(True, torch.float32, id="per_anchor-float32"),
        pytest.param(False, torch.float32, id="scalar-float32", marks=pytest.mark.slow),
        pytest.param(True, torch.float16, id="per_anchor-float16", marks=pytest.mark.slow),
    ],
)
def test_every_reduction_matches_the_textbook_in_triton(over, per_anchor, dtype):
    """Those over the same scores together, the last time in several tiles; and each alone, as a kernel of its own."""
    reductions = [reduction for reduction in REDUCTIONS if reduction.over == over]
    together, alone = [*SHAPES, (141, 30, 10.0)], [(13, 4, 20.0)]
    for chosen, shapes in ((reductions, together), *(([reduction], alone) for reduction in reductions)):
        for n, groups, scale in shapes:
            leaves, ids = problem(n, 5, n, groups, scale, per_anchor, dtype=dtype, device=DEVICE)
            assert_no_worse(ours(chosen, ids, backend="triton"), expected(chosen, ids), leaves)


@given(
    n=st.integers(1, 70),
    d=st.integers(1, 9),
    groups=st.one_of(st.none(), st.integers(1, 40)),
    scale=st.sampled_from([1.0, 30.0, 100.0]),
    per_anchor=st.booleans(),
    tile=st.tuples(st.integers(3, 40), st.integers(3, 40)),
    seed=st.integers(0, 10**6),
    chosen=st.lists(st.sampled_from(REDUCTIONS), min_size=1, max_size=3, unique=True),
    backend=st.sampled_from(["dense", "torch"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_any_set_of_reductions(n, d, groups, scale, per_anchor, tile, seed, chosen, backend):
    leaves, ids = problem(n, d, seed, groups, scale, per_anchor)
    assert_exact(ours(chosen, ids, backend=backend, tile_size=tile), expected(chosen, ids), leaves)


@pytest.mark.parametrize("examples", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_any_shape_and_any_set_of_reductions_in_triton(examples):
    @given(
        n=st.integers(1, 150),
        d=st.integers(1, 70),
        groups=st.one_of(st.none(), st.integers(1, 60)),
        scale=st.sampled_from([1.0, 30.0, 100.0]),
        per_anchor=st.booleans(),
        tile=st.sampled_from([None, (64, 128)]),
        seed=st.integers(0, 10**6),
        chosen=st.lists(st.sampled_from(REDUCTIONS), min_size=1, max_size=3, unique=True),
        dtype=st.sampled_from([torch.float32, torch.float16]),
    )
    @settings(max_examples=examples, deadline=None)
    def check(n, d, groups, scale, per_anchor, tile, seed, chosen, dtype):
        leaves, ids = problem(n, d, seed, groups, scale, per_anchor, dtype=dtype, device=DEVICE)
        assert_no_worse(ours(chosen, ids, backend="triton", tile_size=tile), expected(chosen, ids), leaves)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("reduction", [LogSumExp(), SoftplusSum()], ids=str)
def test_low_precision_is_no_worse_than_dense(dtype, scale, reduction):
    for seed in range(5):
        leaves, ids = problem(67, 33, seed, 20, scale, bias=0.0, dtype=dtype)
        assert_no_worse(ours([reduction], ids, backend="torch", tile_size=16), expected([reduction], ids), leaves)


@pytest.mark.parametrize("native", [False, True])
def test_bf16_is_multiplied_where_the_cpu_has_instructions_for_it(native, monkeypatch):
    """Elsewhere in fp32; fp16 and fp32 always so. Both are no worse than the dense form in the same dtype."""
    monkeypatch.setattr("mmcontrast.score.backends.tiles.cpu_multiplies_bf16", lambda: native)
    multiplied, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: multiplied.add(a.dtype) or mm(a, b, **out))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        multiplied.clear()
        leaves, ids = problem(40, 33, 0, 20, 10.0, bias=0.0, dtype=dtype)
        assert_no_worse(ours([LogSumExp()], ids, backend="torch", tile_size=16), expected([LogSumExp()], ids), leaves)
        assert multiplied == {torch.bfloat16 if dtype == torch.bfloat16 and native else torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [-100.0, 100.0])
@pytest.mark.parametrize("reduction", [LogSumExp(), LogSumExp(0.5), SoftplusSum()], ids=str)
def test_margins_far_beyond_the_range_of_exponentials(margin, backend, reduction):
    """Positives 100 above or below every negative: shared exponentials must fall back, and gradients stay exact."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    device = DEVICE if backend == "triton" else "cpu"
    x = torch.eye(6, dtype=dtype, device=device)
    y = x if margin > 0 else torch.roll(x, 1, 0)
    leaves = [x, y, *(torch.tensor(v, dtype=dtype, device=device) for v in (100.0, 0.0))]
    ids = torch.arange(6, device=device)
    check = assert_no_worse if backend == "triton" else assert_exact
    check(ours([reduction], ids, backend=backend, tile_size=4), expected([reduction], ids), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_margins_that_differ_from_row_to_row(backend):
    """Some rows and columns of one tile lie 100 below others: no common shift fits both."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    leaves, ids = problem(9, 4, 0, None, 100.0, dtype=dtype, device=DEVICE if backend == "triton" else "cpu")
    leaves[0][:4] *= -1.0
    leaves[1].copy_(leaves[1][0].clone())
    check = assert_no_worse if backend == "triton" else assert_exact
    check(ours([LogSumExp()], ids, backend=backend), expected([LogSumExp()], ids), leaves)


def test_large_groups_are_compared_tile_by_tile_and_small_ones_listed():
    many = SameGroup(torch.zeros(400, dtype=torch.int64), torch.zeros(400, dtype=torch.int64))
    few = SameGroup(torch.arange(400), torch.arange(400))
    assert isinstance(many.tile(slice(0, 100), slice(0, 100)), torch.Tensor)
    assert few.tile(slice(0, 100), slice(100, 200)) is None
    rows, columns = few.tile(slice(0, 100), slice(50, 150))
    assert rows.tolist() == list(range(50, 100)) and columns.tolist() == list(range(50))
    assert many.row_counts.tolist() == [400] * 400 and few.column_counts.tolist() == [1] * 400


@pytest.mark.parametrize("per_anchor", [False, True], ids=["scalar", "per_anchor"])
def test_large_groups_match_the_textbook(per_anchor):
    leaves, ids = problem(40, 5, 0, 2, 10.0, per_anchor)
    assert isinstance(SameGroup(ids, ids).tile(slice(0, 20), slice(0, 20)), torch.Tensor)
    for over in ("negatives", "positives", "all"):
        reductions = [reduction for reduction in REDUCTIONS if reduction.over == over]
        assert_exact(ours(reductions, ids, backend="torch", tile_size=20), expected(reductions, ids), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rectangle_of_rows_alone(backend):
    dtype, device = (torch.float32, DEVICE) if backend == "triton" else (torch.float64, "cpu")
    x, y = (problem(n, 4, n, dtype=dtype, device=device)[0][0].requires_grad_() for n in (5, 9))
    row_ids, column_ids = (torch.tensor(v, device=device) for v in ([0, 1, 2, 3, 4], [0, 0, 7, 8, 9, 10, 11, 1, -2]))
    d, none = score_statistics(
        x, y, [LogSumExp()], scale=10.0, ids=row_ids, column_ids=column_ids, paired=False, columns=False,
        tile_size=2, backend=backend,
    )  # fmt: skip
    assert none is None and d.num_negatives.tolist() == [7, 8, 9, 9, 9]
    z = (10 * x @ y.T).masked_fill(row_ids[:, None] == column_ids, -torch.inf).logsumexp(1)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if backend == "triton" else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(d[LogSumExp()], z, **tolerance)
    grads = (torch.autograd.grad(v.sum(), (x, y)) for v in (d[LogSumExp()], z))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_what_does_not_fit_is_refused():
    (x, y, *_), _ = problem(4, 3, 0)
    with pytest.raises(ValueError, match="matched pairs"):
        score_statistics(x, y[:3], [LogSumExp()], scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        score_statistics(x, y.float(), [LogSumExp()], scale=1.0)
    with pytest.raises(ValueError, match="unknown backend 'tirton': there is auto, triton, torch, dense"):
        score_statistics(x, y, [LogSumExp()], scale=1.0, backend="tirton")
    with pytest.raises(ValueError, match="column_scale"):
        score_statistics(x, y, [LogSumExp()], scale=torch.ones(4))
    with pytest.raises(ValueError, match="floating point"):
        score_statistics(x.long(), y.long(), [LogSumExp()], scale=1.0)
    with pytest.raises(ValueError, match="one of auto, ring, gather, hierarchical"):
        score_statistics(x, y, [LogSumExp()], scale=1.0, communication="pigeon")


def test_what_a_backend_lacks_is_refused_and_who_has_it_named(monkeypatch):
    (x, y, *_), _ = problem(4, 3, 0, device=DEVICE)
    with pytest.raises(ValueError, match="backend 'triton' has no kernels for torch.float64: 'torch' and 'dense' has"):
        score_statistics(x, y, [LogSumExp()], scale=1.0, backend="triton")

    class Median(Reduction):
        pass

    for backend in BACKENDS:
        with pytest.raises(ValueError, match=f"backend '{backend}' has no reduction .*: no backend has"):
            score_statistics(x.float(), y.float(), [Median()], scale=1.0, backend=backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="no kernels for cpu .*: 'torch' and 'dense' has"):
        score_statistics(x.float().cpu(), y.float().cpu(), [Maximum()], scale=1.0, backend="triton")
