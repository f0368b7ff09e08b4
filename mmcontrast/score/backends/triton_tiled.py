"""Fused kernels for GPUs, and the library's matrix products for the gradients.

The forward is one kernel a block: product, masks, the reductions of both directions; what the tiles found is merged after.
The backward writes the weights of a block (bounded scratch, in the inputs' dtype), from which products make dX and dY:
an accumulator of dX, 128 × D in fp32, does not fit in registers at D ≥ 512, so one fused kernel would need atomics.
"""

import importlib.util
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
    """Pinned, so that results are the same on every run: no autotuning."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


LAUNCHES = {  # by the product; for sm_90 infonce and siglip spill no registers; not yet tuned on a card
    "half": Launch(128, 128, 64, 8, 3),
    "tf32": Launch(128, 128, 32, 8, 3),
    "ieee": Launch(64, 64, 16, 8, 2),
}


class TritonTiled:
    """See `Backend`. fp32 products are tf32 where torch.set_float32_matmul_precision allows it ("high", "medium")."""

    def lacks(self, x: Tensor, reductions: Sequence[Reduction], link: Link | None) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "kernels without the package triton"
        if not (interpreted() if not x.is_cuda else torch.cuda.get_device_capability(x.device) >= (8, 0)):
            return f"kernels for {x.device.type} (it has them for NVIDIA GPUs from compute capability 8.0)"
        if x.dtype not in (torch.float32, torch.float16) + (() if interpreted() else (torch.bfloat16,)):
            return f"kernels for {x.dtype}"
        if link is not None:
            return f"link {type(link).__name__}"
        if any(r.below for r in reductions):
            return "limits of anchors"
        return next((f"reduction {r}" for r in reductions if type(r) not in KINDS), None)

    def forward(self, block: Block) -> Statistics:
        from mmcontrast.score.backends import triton_kernels

        n, m, K = len(block.x), len(block.y), len(block.reductions)
        rows = [block.x.new_full((n,), r.identity, dtype=torch.float32) for r in block.reductions]
        columns = [block.x.new_full((m,), r.identity, dtype=torch.float32) for r in block.reductions if block.both]
        launch = launch_of(block)
        for at in cut(n, FORWARD_BLOCK):
            for to in cut(m, FORWARD_BLOCK):
                R, C = at.stop - at.start, to.stop - to.start
                row_parts = block.x.new_empty((K, -(-C // launch.BN), R), dtype=torch.float32)
                column_parts = block.x.new_empty((K, -(-R // launch.BM) if block.both else 0, C), dtype=torch.float32)
                start(triton_kernels.reduce_tiles, block, at, to, launch, row_parts, column_parts)
                for k, reduction in enumerate(block.reductions):
                    rows[k][at] = reduction.merge(rows[k][at], merged(reduction, row_parts[k]))
                    if block.both:
                        columns[k][to] = reduction.merge(columns[k][to], merged(reduction, column_parts[k]))
        return Statistics(rows, columns)

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor | None) -> Gradients:
        from mmcontrast.score.backends import triton_kernels

        row_values, row_grads = finite(final.rows, grads.rows)
        column_values, column_grads = finite(final.columns, grads.columns)
        factors = [r.exponent if isinstance(r, LogSumExp) else 1.0 for r in block.reductions]
        binary = [LOG2E] * len(factors)
        launch, per_anchor = launch_of(block), block.row_scale.dim() > 0
        size = weights_size(block)
        scratch = torch.empty(
            min(size[0], len(block.x)) * min(size[1], len(block.y)), dtype=product_dtype(block), device=block.x.device
        )

        def weights(at: slice, to: slice, grads: Statistics) -> Weights:
            R, C = at.stop - at.start, to.stop - to.start
            tiles_n, tiles_m = -(-R // launch.BM), -(-C // launch.BN)
            w = scratch[: R * C].view(R, C)
            bias = block.row_scale.new_empty((tiles_n, tiles_m)) if block.bias is not None else None
            row_scale = block.row_scale.new_empty((tiles_m, R)) if per_anchor else None
            column_scale = block.row_scale.new_empty((tiles_n, C)) if block.column_scale is not None else None
            start(
                triton_kernels.weigh_tiles, block, at, to, launch,
                stacked(row_values, binary, at), stacked(column_values, binary, to),
                stacked(grads.rows, factors, at), stacked(grads.columns, factors, to),
                w, bias, row_scale, column_scale,
            )  # fmt: skip
            sums = [None if part is None else part.sum(0) for part in (row_scale, column_scale)]
            return Weights(w, None if bias is None else bias.sum(), *sums)

        return gradients_by_tiles(block, Statistics(row_grads, column_grads), dx, size, weights)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch_of(block: Block) -> Launch:
    if block.x.dtype != torch.float32:
        return LAUNCHES["half"]
    return LAUNCHES["ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"]


def weights_size(block: Block) -> tuple[int, int]:
    """Rows and columns whose weights are written at a time: as many bytes as half of the inputs have, from 1,024² on."""
    if block.tile_size is not None:
        return block.tile_size
    side = min(max(int(((block.x.numel() + block.y.numel()) / 2) ** 0.5) // 256 * 256, 1024), 8192)
    return side, side


def merged(reduction: Reduction, parts: Tensor) -> Tensor:
    """[n] from what the tiles found, [tiles, n]."""
    if isinstance(reduction, LogSumExp):
        return parts.logsumexp(0)
    return parts.amax(0) if isinstance(reduction, Maximum) else parts.sum(0)


def stacked(values: Sequence[Tensor], factors: Sequence[float], at: slice) -> Tensor | None:
    """[K, n] of one part, each times its factor; None of nothing."""
    if not values:
        return None
    return torch.stack([value[at] * factor for value, factor in zip(values, factors, strict=True)])


def start(kernel: Any, block: Block, at: slice, to: slice, launch: Launch, *tensors: Tensor | None) -> None:
    """The kernel on one part of the block; a tensor that does not exist is None."""
    per_anchor = block.row_scale.dim() > 0
    n, m = at.stop - at.start, to.stop - to.start
    with torch.cuda.device(block.x.device) if block.x.is_cuda else nullcontext():
        kernel[(-(-n // launch.BM) * -(-m // launch.BN),)](
            described(block.x[at], [launch.BM, launch.BK]), described(block.y[to], [launch.BN, launch.BK]),
            block.same.row_ids[at].contiguous(), block.same.column_ids[to].contiguous(),
            block.row_scale[at].contiguous() if per_anchor else block.row_scale,
            block.column_scale[to].contiguous() if block.column_scale is not None else None,
            block.bias, *(None if t is None else t.contiguous() for t in tensors), n, m, block.x.shape[1],
            KINDS=tuple(KINDS[type(r)] for r in block.reductions),
            EXPONENTS=tuple(r.exponent if isinstance(r, LogSumExp) else 1.0 for r in block.reductions),
            OVERS=tuple(OVERS[r.over] for r in block.reductions),
            BOTH=block.both, PER_ANCHOR=per_anchor, BIAS=block.bias is not None,
            BM=launch.BM, BN=launch.BN, BK=launch.BK, GROUP=8,
            PRECISION="ieee" if launch is LAUNCHES["ieee"] else "tf32",
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip


def described(rows: Tensor, shape: list[int]) -> Any:
    """A tensor descriptor that reads blocks of that shape. Rows begin at multiples of 16 bytes, so others are copied."""
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    multiple = 16 // rows.element_size()
    if interpreted() and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        multiple = 16  # that interpreter counts numbers where a card counts bytes
    if rows.stride(1) != 1 or rows.stride(0) % multiple or rows.data_ptr() % 16:
        rows = F.pad(rows, (0, -rows.shape[1] % multiple)).contiguous()
    return TensorDescriptor.from_tensor(rows, shape)
