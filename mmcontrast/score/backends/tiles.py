"""Shared by the tiled backends: the cuts, the products, and the gradients that follow from the weights of each tile.

Shapes: R, C rows and columns of a tile.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmcontrast.score.backends.base import Block, Gradients, Statistics


@dataclass
class Weights:
    """Of one tile: w_RC = ∂loss/∂(x·y), without the scale unless `Block.folded`, and what else the tile adds up.

    Attributes:
        w: [R, C].
        bias: [], Σ ∂loss/∂z, if the block has a bias.
        row_scale, column_scale: [R] and [C], if scales are per anchor; [] and None of a scalar under a link.
        parameter: [], of the link.
    """

    w: Tensor
    bias: Tensor | None = None
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    parameter: Tensor | None = None


def cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 (AMX, AVX512-BF16, Arm's): without them, torch's are several
    times slower than products in fp32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(block: Block) -> torch.dtype:
    """Of the products' operands: the inputs' own where the machine is faster with it, else that of the statistics.

    On a CPU with the instructions, bf16 products round each score and each tile's share of a gradient to bf16; on a GPU they
    accumulate and give fp32, so that only the weights are rounded."""
    if block.x.device.type == "cpu":
        native: tuple[torch.dtype, ...] = (torch.bfloat16,) if cpu_multiplies_bf16() else ()
    else:
        native = (torch.bfloat16, torch.float16)
    return block.x.dtype if block.x.dtype in native else block.dtype


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, to be added to or copied into what is of dtype; on a CPU it comes in the operands' own."""
    return torch.mm(a, b, out_dtype=dtype) if a.dtype != dtype and a.is_cuda else torch.mm(a, b)


def gradients_by_tiles(
    block: Block,
    grads: Statistics,
    dx: Tensor | None,
    tile: tuple[int, int],
    weights_of: Callable[[Statistics], Callable[[slice, slice], Weights]],
) -> Gradients:
    """The backward pass: for each tile its weights W, then dx += W Y and dy += Wᵀ X, of those that are wanted.

    `weights_of` makes the function that has the weights of rows and columns, for the gradients by the statistics. Weights in
    fp16 would underflow (a gradient of 1/N times a probability), so there they are those of the gradients
    divided by the largest of them.
    """
    dtype, low = block.dtype, product_dtype(block)
    largest = None
    if low == torch.float16:
        given = [grad.abs().amax() for grad in (*grads.rows, *grads.columns) if grad.numel()]
        largest = torch.stack([*given, block.row_scale.new_full((), torch.finfo(dtype).tiny)]).amax()
        grads = Statistics([g / largest for g in grads.rows], [g / largest for g in grads.columns])

    def add(total: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype == dtype:
            total.addmm_(a, b)
        elif largest is None and a.is_cuda:
            torch.addmm(total, a, b, out_dtype=dtype, out=total)
        elif largest is None:
            total += product(a, b, dtype)
        else:
            total.addcmul_(product(a, b, dtype), largest)

    dy = torch.zeros(block.y.shape, dtype=dtype, device=block.y.device) if block.y_needs_grad else None
    row_scale = block.row_scale if block.folded else None
    like = (row_scale, block.column_scale, block.bias, None if block.link is None else block.row_scale.new_zeros(()))
    sums = [None if one is None else torch.zeros_like(one) for one in like]
    weights = weights_of(grads)
    for rows in cut(len(block.x), tile[0]):
        x = block.x[rows].to(low) if dy is not None else None
        for columns in cut(len(block.y), tile[1]):
            part = weights(rows, columns)
            w = part.w.to(low)
            if dx is not None:
                add(dx[rows], w, block.y[columns].to(low))
            if dy is not None and x is not None:
                add(dy[columns], w.T, x)
            places: list[Any] = [rows if row_scale is not None and row_scale.dim() else ..., columns, ..., ...]
            values = (part.row_scale, part.column_scale, part.bias, part.parameter)
            for total, place, value in zip(sums, places, values, strict=True):
                if total is not None and value is not None:
                    total[place] += value
    for total in sums:
        if total is not None and largest is not None:
            total *= largest
    return Gradients(dy, *sums)
