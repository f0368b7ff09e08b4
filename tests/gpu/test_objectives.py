"""Every objective on a card, by whatever backend "auto" takes, is the dense form in float64 on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from mmcontrast import contrastive_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
N, D = 600, 64
FIELDS = {"type": "all_pairs", "same_field": True}
CASES = {
    "infonce": {},
    "label_smoothing": {"objective": {"type": "infonce", "label_smoothing": 0.1}},
    "false_negative_margin": {"objective": {"type": "infonce", "false_negative_margin": 0.1}},
    "guide": {"objective": {"type": "infonce", "false_negative_margin": 0.0, "guide": True}, "teacher": 1},
    "own_negatives": {"own_negatives": 5},
    "extra_negatives": {"extra_negatives": 90},
    "same_field": {"pairing": FIELDS},
    "same_field joint": {"pairing": FIELDS | {"joint": True}},
    "multilinear": {"pairing": "multilinear", "fields": 3},
    "matryoshka": {"matryoshka": (16, 32, 64)},
    "lorentz": {"score": {"type": "lorentz", "curvature": 1.0}},
    "distillation": {"objective": "distillation", "teacher": 2},
    "sample_weights": {"sample_weights": True},
    "hard_negative": {"objective": "hard_negative"},
    "hybrid": {"objective": "hybrid"},
    "multi_positive": {"objective": "multi_positive"},
    "siglip": {"objective": "siglip"},
}


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def moved(value, device, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: moved(each, device, dtype) for name, each in value.items()}
    return [moved(each, device, dtype) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_dense_form(case, dtype):
    torch.manual_seed(0)
    options = dict(CASES[case])
    fields = "abc"[: options.pop("fields", 2)]
    rounded = [unit(N, D).to(dtype).double() for _ in fields]  # both see the same inputs
    if teachers := options.pop("teacher", 0):
        signs = [torch.randint(2, (2, N, 64)) / 4 - 0.125 for _ in range(teachers)]  # scores exact: nobody is near a limit
        options["teacher"] = [dict(zip(fields, rows.double(), strict=True)) for rows in signs]
    if own := options.pop("own_negatives", 0):
        options["own_negatives"] = {"b": unit(N, own, D).to(dtype).double()}
    if extra := options.pop("extra_negatives", 0):
        options["extra_negatives"] = {"b": unit(extra, D).to(dtype).double()}
    if options.pop("sample_weights", False):
        options["sample_weights"] = torch.rand(N).double()
    options["ids"] = torch.randint(N // 2, (N,))

    def value_and_grads(backend, device, dtype, exact):
        torch.manual_seed(1)  # the random products of multilinear
        leaves = [rows.to(device, dtype).requires_grad_() for rows in rounded]
        scale, bias = (torch.tensor(value, dtype=exact, device=device, requires_grad=True) for value in (20.0, -5.0))
        given = {
            name: moved(value, device, exact if name == "sample_weights" else dtype) if name != "objective" else value
            for name, value in options.items()
        }
        shift = bias if options.get("objective") == "siglip" else None
        embeddings = dict(zip(fields, leaves, strict=True))
        loss = contrastive_loss(embeddings, logit_scale=scale, logit_bias=shift, backend=backend, **given)
        return [loss.detach(), *torch.autograd.grad(loss, [*leaves, scale])]

    want = value_and_grads("dense", "cpu", torch.float64, torch.float64)
    found = value_and_grads("auto", "cuda", dtype, torch.float32)
    step = max(2e-5, torch.finfo(dtype).eps) * (8 if case == "multilinear" else 1)  # its products are rounded too
    for got, exact in zip(found, want, strict=True):
        assert (got.double().cpu() - exact).norm() <= step * exact.norm().clamp(min=1e-2)


def test_ids_on_the_host_wait_for_no_card():
    rows = [unit(N, D).float().cuda().requires_grad_() for _ in "ab"]
    ids, scale = torch.randint(N // 2, (N,)), torch.tensor(20.0, device="cuda", requires_grad=True)
    embeddings = dict(zip("ab", rows, strict=True))
    there = contrastive_loss(embeddings, logit_scale=scale, ids=ids.cuda())
    contrastive_loss(embeddings, logit_scale=scale, ids=ids).backward()  # kernels are compiled
    pinned = ids.pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        here = contrastive_loss(embeddings, logit_scale=scale, ids=pinned)
        here.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(here, there)
