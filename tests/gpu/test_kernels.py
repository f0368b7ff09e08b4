"""The kernels on a real card: exact in every dtype, deterministic, in bounded memory. Skipped, aloud, where there is none."""

import pytest
import torch
import torch.nn.functional as F

from mmcontrast import contrastive_loss
from mmcontrast.score import LogSumExp, SoftplusSum
from mmcontrast.score.backends import BACKENDS, choose
from tests.score.problems import REDUCTIONS, assert_no_worse, expected, ours, problem, values_and_grads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: no kernel was run for real"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_anchor", [False, True], ids=["scalar", "per_anchor"])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_reduction(reduction, per_anchor, dtype, backend):
    for n, d, groups, scale in [(1, 8, None, 1.0), (257, 33, 40, 10.0), (700, 64, None, 100.0)]:
        leaves, ids = problem(n, d, n, groups, scale, per_anchor, dtype=dtype, device="cuda")
        assert_no_worse(ours([reduction], ids, backend=backend), expected([reduction], ids), leaves)


@pytest.mark.parametrize("width", [512, 768, 1152])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reductions", [[LogSumExp()], [SoftplusSum()], [LogSumExp(1.5), LogSumExp(0.5)]], ids=str)
@pytest.mark.parametrize("per_anchor", [False, True], ids=["scalar", "per_anchor"])
def test_real_widths_over_several_blocks(per_anchor, width, dtype, reductions):
    """Against the dense backend in float64, at a size that takes several launches of weights."""
    leaves, ids = problem(2500, width, 1, 2000, 50.0, per_anchor, dtype=dtype, device="cuda")
    exact = values_and_grads(ours(reductions, ids, backend="dense"), [leaf.double() for leaf in leaves])
    dense = values_and_grads(ours(reductions, ids, backend="dense"), leaves)  # products and sums in fp32
    found = values_and_grads(ours(reductions, ids, backend="triton", tile_size=(1024, 768)), leaves)
    terms = ((leaves[0].double() * exact[1][0]).sum(1) / leaves[2]).abs().sum()  # a scalar's gradient sums these, of both signs
    step = max(1e-5, torch.finfo(dtype).eps / 4)  # the weights are rounded to the inputs' dtype
    for want, reference, got in zip(exact[0] + exact[1], dense[0] + dense[1], found[0] + found[1], strict=True):
        span = torch.maximum(want.norm().clamp(min=1.0), terms if want.dim() == 0 else terms * 0)
        assert (got - want).norm() <= (reference - want).norm() + step * span


def test_tf32_is_taken_where_torch_allows_it():
    leaves, ids = problem(600, 256, 0, None, 50.0, dtype=torch.float32, device="cuda")
    function = ours([LogSumExp()], ids, backend="triton")
    exact = ours([LogSumExp()], ids, backend="dense")(*(leaf.double() for leaf in leaves))[1]
    before = torch.get_float32_matmul_precision()
    try:
        errors = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = (function(*leaves)[1] - exact).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 3e-5 < errors["high"] < 1e-1


@pytest.mark.parametrize("per_anchor", [False, True], ids=["scalar", "per_anchor"])
@pytest.mark.parametrize("reductions", [[LogSumExp()], [LogSumExp(1.5), LogSumExp(0.5)], [LogSumExp(), SoftplusSum()]], ids=str)
def test_gradients_in_tf32(per_anchor, reductions, monkeypatch):
    """At a real width: its launch has tiles of its own."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    leaves, ids = problem(2500, 512, 1, 2000, 50.0, per_anchor, dtype=torch.float32, device="cuda")
    exact = values_and_grads(ours(reductions, ids, backend="dense"), [leaf.double() for leaf in leaves])
    found = values_and_grads(ours(reductions, ids, backend="triton"), leaves)
    for want, got in zip(exact[1][:2], found[1][:2], strict=True):  # of the rows
        assert (got - want).norm() <= 5e-3 * want.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype):
    leaves, ids = problem(3000, 512, 0, 1500, 50.0, dtype=dtype, device="cuda")
    first, again = (values_and_grads(ours([LogSumExp()], ids, backend="triton"), leaves) for _ in range(2))
    for a, b in zip(first[0] + first[1], again[0] + again[1], strict=True):
        assert torch.equal(a, b)


def test_auto_takes_the_kernels():
    x = torch.zeros(4, 8, device="cuda")
    assert choose("auto", x.bfloat16(), [LogSumExp()]) is BACKENDS["triton"]
    assert choose("auto", x.double(), [LogSumExp()]) is BACKENDS["torch"]


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_memory_is_at_most_twice_inputs_gradients_and_statistics(objective):
    n, width = 32_768, 512
    x, y = (F.normalize(torch.randn(n, width, device="cuda"), dim=1).bfloat16().requires_grad_() for _ in range(2))
    scale = torch.tensor(50.0, device="cuda", requires_grad=True)
    contrastive_loss({"a": x[:256], "b": y[:256]}, objective=objective, logit_scale=scale).backward()  # kernels and handles
    x.grad = y.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contrastive_loss({"a": x, "b": y}, objective=objective, logit_scale=scale).backward()
    inputs = 2 * n * width * 2
    peak = torch.cuda.max_memory_allocated() - before + inputs
    assert peak <= 2 * (2 * inputs + 4 * n * 4)


def test_a_compiled_step_on_the_card():
    tower = torch.nn.Linear(64, 32, device="cuda")

    def step(images, texts):
        embeddings = {"image": F.normalize(tower(images), dim=1), "text": F.normalize(texts, dim=1)}
        return contrastive_loss(embeddings, logit_scale=tower.weight.new_tensor(20.0))

    images, texts = torch.randn(300, 64, device="cuda"), torch.randn(300, 32, device="cuda")
    plain, compiled = step(images, texts), torch.compile(step)(images, texts)
    torch.testing.assert_close(compiled, plain)
    grads = [torch.autograd.grad(loss, tower.weight)[0] for loss in (compiled, plain)]
    torch.testing.assert_close(*grads)
