"""The oracle: all scores of a block at once, reduced by plain operations whose gradients are autograd's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.score.backends.base import Block, Gradients, Statistics, finite
from mmcontrast.score.reductions import LogSumExp, Maximum, Reduction, SoftplusSum, Sum


def _reduce(reduction: Reduction, scores: Tensor, same: Tensor) -> Tensor:
    """[n] from scores [n, m]."""
    dropped = {"negatives": same, "positives": ~same, "all": torch.zeros_like(same)}[reduction.over]
    match reduction:
        case LogSumExp(exponent=exponent):
            return (exponent * scores).masked_fill(dropped, -torch.inf).logsumexp(1)
        case SoftplusSum():
            return (-F.logsigmoid(-scores)).masked_fill(dropped, 0.0).sum(1)
        case Sum():
            return scores.masked_fill(dropped, 0.0).sum(1)
        case Maximum():
            masked = scores.detach().masked_fill(dropped, -torch.inf)
            return torch.cat([masked, masked.new_full((len(masked), 1), -torch.inf)], 1).amax(1)
    raise TypeError(f"the dense backend has no {reduction}")


def _statistics(block: Block, x: Tensor, y: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor) -> list[Tensor]:
    same = block.same.row_ids[:, None] == block.same.column_ids
    dots = x.to(block.dtype) @ y.to(block.dtype).T
    rows = [_reduce(r, dots * row_scale.view(-1, 1) + bias, same) for r in block.reductions]
    if not block.both:
        return rows
    return rows + [_reduce(r, dots.T * column_scale.view(-1, 1) + bias, same.T) for r in block.reductions]


class Dense:
    """Memory and time O(n·m), several times over."""

    def forward(self, block: Block) -> Statistics:
        scale, bias = block.row_scale, block.bias if block.bias is not None else block.row_scale.new_zeros(())
        columns = scale if block.column_scale is None else block.column_scale
        values = _statistics(block, block.x, block.y, scale, columns, bias)
        return Statistics(values[: len(block.reductions)], values[len(block.reductions) :])

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor) -> Gradients:
        with torch.enable_grad():
            inputs = [block.x, block.y, block.row_scale]
            inputs.append(block.row_scale if block.column_scale is None else block.column_scale)
            inputs.append(block.bias if block.bias is not None else block.row_scale.new_zeros(()))
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            own = _statistics(block, *leaves)
            totals, upstream = finite([*final.rows, *final.columns], [*grads.rows, *grads.columns])
            reductions = block.reductions * 2 if block.both else block.reductions
            objective = 0.0 * leaves[0].sum()
            for reduction, part, total, grad in zip(reductions, own, totals, upstream, strict=True):
                if isinstance(reduction, LogSumExp):  # this block's share of the whole: ∂ total / ∂ part
                    grad = grad * (part.detach() - total).exp()
                if part.requires_grad:
                    objective = objective + (torch.where(grad == 0, 0.0, part) * grad).sum()
            dx_own, dy, row_scale, column_scale, bias = torch.autograd.grad(
                objective, leaves, allow_unused=True, materialize_grads=True
            )
        dx += dx_own
        if block.column_scale is None:
            return Gradients(dx, dy.to(block.dtype), row_scale + column_scale, None, bias)
        return Gradients(dx, dy.to(block.dtype), row_scale, column_scale, bias)
