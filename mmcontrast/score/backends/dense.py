"""The dense backend, the oracle: all scores of a block at once, reduced by plain operations with autograd's gradients."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.score.backends.base import Block, Gradients, Statistics, finite, lacks_in_torch
from mmcontrast.score.links import Link
from mmcontrast.score.reductions import CrossSum, LogSumExp, Maximum, Reduction, SoftplusSum, Sum
from mmcontrast.score.teachers import Teacher


def reduce_rows(reduction: Reduction, scores: Tensor, same: Tensor, above: Tensor | None, targets: Tensor | None) -> Tensor:
    """Return a reduction [n] of scores [n, m].

    Args:
        same: bool [n, m], candidates of the anchor's group. above: bool [n, m], those above its limit. targets: teachers'
            softmaxes.
    """
    dropped = {"negatives": same, "positives": ~same, "all": torch.zeros_like(same)}[reduction.over]
    if reduction.below and above is not None:
        dropped = dropped | above
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
        case CrossSum() if targets is not None:
            return (targets * scores).masked_fill(dropped, 0.0).sum(1)
    raise TypeError(f"the dense backend has no {reduction}")


class _Side:
    """One direction of a block, with its anchors as rows.

    Attributes:
        turn: [n, m] → [anchors, candidates]. same, targets: as in `reduce_rows`. scale: [] or [anchors, 1].
    """

    def __init__(self, block: Block, rows: bool) -> None:
        scale = block.row_scale if rows or block.column_scale is None else block.column_scale
        self.turn: Callable[[Tensor], Tensor] = (lambda t: t) if rows else torch.t
        self.scale, self.bias = scale.view(-1, 1) if scale.dim() else scale, 0.0 if block.bias is None else block.bias
        self.same = self.turn(block.same.row_ids[:, None] == block.same.column_ids)
        self.limit = None if block.limits is None else (block.limits.rows if rows else block.limits.columns)
        self.guide = None
        if block.limits is not None and block.limits.guide is not None:
            self.guide = self.turn(_teacher_scores(block, block.limits.guide))
        softmaxes = []
        for teacher in block.teachers:
            log_sums = teacher.row_log_sums if rows else teacher.column_log_sums
            if log_sums is not None:
                softmaxes.append((self.turn(_teacher_scores(block, teacher)) - log_sums[:, None]).exp())
        self.targets = torch.stack(softmaxes).mean(0) if softmaxes else None

    def scores(self, linked: Tensor) -> Tensor:
        """Return the scores [anchors, candidates] of the link's values [n, m]."""
        return self.turn(linked) * self.scale + self.bias

    def reduce(self, reduction: Reduction, z: Tensor) -> Tensor:
        """Return a reduction of the scores z."""
        compared = z.detach() if self.guide is None else self.guide
        above = None if self.limit is None else compared > self.limit[:, None]
        return reduce_rows(reduction, z, self.same, above, self.targets)


def _teacher_scores(block: Block, teacher: Teacher) -> Tensor:
    """Return a teacher's scores [n, m]."""
    return teacher.scale * (teacher.rows.to(block.dtype) @ teacher.columns.to(block.dtype).T)


def _products(block: Block) -> tuple[Tensor, Tensor]:
    """Return x·y [n, m], and the link's values of it."""
    dots = block.x.to(block.dtype) @ block.y.to(block.dtype).T
    return dots, dots if block.link is None else block.link.value(dots)


class Dense:
    """The backend in O(n·m) memory; see `Backend`."""

    def lacks(self, x: Tensor, reductions: Sequence[Reduction], link: Link | None) -> str | None:
        return lacks_in_torch(x, reductions, link)

    def forward(self, block: Block) -> Statistics:
        linked = _products(block)[1]
        sides = [_Side(block, rows) for rows in (True, False)[: 1 + block.both]]
        values = [[side.reduce(reduction, side.scores(linked)) for reduction in block.reductions] for side in sides]
        return Statistics(values[0], values[1] if block.both else [])

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor | None) -> Gradients:
        dots, linked = _products(block)
        w, d_bias, d_scales = torch.zeros_like(dots), dots.new_zeros(()), []
        sides = [_Side(block, rows) for rows in (True, False)[: 1 + block.both]]
        for side, values, upstream in zip(sides, (final.rows, final.columns), (grads.rows, grads.columns), strict=False):
            totals, upstream = finite(values, upstream)
            z = side.scores(linked).detach()
            with torch.enable_grad():
                z.requires_grad_()
                objective = 0.0 * z.sum()
                for reduction, total, grad in zip(block.reductions, totals, upstream, strict=True):
                    part = side.reduce(reduction, z)
                    if isinstance(reduction, LogSumExp):  # this block's share of the total: ∂ total / ∂ part
                        grad = grad * (part.detach() - total).exp()
                    if part.requires_grad:
                        objective = objective + (torch.where(grad == 0, 0.0, part) * grad).sum()
                (d_z,) = torch.autograd.grad(objective, z)
            d_bias += d_z.sum()
            if block.folded:
                by_scale = d_z * side.turn(linked)
                d_scales.append(by_scale.sum(1) if block.row_scale.dim() else by_scale.sum())
                d_z = d_z * side.scale
            w += side.turn(d_z)
        d_parameter = None
        if block.link is not None:
            slope, by_parameter = block.link.slopes(dots)
            d_parameter, w = (w * by_parameter).sum(), w * slope
            if block.row_scale.dim() == 0:
                d_scales = [torch.stack(d_scales).sum()]
        if dx is not None:
            dx += w @ block.y.to(block.dtype)
        dy = w.T @ block.x.to(block.dtype) if block.y_needs_grad else None
        row_scale, column_scale = (*d_scales, None, None)[:2]
        return Gradients(dy, row_scale, column_scale, None if block.bias is None else d_bias, d_parameter)
