"""Parts of both tiled backends: cutting into tiles, products, and the gradients from the weights of each tile.

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
    """The weights of a tile, w_RC = ∂loss/∂(x·y), without the scale unless `Block.folded`, and its other gradients.

    Attributes:
        w: [R, C].
        bias: [], Σ ∂loss/∂z, if the block has a bias.
        row_scale, column_scale: [R] and [C] for scales per anchor; [] and None for a scalar with a link.
        parameter: [], of the link.
    """

    w: Tensor
    bias: Tensor | None = None
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    parameter: Tensor | None = None


def cut(length: int, size: int) -> list[slice]:
    """Return slices of at most `size` that cover a length."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@cache
def cpu_multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for bf16 products (AMX, AVX512-BF16, Arm's), without which torch's are several
    times slower than fp32 products."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(block: Block) -> torch.dtype:
    """Return the dtype of the products' operands: the inputs' if the machine is faster with it, else that of the statistics.

    On a CPU with the instructions, bf16 products round each score and each tile's share of a gradient to bf16; on a GPU they
    accumulate and give fp32, so that only the weights are rounded."""
    if block.x.device.type == "cpu":
        native: tuple[torch.dtype, ...] = (torch.bfloat16,) if cpu_multiplies_bf16() else ()
    else:
        native = (torch.bfloat16, torch.float16)
    return block.x.dtype if block.x.dtype in native else block.dtype


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a b, to be added to or copied into a tensor of dtype; on a CPU it has the operands' dtype."""
    return torch.mm(a, b, out_dtype=dtype) if a.dtype != dtype and a.is_cuda else torch.mm(a, b)


def gradients_by_tiles(
    block: Block,
    grads: Statistics,
    dx: Tensor | None,
    tile: tuple[int, int],
    weights_of: Callable[[Statistics], Callable[[slice, slice], Weights]],
) -> Gradients:
    """Return the gradients of a block: for each tile compute its weights W, then dx += W Y and dy += Wᵀ X, if they are needed.

    `weights_of` makes, from the gradients by the statistics, the function that returns the weights of some rows and columns.
    Weights in fp16 would underflow (a gradient of 1/N times a probability), so with fp16 the gradients are first divided by the
    largest of them.
    """
    dtype, low = block.dtype, product_dtype(block)
    largest = None
    if low == torch.float16:
        maxima = [grad.abs().amax() for grad in (*grads.rows, *grads.columns) if grad.numel()]
        largest = torch.stack([*maxima, block.row_scale.new_full((), torch.finfo(dtype).tiny)]).amax()
        grads = Statistics([grad / largest for grad in grads.rows], [grad / largest for grad in grads.columns])

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
    parameter = None if block.link is None else block.row_scale.new_zeros(())
    inputs = (row_scale, block.column_scale, block.bias, parameter)
    sums = [None if tensor is None else torch.zeros_like(tensor) for tensor in inputs]
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
            indices: list[Any] = [rows if row_scale is not None and row_scale.dim() else ..., columns, ..., ...]
            values = (part.row_scale, part.column_scale, part.bias, part.parameter)
            for total, index, value in zip(sums, indices, values, strict=True):
                if total is not None and value is not None:
                    total[index] += value
    for total in sums:
        if total is not None and largest is not None:
            total *= largest
    return Gradients(dy, *sums)
