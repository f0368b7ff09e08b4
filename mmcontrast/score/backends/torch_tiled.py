"""Tiles in plain PyTorch, on any device: O(n + m) memory beside one tile, exact gradients by recomputation.

Per forward and backward: four score-sized products, and two exponentials where both directions can share them.
Shapes: R, C rows and columns of a tile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcontrast.score.backends.base import Block, Gradients, Statistics, finite, lacks_in_torch
from mmcontrast.score.backends.tiles import Weights, cut, gradients_by_tiles, product, product_dtype
from mmcontrast.score.reductions import LogSumExp, Maximum, Over, Reduction, SoftplusSum, Sum

CPU_TILE = (2048, 1024)  # of (512 … 4096) × (256 … 2048) the fastest or near it at D = 256, 512 and 1,024
SAFE_RANGE = 60.0  # natural logarithm: within it of a common shift, fp32 exponentials neither overflow nor lose digits
LINEAR = 40.0  # above it log(1 + exp(z)) = z to the last digit of float64

Same = tuple[Tensor, Tensor] | Tensor | None
Sides = list[tuple[int, Tensor, Tensor]]  # (the tensor dimension that is reduced, values, upstream gradients)


class TorchTiled:
    """See `Backend`."""

    def lacks(self, x: Tensor, reductions: Sequence[Reduction]) -> str | None:
        return lacks_in_torch(x, reductions)

    def forward(self, block: Block) -> Statistics:
        n, m = len(block.x), len(block.y)
        out = Statistics(
            [block.x.new_full((n,), r.identity, dtype=block.dtype) for r in block.reductions],
            [block.x.new_full((m,), r.identity, dtype=block.dtype) for r in block.reductions if block.both],
        )
        tile, scores = tile_size(block), _Scores(block)
        for rows in cut(n, tile[0]):
            for columns in cut(m, tile[1]):
                same, dots = block.same.tile(rows, columns), scores.dots(rows, columns)
                for dims in scores.views():
                    z_RC = scores.scaled(dots, rows, columns, dims)
                    for k, reduction in enumerate(block.reductions):
                        parts = _reduce(reduction, z_RC, same, dims, scores.work(0, z_RC))
                        for dim, part in zip(dims, parts, strict=True):
                            total = out.rows[k][rows] if dim == 1 else out.columns[k][columns]
                            total.copy_(reduction.merge(total, part))
        return out

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor) -> Gradients:
        row_values, row_grads = finite(final.rows, grads.rows)
        column_values, column_grads = finite(final.columns, grads.columns)
        scores, per_anchor = _Scores(block), block.row_scale.dim() > 0

        def weights(rows: slice, columns: slice, grads: Statistics) -> Weights:
            same, dots = block.same.tile(rows, columns), scores.dots(rows, columns)
            out = Weights(scores.work(0, dots).zero_() if per_anchor else dots)
            for dims in scores.views():
                z_RC = scores.scaled(dots, rows, columns, dims)
                own_RC = None
                for k, reduction in enumerate(block.reductions):
                    if isinstance(reduction, Maximum):
                        continue
                    sides: Sides = [
                        (1, row_values[k][rows, None], grads.rows[k][rows, None])
                        if dim == 1
                        else (0, column_values[k][columns], grads.columns[k][columns])
                        for dim in dims
                    ]
                    part = _derivative(reduction, z_RC, same, sides, scores.work(1 if own_RC is None else 2, z_RC), scores)
                    own_RC = part if own_RC is None else own_RC.add_(part)
                if own_RC is None:  # nothing but maxima
                    own_RC = scores.work(1, z_RC).zero_()
                if block.bias is not None:
                    out.bias = own_RC.sum() if out.bias is None else out.bias + own_RC.sum()
                if not per_anchor:
                    out.w = own_RC
                elif dims == (1,):
                    out.row_scale = torch.mul(own_RC, dots, out=scores.work(2, dots)).sum(1)
                    out.w.addcmul_(own_RC, block.row_scale[rows, None])
                elif block.column_scale is not None:
                    out.column_scale = torch.mul(own_RC, dots, out=scores.work(2, dots)).sum(0)
                    out.w.addcmul_(own_RC, block.column_scale[columns])
            return out

        return gradients_by_tiles(block, Statistics(row_grads, column_grads), dx, tile_size(block), weights)


def tile_size(block: Block) -> tuple[int, int]:
    """Rows and columns of a tile: what stays near the caches of a CPU; on a GPU, what keeps it busy while the five fp32
    buffers of a tile take no more memory than the inputs (down to 1,024 rows)."""
    if block.tile_size is not None or block.x.device.type == "cpu":
        return block.tile_size or CPU_TILE
    bytes_of_inputs = (block.x.numel() + block.y.numel()) * block.x.element_size()
    side = min(max(int((bytes_of_inputs / 20) ** 0.5) // 256 * 256, 1024), 8192)
    return side, side


class _Scores:
    """The tiles of a block's scores, and work space of their size: allocated once, used for every tile."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.buffers: dict[int, Tensor] = {}
        self.size = min(tile_size(block)[0], len(block.x)) * min(tile_size(block)[1], len(block.y))

    def work(self, number: int, like: Tensor) -> Tensor:
        """The number-th buffer, of the shape of `like`; what was in it is lost."""
        if number not in self.buffers:
            self.buffers[number] = torch.empty(self.size, dtype=self.block.dtype, device=like.device)
        return self.buffers[number][: like.numel()].view(like.shape)

    def views(self) -> list[tuple[int, ...]]:
        """The dimensions to reduce, together where both directions have the same scores."""
        if self.block.row_scale.dim() == 0:
            return [(1, 0) if self.block.both else (1,)]
        return [(1,), (0,)] if self.block.both else [(1,)]

    def dots(self, rows: slice, columns: slice) -> Tensor:
        """x·y [R, C], in a buffer of its own."""
        dtype = product_dtype(self.block)
        x, y = self.block.x[rows].to(dtype), self.block.y[columns].to(dtype)
        if -1 not in self.buffers:
            self.buffers[-1] = torch.empty(self.size, dtype=self.block.dtype, device=x.device)
        out = self.buffers[-1][: len(x) * len(y)].view(len(x), len(y))
        return torch.mm(x, y.T, out=out) if dtype == out.dtype else out.copy_(product(x, y.T, out.dtype))

    def scaled(self, dots: Tensor, rows: slice, columns: slice, dims: tuple[int, ...]) -> Tensor:
        """z of one view: in place of `dots` where it serves both directions."""
        block = self.block
        if block.row_scale.dim() == 0:
            z = dots.mul_(block.row_scale)
        else:
            scale = block.row_scale[rows, None] if dims == (1,) or block.column_scale is None else block.column_scale[columns]
            z = torch.mul(dots, scale, out=self.work(3, dots))
        return z if block.bias is None else z.add_(block.bias)


def _drop(values: Tensor, same: Same, over: Over, value: float) -> Tensor:
    """`value`, in place, at the candidates that `over` leaves out."""
    if over == "negatives" and same is not None:
        if isinstance(same, Tensor):
            return values.masked_fill_(same, value)
        values[same] = value
    elif over == "positives":
        if isinstance(same, Tensor):
            return values.masked_fill_(~same, value)
        kept = None if same is None else values[same]
        values.fill_(value)
        if same is not None and kept is not None:
            values[same] = kept
    return values


def _reduce(reduction: Reduction, z: Tensor, same: Same, dims: tuple[int, ...], work: Tensor) -> list[Tensor]:
    """The reduction of z [R, C] along each of dims. z stays as it is."""
    match reduction:
        case LogSumExp(exponent=exponent):
            both = None
            if len(dims) == 2 and z.device.type == "cpu":  # elsewhere the range check would wait for the device
                both = _shared_log_sum_exps(_drop(torch.mul(z, exponent, out=work), same, reduction.over, -torch.inf))
            return both or [
                _log_sum_exp(_drop(torch.mul(z, exponent, out=work), same, reduction.over, -torch.inf), dim) for dim in dims
            ]
        case SoftplusSum():
            torch.ops.aten.softplus.out(z, 1, LINEAR, out=work)
            _drop(work, same, reduction.over, 0.0)
            return [work.sum(dim) for dim in dims]
        case Sum():
            _drop(work.copy_(z), same, reduction.over, 0.0)
            return [work.sum(dim) for dim in dims]
        case Maximum():
            _drop(work.copy_(z), same, reduction.over, -torch.inf)
            return [work.amax(dim) for dim in dims]
    raise TypeError(f"the torch backend has no {reduction}")


def _log_sum_exp(z: Tensor, dim: int) -> Tensor:
    """Along one dimension; overwrites z."""
    shift = z.amax(dim, keepdim=True)
    shift.masked_fill_(shift.isneginf(), 0.0)
    return z.sub_(shift).exp_().sum(dim).log_().add_(shift.squeeze(dim))


def _shared_log_sum_exps(z: Tensor) -> list[Tensor] | None:
    """Of rows and columns, from one exponential about the tile's maximum; None out of range. Overwrites z."""
    shift = z.amax()
    if shift == -torch.inf:
        return None
    z.sub_(shift).exp_()
    rows, columns = z.sum(1), z.sum(0)
    floor = torch.tensor(-SAFE_RANGE).exp()
    if rows.amin() < floor or columns.amin() < floor:
        return None
    return [rows.log_().add_(shift), columns.log_().add_(shift)]


def _derivative(reduction: Reduction, z: Tensor, same: Same, sides: Sides, work: Tensor, scores: _Scores) -> Tensor:
    """Σ over the sides of grad · ∂ reduction / ∂ z, [R, C], in `work`. z stays as it is."""
    match reduction:
        case LogSumExp(exponent=exponent):
            shared = _shared_shift(sides) if len(sides) == 2 and z.device.type == "cpu" else None
            if shared is not None:  # e^{z−m} · (g_i e^{m−R_i} + h_j e^{m−C_j})
                _minus(z, exponent, shared, work).exp_()
                sides = [(dim, value, exponent * grad * (shared - value).exp_()) for dim, value, grad in sides]
                return _drop(work, same, reduction.over, 0.0).mul_(_outer(sides, scores, z))
            for number, (_, value, grad) in enumerate(sides):
                out = scores.work(4, z) if number else work
                _minus(z, exponent, value, out).exp_()
                _drop(out, same, reduction.over, 0.0).mul_(exponent * grad)
            return work.add_(scores.work(4, z)) if len(sides) == 2 else work
        case SoftplusSum():
            return _drop(torch.sigmoid(z, out=work), same, reduction.over, 0.0).mul_(_outer(sides, scores, z))
        case Sum():
            return _drop(work.copy_(_outer(sides, scores, z).expand_as(z)), same, reduction.over, 0.0)
    raise TypeError(f"the torch backend has no {reduction}")


def _minus(z: Tensor, exponent: float, shift: Tensor, out: Tensor) -> Tensor:
    """exponent · z − shift, in out."""
    return torch.sub(z, shift, out=out) if exponent == 1 else torch.mul(z, exponent, out=out).sub_(shift)


def _outer(sides: Sides, scores: _Scores, like: Tensor) -> Tensor:
    """The sides' gradients, to be multiplied with [R, C]: their sum where there are two."""
    if len(sides) == 1:
        return sides[0][2]
    return torch.add(sides[0][2], sides[1][2], out=scores.work(4, like))


def _shared_shift(sides: Sides) -> Tensor | None:
    """The largest of both sides' values, if none is out of range of it."""
    ends = [(value.amax(), value.amin()) for _, value, _ in sides]
    shift = torch.maximum(ends[0][0], ends[1][0])
    return shift if shift - min(ends[0][1], ends[1][1]) <= SAFE_RANGE else None
