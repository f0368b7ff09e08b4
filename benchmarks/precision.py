"""Measure the error of the loss and its gradients with products in bf16 and tf32, against float64.

    python benchmarks/precision.py                        # N = 4,096 and 16,384: minutes on 2 cores
    python benchmarks/precision.py --n 65536 --only tf32 bf16

On a GPU they are its own products. Elsewhere those of the tiles in plain PyTorch, in fp32, of operands that are rounded as a
tensor core takes them: tf32 keeps 10 bits of the mantissa (rounded; or, "tf32 cut", the others are cut off, which biases every
product towards 0), bf16 keeps 7. A tensor core's fp32 sums are in another order, which is not what the errors here come from.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmcontrast import contrastive_loss

SCALES = {"infonce": (100.0, None), "siglip": (100.0, -20.0)}
COSINE = 0.2  # of a pair: with negatives of random directions the loss of infonce is between 1 and 3, as in training
PRODUCTS = {torch.ops.aten.mm: (0, 1), torch.ops.aten.addmm: (1, 2), torch.ops.aten.addmm_: (1, 2)}  # and their operands


def tf32(tensor: Tensor) -> Tensor:
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_cut(tensor: Tensor) -> Tensor:
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)


def bf16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


class Rounded(TorchDispatchMode):
    """Rounds the operands of every matrix product."""

    def __init__(self, rounding: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rounding, self.products = rounding, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operands := PRODUCTS.get(func.overloadpacket):
            self.products += 1
            args = [self.rounding(arg.contiguous()) if k in operands else arg for k, arg in enumerate(args)]
        return func(*args, **(kwargs or {}))


def pairs(n: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return unit rows in float64 whose cosines with their partners are about `COSINE`."""
    generator = torch.Generator().manual_seed(0)
    x, z = (F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1) for _ in "xz")
    return x, F.normalize(COSINE * x + (1 - COSINE**2) ** 0.5 * z, dim=1)


def loss_and_gradients(x: Tensor, y: Tensor, objective: str, rounding: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    """Return the loss, the gradients of both fields, and the scale's."""
    scale, bias = SCALES[objective]
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(scale, dtype=torch.float64).to(x)]
    leaves[2].requires_grad_()
    with nullcontext() if rounding is None else Rounded(rounding) as mode:
        embeddings = {"image": leaves[0], "text": leaves[1]}
        loss = contrastive_loss(embeddings, objective=objective, logit_scale=leaves[2], logit_bias=bias)
        assert mode is None or mode.products, "the forward has other products than those that are rounded"
        loss.backward()
    return [loss.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def on_this_device(name: str, x: Tensor, y: Tensor, objective: str, device: torch.device) -> list[Tensor]:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if name.startswith("tf32") else "highest")
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        return loss_and_gradients(x.to(dtype), y.to(dtype), objective, None)
    return loss_and_gradients(x.float(), y.float(), objective, {"tf32": tf32, "tf32 cut": tf32_cut, "bf16": bf16}.get(name))


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--only", nargs="+", default=["fp32", "tf32", "tf32 cut", "bf16"])
    parser.add_argument("--objectives", nargs="+", default=["infonce", "siglip"], choices=list(SCALES))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("errors against float64, relative; of gradients in the Euclidean norm of all rows")
    print("| objective | N × D | products | loss | its error | gradients' | the scale's | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for n in options.n:
        x, y = (rows.to(device) for rows in pairs(n, options.dim))
        for objective in options.objectives:
            exact = loss_and_gradients(x, y, objective, None)
            for name in options.only:
                start = time.perf_counter()
                loss, dx, dy, dscale = on_this_device(name, x, y, objective, device)
                seconds = time.perf_counter() - start
                rows = relative(torch.cat([dx, dy]), torch.cat(exact[1:3]))
                errors = relative(loss, exact[0]), rows, relative(dscale, exact[3])
                shown = " | ".join(f"{error:.1e}" for error in errors)
                print(
                    f"| {objective} | {n:,} × {options.dim} | {name} | {exact[0].item():.3f} | {shown} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
