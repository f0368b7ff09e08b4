"""The backend of fused Triton kernels for GPUs, with the library's matrix products for the gradients.

The forward is one kernel per block: product, masks and the reductions of both directions; the tiles' results are merged after
it. The backward writes the weights of a block (bounded scratch, in the inputs' dtype), from which products compute dX and dY:
an accumulator of dX, 128 × D in fp32, does not fit in registers at D ≥ 512, so one fused kernel would need atomics.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.score.backends.base import Block, Gradients, Statistics, finite
from mmcontrast.score.backends.tiles import Weights, cut, gradients_by_tiles, product_dtype
from mmcontrast.score.links import Link
from mmcontrast.score.reductions import LogSumExp, Maximum, Reduction, SoftplusSum, Sum

FORWARD_BLOCK = 16_384  # rows and columns whose tiles one launch reduces: 2·K·16,384²/128 partial results
KINDS: dict[type, int] = {LogSumExp: 0, SoftplusSum: 1, Sum: 2, Maximum: 3}
OVERS = {"negatives": 0, "positives": 1, "all": 2}
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """The launch parameters of a kernel, fixed rather than autotuned, so that results are the same on every run."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


LAUNCHES = {  # by the product's precision: the fastest on NVIDIA H200 of those that fit every card
    "half": Launch(128, 128, 64, 4, 3),
    "tf32": Launch(64, 128, 32, 4, 3),
    "ieee": Launch(64, 64, 16, 8, 2),
}


class TritonTiled:
    """The backend of fused kernels; see `Backend`. fp32 products are tf32 where torch.set_float32_matmul_precision allows it
    ("high", "medium")."""

    def lacks(self, x: Tensor, reductions: Sequence[Reduction], link: Link | None) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "kernels without the package triton"
        if not (interpreted() if not x.is_cuda else torch.cuda.get_device_capability(x.device) >= (8, 0)):
            return f"kernels for {x.device.type} (it has them for NVIDIA GPUs from compute capability 8.0)"
        if x.dtype not in (torch.float32, torch.float16) + (() if interpreted() else (torch.bfloat16,)):
            return f"kernels for {x.dtype}"
        if link is not None:
            return f"link {type(link).__name__}"
        if any(reduction.below for reduction in reductions):
            return "limits of anchors"
        return next((f"reduction {reduction}" for reduction in reductions if type(reduction) not in KINDS), None)

    def forward(self, block: Block) -> Statistics:
        from mmcontrast.score.backends import triton_kernels

        n, m, K, launch = len(block.x), len(block.y), len(block.reductions), launch_of(block)
        start = make_launcher(triton_kernels.reduce_tiles, block, launch)
        rows = [block.x.new_empty(n, dtype=torch.float32) for _ in block.reductions]
        columns = [block.x.new_empty(m, dtype=torch.float32) for _ in block.reductions if block.both]
        for at in cut(n, FORWARD_BLOCK):  # rows
            for to in cut(m, FORWARD_BLOCK):  # columns
                R, C = at.stop - at.start, to.stop - to.start
                row_parts = block.x.new_empty((K, -(-C // launch.BN), R), dtype=torch.float32)
                column_parts = block.x.new_empty((K, -(-R // launch.BM) if block.both else 0, C), dtype=torch.float32)
                start(at, to, row_parts, column_parts)
                for totals, parts, index, first in ((rows, row_parts, at, to.start), (columns, column_parts, to, at.start)):
                    for reduction, total, part in zip(block.reductions, totals, parts, strict=False):
                        value = merge_tiles(reduction, part)
                        total[index] = value if first == 0 else reduction.merge(total[index], value)
        if n == 0 or m == 0:
            for reduction, total in zip(block.reductions * 2, rows + columns, strict=False):
                total.fill_(reduction.identity)
        return Statistics(rows, columns)

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor | None) -> Gradients:
        from mmcontrast.score.backends import triton_kernels

        row_values, row_grads = finite(final.rows, grads.rows)
        column_values, column_grads = finite(final.columns, grads.columns)
        launch, per_anchor = launch_of(block), block.row_scale.dim() > 0
        size = weights_size(block)
        scratch = torch.empty(
            min(size[0], len(block.x)) * min(size[1], len(block.y)), dtype=product_dtype(block), device=block.x.device
        )
        start = make_launcher(triton_kernels.weigh_tiles, block, launch, len(block.x), len(block.y))

        def weights_of(grads: Statistics) -> Callable[[slice, slice], Weights]:
            factors = [r.exponent if isinstance(r, LogSumExp) else 1.0 for r in block.reductions]
            binary = [LOG2E] * len(factors)
            statistics = (
                stack_scaled(row_values, binary), stack_scaled(column_values, binary),
                stack_scaled(grads.rows, factors), stack_scaled(grads.columns, factors),
            )  # fmt: skip

            def weights(at: slice, to: slice) -> Weights:
                R, C = at.stop - at.start, to.stop - to.start
                tiles_n, tiles_m = -(-R // launch.BM), -(-C // launch.BN)
                w = scratch[: R * C].view(R, C)
                bias = block.row_scale.new_empty((tiles_n, tiles_m)) if block.bias is not None else None
                row_scale = block.row_scale.new_empty((tiles_m, R)) if per_anchor else None
                column_scale = block.row_scale.new_empty((tiles_n, C)) if block.column_scale is not None else None
                start(at, to, *statistics, w, bias, row_scale, column_scale)
                sums = [None if part is None else part.sum(0) for part in (row_scale, column_scale)]
                return Weights(w, None if bias is None else bias.sum(), *sums)

            return weights

        return gradients_by_tiles(block, Statistics(row_grads, column_grads), dx, size, weights_of)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch_of(block: Block) -> Launch:
    """Return the launch parameters of a block's kernels; with eight warps if a tile holds more than the weights of one
    reduction and one scale, for which four warps have too few registers."""
    if block.x.dtype != torch.float32:
        launch = LAUNCHES["half"]
        return launch if len(block.reductions) == 1 and block.row_scale.dim() == 0 else replace(launch, warps=8)
    return LAUNCHES["ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"]


def weights_size(block: Block) -> tuple[int, int]:
    """Return the rows and columns whose weights are written at a time: half of the inputs' bytes, but at least 4,096² (32 MiB
    of bf16), so that a block keeps the device busy for longer than its launches take."""
    if block.tile_size is not None:
        return block.tile_size
    side = min(max(int(((block.x.numel() + block.y.numel()) / 2) ** 0.5) // 256 * 256, 4096), 8192)
    return side, side


def merge_tiles(reduction: Reduction, parts: Tensor) -> Tensor:
    """Return a reduction [n] from the tiles' results [tiles, n]."""
    if isinstance(reduction, LogSumExp):
        return parts.logsumexp(0)
    return parts.amax(0) if isinstance(reduction, Maximum) else parts.sum(0)


def stack_scaled(values: Sequence[Tensor], factors: Sequence[float]) -> Tensor | None:
    """Return values times their factors as [K, n]; None without values."""
    if not values:
        return None
    return torch.stack([value if factor == 1.0 else value * factor for value, factor in zip(values, factors, strict=True)])


def make_launcher(kernel: Any, block: Block, launch: Launch, *sizes: int) -> Callable[..., None]:
    """Return a function that launches a kernel on some rows and columns of the block, with further tensors."""
    x, y = make_descriptor(block.x, [launch.BM, launch.BK]), make_descriptor(block.y, [launch.BN, launch.BK])
    inputs = (block.same.row_ids, block.same.column_ids, block.row_scale, block.column_scale, block.bias)
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in inputs]
    constants = {
        "KINDS": tuple(KINDS[type(r)] for r in block.reductions),
        "EXPONENTS": tuple(r.exponent if isinstance(r, LogSumExp) else 1.0 for r in block.reductions),
        "OVERS": tuple(OVERS[r.over] for r in block.reductions),
        "BOTH": block.both, "PER_ANCHOR": block.row_scale.dim() > 0, "BIAS": block.bias is not None,
        "BM": launch.BM, "BN": launch.BN, "BK": launch.BK, "GROUP": 8,
        "PRECISION": "ieee" if launch is LAUNCHES["ieee"] else "tf32",
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
    device = torch.cuda.device(block.x.device) if block.x.is_cuda else nullcontext()

    def start(at: slice, to: slice, *tensors: Tensor | None) -> None:
        tiles = -(-(at.stop - at.start) // launch.BM) * -(-(to.stop - to.start) // launch.BN)
        numbers = (at.start, to.start, at.stop, to.stop, *sizes, block.x.shape[1])
        with device:
            kernel[(tiles,)](x, y, *contiguous, *tensors, *numbers, **constants)

    return start


def make_descriptor(rows: Tensor, shape: list[int]) -> Any | None:
    """Return a tensor descriptor that reads blocks of a shape. Rows must begin at multiples of 16 bytes; others are copied."""
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    if not rows.numel():
        return None  # a rank without samples: nothing is launched
    multiple = 16 // rows.element_size()
    if interpreted() and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        multiple = 16  # its interpreter counts numbers where a card counts bytes
    if rows.stride(1) != 1 or rows.stride(0) % multiple or rows.data_ptr() % 16:
        rows = F.pad(rows, (0, -rows.shape[1] % multiple)).contiguous()
    return TensorDescriptor.from_tensor(rows, shape)
