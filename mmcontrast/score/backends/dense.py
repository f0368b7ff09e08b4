"""The oracle: all scores of a block at once, reduced by plain operations whose gradients are autograd's."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.score.backends.base import Block, Gradients, Statistics, finite, lacks_in_torch
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


def _scores(block: Block) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """x·y [n, m], and for each direction, anchors first: its scores, who is of whose group, its scale [] or [anchors, 1]."""
    dots = block.x.to(block.dtype) @ block.y.to(block.dtype).T
    same = block.same.row_ids[:, None] == block.same.column_ids
    scales = [block.row_scale, block.row_scale if block.column_scale is None else block.column_scale]
    views = [(dots, same), (dots.T, same.T)][: 1 + block.both]
    bias = 0.0 if block.bias is None else block.bias
    return dots, [(view * s + bias, mask, s) for (view, mask), s in zip(views, (t.view(-1, 1) for t in scales), strict=False)]


class Dense:
    """Memory and time O(n·m), several times over."""

    def lacks(self, x: Tensor, reductions: Sequence[Reduction]) -> str | None:
        return lacks_in_torch(x, reductions)

    def forward(self, block: Block) -> Statistics:
        values = [[_reduce(r, z, same) for r in block.reductions] for z, same, _ in _scores(block)[1]]
        return Statistics(values[0], values[1] if block.both else [])

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor) -> Gradients:
        dots, sides = _scores(block)
        per_anchor = block.row_scale.dim() > 0
        w, d_bias, d_scales = torch.zeros_like(dots), dots.new_zeros(()), []
        for (z, same, scale), values, upstream, turn in zip(
            sides, (final.rows, final.columns), (grads.rows, grads.columns), (lambda t: t, torch.t), strict=False
        ):
            totals, upstream = finite(values, upstream)
            with torch.enable_grad():
                z.requires_grad_()
                objective = 0.0 * z.sum()
                for reduction, total, grad in zip(block.reductions, totals, upstream, strict=True):
                    part = _reduce(reduction, z, same)
                    if isinstance(reduction, LogSumExp):  # this block's share of the whole: ∂ total / ∂ part
                        grad = grad * (part.detach() - total).exp()
                    if part.requires_grad:
                        objective = objective + (torch.where(grad == 0, 0.0, part) * grad).sum()
                (own,) = torch.autograd.grad(objective, z)
            d_bias += own.sum()
            if per_anchor:
                d_scales.append((own * turn(dots)).sum(1))
                own = own * scale
            w += turn(own)
        dx += w @ block.y.to(block.dtype)
        row_scale, column_scale = (*d_scales, None, None)[:2]
        return Gradients(w.T @ block.x.to(block.dtype), row_scale, column_scale, None if block.bias is None else d_bias)
