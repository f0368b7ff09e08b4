"""Tiles in plain PyTorch, on any device: O(n + m) memory beside one tile, exact gradients by recomputation.

Per pair of forward and backward: four score-sized products, two exponentials. Shapes: R, C rows and columns of a tile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.score.backends.base import Block, Gradients, Statistics, finite
from mmcontrast.score.reductions import LogSumExp, Maximum, Over, Reduction, SoftplusSum, Sum

CPU_TILE, GPU_TILE = (512, 2048), (2048, 8192)
SAFE_RANGE = 60.0  # natural logarithm: within it of a common shift, fp32 exponentials neither overflow nor lose digits
LINEAR = 40.0  # above it log(1 + exp(z)) = z to the last digit of float64

Same = tuple[Tensor, Tensor] | Tensor | None


class TorchTiled:
    """See `Backend`."""

    def forward(self, block: Block) -> Statistics:
        n, m = len(block.x), len(block.y)
        out = Statistics(
            [block.x.new_full((n,), r.identity, dtype=block.dtype) for r in block.reductions],
            [block.x.new_full((m,), r.identity, dtype=block.dtype) for r in block.reductions if block.both],
        )
        shared, scores = _shared_exponential(block), _Scores(block)
        for rows, columns in scores.tiles():
            same = block.same.tile(rows, columns)
            sides = [(out.rows, rows, 1)] + [(out.columns, columns, 0)] * block.both
            both = None if shared is None else _shared_forward(scores.shared(rows, columns), same)
            if both is not None:
                for (values, place, _), part in zip(sides, both, strict=True):
                    values[0][place] = block.reductions[0].merge(values[0][place], part)
                continue
            dots = scores.dots(rows, columns)
            for values, place, dim in sides:
                z_RC = scores.scaled(dots, place, dim)
                for value, reduction in zip(values, block.reductions, strict=True):
                    value[place] = reduction.merge(value[place], _reduce(reduction, z_RC, same, dim))
        return out

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor) -> Gradients:
        rows_final, rows_grad = finite(final.rows, grads.rows)
        columns_final, columns_grad = finite(final.columns, grads.columns)
        sides = ((rows_final, rows_grad, 1), (columns_final, columns_grad, 0))[: 1 + block.both]
        per_anchor = block.row_scale.dim() > 0
        dy = torch.zeros(block.y.shape, dtype=block.dtype, device=block.y.device)
        d_scales = [torch.zeros_like(block.row_scale, dtype=block.dtype)]
        d_scales.append(d_scales[0] if block.column_scale is None else torch.zeros_like(block.column_scale, dtype=block.dtype))
        d_bias = dy.new_zeros(())
        shared, scores = _shared_exponential(block), _Scores(block)
        for rows, tiles in scores.strips():
            dx_strip = dx.new_zeros((rows.stop - rows.start, dx.shape[1]))
            for columns in tiles:
                same, w_RC = block.same.tile(rows, columns), None
                if shared is not None:
                    w_RC = _shared_backward(scores, rows, columns, same, sides)
                if w_RC is None:
                    dots = scores.dots(rows, columns)
                    w_RC = torch.zeros_like(dots)
                    for side, (values, upstream, dim) in enumerate(sides):
                        place, scale = (rows, block.row_scale) if dim == 1 else (columns, block.column_scale)
                        z_RC, own_RC = scores.scaled(dots, place, dim), torch.zeros_like(dots)
                        for reduction, value, grad in zip(block.reductions, values, upstream, strict=True):
                            if not isinstance(reduction, Maximum):
                                value, grad = value[place].unsqueeze(dim), grad[place].unsqueeze(dim)
                                own_RC += _derivative(reduction, z_RC, same, value, grad)
                        if per_anchor and scale is not None:  # ds = w · scale, and the scales' own gradient
                            d_scales[side][place] += (own_RC * dots).sum(dim)
                            d_bias += own_RC.sum()
                            own_RC *= scale[place].unsqueeze(dim)
                        w_RC += own_RC
                if block.bias is not None and not per_anchor:
                    d_bias += w_RC.sum()
                w_RC = w_RC.to(scores.product_dtype)
                scores.add_product(dx_strip, w_RC, scores.y(columns))
                scores.add_product(dy[columns], w_RC.T, scores.x(rows))
            if not per_anchor:  # Σ_ij w_ij s_ij = Σ_i x_i · (W Y)_i: no pass over the scores
                d_scales[0] += (block.x[rows] * dx_strip).sum()
                dx_strip *= block.row_scale
            dx[rows] += dx_strip
        if not per_anchor:
            dy *= block.row_scale
        return Gradients(dx, dy, d_scales[0], None if block.column_scale is None else d_scales[1], d_bias)


class _Scores:
    """The tiles of a block's scores, computed in one reused buffer."""

    def __init__(self, block: Block) -> None:
        self.block, self.n, self.m = block, len(block.x), len(block.y)
        self.rows, self.columns = block.tile_size or (CPU_TILE if block.x.device.type == "cpu" else GPU_TILE)
        size = (min(self.rows, self.n), min(self.columns, self.m))
        self.buffer = torch.empty(size, dtype=block.dtype, device=block.x.device)
        # on a CPU bf16 products are several times faster; they round each score and each tile's gradient to bf16
        native = block.x.dtype == torch.bfloat16 and block.x.device.type == "cpu"
        self.product_dtype = torch.bfloat16 if native else block.dtype

    def strips(self) -> list[tuple[slice, list[slice]]]:
        def cut(length: int, size: int) -> list[slice]:
            return [slice(start, min(start + size, length)) for start in range(0, length, size)]

        columns = cut(self.m, self.columns)
        return [(rows, columns) for rows in cut(self.n, self.rows)]

    def tiles(self) -> list[tuple[slice, slice]]:
        return [(rows, columns) for rows, tiles in self.strips() for columns in tiles]

    def x(self, rows: slice) -> Tensor:
        return self.block.x[rows].to(self.product_dtype)

    def y(self, columns: slice) -> Tensor:
        return self.block.y[columns].to(self.product_dtype)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a b."""
        if self.product_dtype == total.dtype:
            total.addmm_(a, b)
        else:
            total += torch.mm(a, b)

    def dots(self, rows: slice, columns: slice) -> Tensor:
        """x·y [R, C], in the buffer."""
        R, C = rows.stop - rows.start, columns.stop - columns.start
        out = self.buffer[:R, :C] if self.buffer.shape[1] == C else self.buffer.view(-1)[: R * C].view(R, C)
        if self.product_dtype == out.dtype:
            return torch.mm(self.x(rows), self.y(columns).T, out=out)
        return out.copy_(torch.mm(self.x(rows), self.y(columns).T))

    def scaled(self, dots: Tensor, place: slice, dim: int) -> Tensor:
        """z of one direction, a new tensor: dim 1 for the rows', 0 for the columns'."""
        block = self.block
        scale = block.row_scale if dim == 1 or block.column_scale is None else block.column_scale
        z = dots * (scale if scale.dim() == 0 else scale[place].unsqueeze(dim))
        return z if block.bias is None else z.add_(block.bias)

    def shared(self, rows: slice, columns: slice) -> Tensor:
        """z for both directions at once, in the buffer."""
        z = self.dots(rows, columns).mul_(self.block.row_scale)
        return z if self.block.bias is None else z.add_(self.block.bias)


def _fill(z: Tensor, same: Same, over: Over, value: float, copy: bool = True) -> Tensor:
    """z with `value` at the candidates that `over` leaves out."""
    if over == "all" or (over == "negatives" and same is None):
        return z
    if over == "negatives":
        if isinstance(same, Tensor):
            return z.masked_fill(same, value) if copy else z.masked_fill_(same, value)
        z = z.clone() if copy else z
        z[same] = value
        return z
    kept = torch.full_like(z, value)
    if same is not None:
        kept[same] = z[same]
    return kept


def _reduce(reduction: Reduction, z: Tensor, same: Same, dim: int) -> Tensor:
    match reduction:
        case LogSumExp(exponent=exponent):
            return _fill(exponent * z, same, reduction.over, -torch.inf, copy=False).logsumexp(dim)
        case SoftplusSum():
            return F.softplus(_fill(z, same, reduction.over, -torch.inf), threshold=LINEAR).sum(dim)
        case Sum():
            return _fill(z, same, reduction.over, 0.0).sum(dim)
        case Maximum():
            return _fill(z, same, reduction.over, -torch.inf).amax(dim)
    raise TypeError(f"the torch backend has no {reduction}: backend='dense' may")


def _derivative(reduction: Reduction, z: Tensor, same: Same, value: Tensor, grad: Tensor) -> Tensor:
    """grad · ∂ reduction / ∂ z, [R, C]."""
    match reduction:
        case LogSumExp(exponent=exponent):
            exponents = _fill(exponent * z, same, reduction.over, -torch.inf, copy=False)
            return exponents.sub_(value).exp_().mul_(exponent * grad)
        case SoftplusSum():
            return _fill(z, same, reduction.over, -torch.inf).sigmoid().mul_(grad)
        case Sum():
            return _fill(torch.ones_like(z), same, reduction.over, 0.0, copy=False).mul_(grad)
    raise TypeError(f"the torch backend has no {reduction}: backend='dense' may")


def _shared_exponential(block: Block) -> LogSumExp | None:
    """The one log-sum-exp over negatives, with one scale, of both directions: rows and columns can share exponentials.

    Only on the CPU, where asking whether they stay in range costs no synchronisation.
    """
    match block.reductions:
        case (LogSumExp(exponent=1.0, over="negatives") as reduction,) if block.both and block.row_scale.dim() == 0:
            return reduction if block.x.device.type == "cpu" else None
    return None


def _shared_forward(z: Tensor, same: Same) -> tuple[Tensor, Tensor] | None:
    """Log-sum-exps of a tile's rows and columns from one exponential about the tile's maximum; None out of range.
    Overwrites z."""
    z = _fill(z, same, "negatives", -torch.inf, copy=False)
    shift = z.amax()
    if shift == -torch.inf:
        return None
    z.sub_(shift).exp_()
    rows, columns = z.sum(1), z.sum(0)
    floor = torch.tensor(-SAFE_RANGE).exp()
    if rows.amin() < floor or columns.amin() < floor:
        return None
    return rows.log_().add_(shift), columns.log_().add_(shift)


def _shared_backward(scores: _Scores, rows: slice, columns: slice, same: Same, sides: tuple) -> Tensor | None:
    """w = e^{z−m} · (g_i e^{m−R_i} + h_j e^{m−C_j}) in the buffer, or None where m−R or m−C is out of range."""
    (((row_value,), (row_grad,), _), ((column_value,), (column_grad,), _)) = sides
    row_value, column_value = row_value[rows], column_value[columns]
    shift = max(row_value.max(), column_value.max())
    if shift - min(row_value.min(), column_value.min()) > SAFE_RANGE:
        return None
    z = _fill(scores.shared(rows, columns), same, "negatives", -torch.inf, copy=False).sub_(shift).exp_()
    row_weight = row_grad[rows] * (shift - row_value).exp()
    column_weight = column_grad[columns] * (shift - column_value).exp()
    return z.mul_(row_weight.unsqueeze(1) + column_weight)
