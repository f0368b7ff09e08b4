"""Random problems, the float64 textbook form they are checked against, and the primitive called alike."""

import itertools

import torch
import torch.nn.functional as F

from mmcontrast.score import LogSumExp, Maximum, SoftplusSum, Sum, score_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def problem(n, d, seed, groups=None, scale=10.0, per_anchor=False, bias=-0.3, dtype=torch.float64, device="cpu"):
    """(leaves, ids): x, y [n, d], the scales, the bias; ids of n different groups, or at random of so many."""
    generator = torch.Generator().manual_seed(seed)
    rows = [F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype) for _ in "xy"]
    ids = torch.arange(n) if groups is None else torch.randint(groups, (n,), generator=generator)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scales = [torch.full((n,) if per_anchor else (), scale, dtype=exact)]
    if per_anchor:
        scales = [scale * (0.8 + 0.4 * torch.rand(n, generator=generator, dtype=exact)) for scale in scales * 2]
    leaves = [*rows, *scales, torch.tensor(bias, dtype=exact)]
    return [leaf.to(device) for leaf in leaves], ids.to(device)


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


def expected(reductions, ids):
    def function(x, y, *rest):
        *scales, bias = rest
        dots, same = x @ y.T, ids[:, None] == ids
        out = []
        for s, scale in ((dots, scales[0]), (dots.T, scales[-1])):
            z = s * scale.reshape(-1, 1) + bias
            out.append(z.diagonal())
            out.extend(
                torch.stack([textbook(r, row, members) for row, members in zip(z, same, strict=True)]) for r in reductions
            )
        return out

    return function


def ours(reductions, ids, **options):
    def function(x, y, *rest):
        *scales, bias = rest
        given = dict(zip(("scale", "column_scale"), scales, strict=False))
        directions = score_statistics(x, y, reductions, **given, bias=bias, ids=ids, **options)
        return [value for d in directions if d is not None for value in (d.positives, *(d[r] for r in reductions))]

    return function


def finite_sum(values, seed=0):
    """A generic scalar of the finite entries: each weighted by its own random number."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for value in values:
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        total = total + (torch.where(value.isfinite(), value, 0.0) * weight).sum()
    return total


def values_and_grads(function, leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    values = function(*leaves)
    grads = torch.autograd.grad(finite_sum(values), leaves, allow_unused=True, materialize_grads=True)
    return [value.detach() for value in values], list(grads)


def assert_exact(function, oracle, leaves, tolerance=1e-10):
    """In float64: values and gradients."""
    for got, want in zip(*(itertools.chain(*values_and_grads(f, leaves)) for f in (function, oracle)), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def assert_no_worse(function, oracle, leaves, tolerance=1e-5):
    """Against float64 on the same rounded inputs: an error is at most that of the textbook form computed in the inputs'
    dtype, plus a quarter of that dtype's rounding step (in fp32: the tolerance) of the range. A scalar's gradient is a
    sum, in which large terms of both signs cancel: its range is that of its terms, |x_i · dx_i| / scale."""
    dtype = leaves[0].dtype
    step = max(tolerance, torch.finfo(dtype).eps / 4)
    values, grads = values_and_grads(oracle, [leaf.double() for leaf in leaves])
    terms = ((leaves[0].double() * grads[0]).sum(1) / leaves[2]).abs().sum().item()
    dense, found = (itertools.chain(*values_and_grads(f, leaves)) for f in (oracle, function))
    for want, reference, got in zip([*values, *grads], dense, found, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        keep = want.isfinite() & reference.isfinite()  # the reference may overflow
        if keep.any():
            want, reference, got = want[keep], reference[keep].double(), got[keep].double()
            span = max(1.0, want.abs().max().item(), terms if keep.dim() == 0 else 0.0)
            assert (got - want).abs().max() <= (reference - want).abs().max() + step * span
