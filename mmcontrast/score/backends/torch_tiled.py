"""The backend of tiles in plain PyTorch, on any device: O(n + m) memory beside one tile, exact gradients by recomputation.

Forward and backward take four score-sized products, and two exponentials if both directions can share them.
Shapes: R, C rows and columns of a tile.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mmcontrast.score.backends.base import Block, Gradients, Statistics, finite, lacks_in_torch
from mmcontrast.score.backends.tiles import Weights, cut, gradients_by_tiles, product, product_dtype
from mmcontrast.score.links import Link
from mmcontrast.score.reductions import CrossSum, LogSumExp, Maximum, Reduction, SoftplusSum, Sum
from mmcontrast.score.teachers import Teacher

CPU_TILE = (2048, 1024)  # about the fastest of (512 … 4096) × (256 … 2048) at D = 256, 512 and 1,024
SAFE_RANGE = 60.0  # natural logarithm: within it of a common shift, fp32 exponentials neither overflow nor lose digits
LINEAR = 40.0  # above this log(1 + exp(z)) = z to the last digit of float64

Sides = list[tuple[int, Tensor, Tensor]]  # (the reduced dimension, values, upstream gradients)


class TorchTiled:
    """The backend of tiles in plain PyTorch; see `Backend`."""

    def lacks(self, x: Tensor, reductions: Sequence[Reduction], link: Link | None) -> str | None:
        return lacks_in_torch(x, reductions, link)

    def forward(self, block: Block) -> Statistics:
        n, m = len(block.x), len(block.y)
        out = Statistics(
            [block.x.new_full((n,), r.identity, dtype=block.dtype) for r in block.reductions],
            [block.x.new_full((m,), r.identity, dtype=block.dtype) for r in block.reductions if block.both],
        )
        size, scores = tile_size(block), _Scores(block)
        for rows in cut(n, size[0]):
            for columns in cut(m, size[1]):
                tile = scores.tile(rows, columns)
                for dims in scores.views():
                    tile.view(dims)
                    for k, reduction in enumerate(block.reductions):
                        for dim, part in zip(dims, _reduce(reduction, tile, dims, scores.work(0, tile.z)), strict=True):
                            total = out.rows[k][rows] if dim == 1 else out.columns[k][columns]
                            total.copy_(reduction.merge(total, part))
        return out

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor | None) -> Gradients:
        row_values, row_grads = finite(final.rows, grads.rows)
        column_values, column_grads = finite(final.columns, grads.columns)
        scores = _Scores(block)

        def derivative(tile: _Tile, dims: tuple[int, ...], grads: Statistics) -> Tensor:
            """Return ∂loss/∂z [R, C] through the reductions of dims."""
            total = None
            for k, reduction in enumerate(block.reductions):
                if isinstance(reduction, Maximum):
                    continue
                sides: Sides = [
                    (1, row_values[k][tile.rows, None], grads.rows[k][tile.rows, None])
                    if dim == 1
                    else (0, column_values[k][tile.columns], grads.columns[k][tile.columns])
                    for dim in dims
                ]
                part = _derivative(reduction, tile, sides, scores.work(1 if total is None else 2, tile.z))
                total = part if total is None else total.add_(part)
            return scores.work(1, tile.z).zero_() if total is None else total  # only maxima

        def weights(rows: slice, columns: slice, grads: Statistics) -> Weights:
            """Return the weights of a tile."""
            tile = scores.tile(rows, columns)
            plain = len(scores.views()) == 1 and not block.folded
            out = Weights(tile.product if plain else torch.zeros_like(tile.product))
            for dims in scores.views():
                tile.view(dims)
                d_z = derivative(tile, dims, grads)
                if block.bias is not None:
                    out.bias = d_z.sum() if out.bias is None else out.bias + d_z.sum()
                if plain:
                    out.w = d_z
                elif not block.folded:
                    out.w += d_z
                else:
                    scale, by_scale = tile.scale(dims), d_z * tile.linked
                    if block.row_scale.dim() == 0:
                        out.row_scale = by_scale.sum() if out.row_scale is None else out.row_scale + by_scale.sum()
                    elif dims == (1,):
                        out.row_scale = by_scale.sum(1)
                    elif block.column_scale is not None:
                        out.column_scale = by_scale.sum(0)
                    out.w.addcmul_(d_z, scale)
            if block.link is not None:
                slope, by_parameter = block.link.slopes(tile.product)
                out.parameter = (out.w * by_parameter).sum()
                out.w *= slope
            return out

        finite_grads = Statistics(row_grads, column_grads)
        return gradients_by_tiles(block, finite_grads, dx, tile_size(block), lambda grads: partial(weights, grads=grads))


def tile_size(block: Block) -> tuple[int, int]:
    """Return the rows and columns of a tile: about what fits the caches of a CPU; on a GPU enough to keep it busy, while the
    five fp32 buffers of a tile take no more memory than the inputs (down to 4,096 rows: 320 MiB)."""
    if block.tile_size is not None or block.x.device.type == "cpu":
        return block.tile_size or CPU_TILE
    bytes_of_inputs = (block.x.numel() + block.y.numel()) * block.x.element_size()
    side = min(max(int((bytes_of_inputs / 20) ** 0.5) // 256 * 256, 4096), 8192)
    return side, side


class _Scores:
    """The tiles of a block's scores, with buffers of a tile's size that are allocated once and used for every tile."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.buffers: dict[int, Tensor] = {}
        self.size = min(tile_size(block)[0], len(block.x)) * min(tile_size(block)[1], len(block.y))

    def work(self, number: int, like: Tensor) -> Tensor:
        """Return the number-th buffer in the shape of `like`; its contents are overwritten."""
        if number not in self.buffers:
            self.buffers[number] = torch.empty(self.size, dtype=self.block.dtype, device=like.device)
        return self.buffers[number][: like.numel()].view(like.shape)

    def views(self) -> list[tuple[int, ...]]:
        """Return the dimensions to reduce, together if both directions have the same scores and candidates."""
        if not self.block.both:
            return [(1,)]
        return [(1, 0)] if self.block.row_scale.dim() == 0 and self.block.limits is None else [(1,), (0,)]

    def tile(self, rows: slice, columns: slice) -> "_Tile":
        """Compute a tile's products."""
        block, dtype = self.block, product_dtype(self.block)
        x, y = block.x[rows].to(dtype), block.y[columns].to(dtype)
        if -1 not in self.buffers:
            self.buffers[-1] = torch.empty(self.size, dtype=block.dtype, device=x.device)
        out = self.buffers[-1][: len(x) * len(y)].view(len(x), len(y))
        dots = torch.mm(x, y.T, out=out) if dtype == out.dtype else out.copy_(product(x, y.T, out.dtype))
        return _Tile(self, rows, columns, dots)


class _Tile:
    """One tile, viewed by one direction or both.

    Attributes:
        product: x·y [R, C]. linked: φ of it. z: the scores of the current view. above: candidates above the limits.
    """

    def __init__(self, scores: _Scores, rows: slice, columns: slice, product: Tensor) -> None:
        self.scores, self.block, self.rows, self.columns, self.product = scores, scores.block, rows, columns, product
        self.same = self.block.same.tile(rows, columns)
        self.linked = product if self.block.link is None else self.block.link.value(product)
        self.z = product
        self.above: Tensor | None = None

    def scale(self, dims: tuple[int, ...]) -> Tensor:
        """Return the scale of a view, [] or per anchor, to be multiplied with [R, C]."""
        block = self.block
        if block.row_scale.dim() == 0:
            return block.row_scale
        by_row = dims == (1,) or block.column_scale is None
        return block.row_scale[self.rows, None] if by_row else block.column_scale[self.columns]  # type: ignore[index]

    def view(self, dims: tuple[int, ...]) -> None:
        """Compute z and `above` for a view; z overwrites the product if nothing else needs it."""
        block = self.block
        in_place = len(self.scores.views()) == 1 and not block.folded
        self.z = torch.mul(self.linked, self.scale(dims), out=self.product if in_place else self.scores.work(3, self.product))
        if block.bias is not None:
            self.z.add_(block.bias)
        if block.limits is not None:
            limits, guide = block.limits, block.limits.guide
            compared = self.z if guide is None else self.scores_of(guide)
            by_row = dims == (1,) or limits.columns is None
            limit = limits.rows[self.rows, None] if by_row else limits.columns[self.columns]  # type: ignore[index]
            self.above = compared > limit

    def scores_of(self, teacher: Teacher) -> Tensor:
        """Return a teacher's scores of the tile."""
        u, v = teacher.rows[self.rows].to(self.block.dtype), teacher.columns[self.columns].to(self.block.dtype)
        return torch.mm(u, v.T).mul_(teacher.scale)

    def targets(self, dim: int) -> Tensor:
        """Return the mean [R, C] of the teachers' softmaxes along one dimension, over all candidates of all tiles."""
        total = None
        for teacher in self.block.teachers:
            sums = teacher.row_log_sums if dim == 1 else teacher.column_log_sums
            assert sums is not None
            part = self.scores_of(teacher).sub_(sums[self.rows, None] if dim == 1 else sums[self.columns]).exp_()
            total = part if total is None else total.add_(part)
        assert total is not None, "CrossSum has a teacher"
        return total.div_(len(self.block.teachers))

    def drop(self, values: Tensor, reduction: Reduction, value: float) -> Tensor:
        """`value`, in place, at the candidates that a reduction leaves out."""
        same = self.same
        if reduction.over == "negatives" and same is not None:
            if isinstance(same, Tensor):
                values.masked_fill_(same, value)
            else:
                values[same] = value
        elif reduction.over == "positives":
            if isinstance(same, Tensor):
                values.masked_fill_(~same, value)
            else:
                kept = None if same is None else values[same]
                values.fill_(value)
                if same is not None and kept is not None:
                    values[same] = kept
        return values.masked_fill_(self.above, value) if reduction.below and self.above is not None else values


def _reduce(reduction: Reduction, tile: _Tile, dims: tuple[int, ...], work: Tensor) -> list[Tensor]:
    """Return the reduction of z [R, C] along each of dims. z is not changed."""
    z = tile.z
    match reduction:
        case LogSumExp(exponent=exponent):
            both = None
            if len(dims) == 2 and z.device.type == "cpu":  # elsewhere the range check would wait for the device
                both = _shared_log_sum_exps(tile.drop(torch.mul(z, exponent, out=work), reduction, -torch.inf))
            return both or [
                _log_sum_exp(tile.drop(torch.mul(z, exponent, out=work), reduction, -torch.inf), dim) for dim in dims
            ]
        case SoftplusSum():
            torch.ops.aten.softplus.out(z, 1, LINEAR, out=work)
            tile.drop(work, reduction, 0.0)
            return [work.sum(dim) for dim in dims]
        case Sum():
            tile.drop(work.copy_(z), reduction, 0.0)
            return [work.sum(dim) for dim in dims]
        case Maximum():
            tile.drop(work.copy_(z), reduction, -torch.inf)
            return [work.amax(dim) for dim in dims]
        case CrossSum():
            return [tile.drop(tile.targets(dim).mul_(z), reduction, 0.0).sum(dim) for dim in dims]
    raise TypeError(f"the torch backend has no {reduction}")


def _log_sum_exp(z: Tensor, dim: int) -> Tensor:
    """Return the log-sum-exp along one dimension. Overwrites z."""
    shift = z.amax(dim, keepdim=True)
    shift.masked_fill_(shift.isneginf(), 0.0)
    return z.sub_(shift).exp_().sum(dim).log_().add_(shift.squeeze(dim))


def _shared_log_sum_exps(z: Tensor) -> list[Tensor] | None:
    """Return the log-sum-exps of rows and columns from one exponential relative to the tile's maximum; None if a value is out
    of range. Overwrites z."""
    shift = z.amax()
    if shift == -torch.inf:
        return None
    z.sub_(shift).exp_()
    rows, columns = z.sum(1), z.sum(0)
    floor = torch.tensor(-SAFE_RANGE).exp()
    if rows.amin() < floor or columns.amin() < floor:
        return None
    return [rows.log_().add_(shift), columns.log_().add_(shift)]


def _derivative(reduction: Reduction, tile: _Tile, sides: Sides, work: Tensor) -> Tensor:
    """Return Σ over the sides of grad · ∂ reduction / ∂ z, [R, C], in `work`. z is not changed."""
    z, scores = tile.z, tile.scores
    match reduction:
        case LogSumExp(exponent=exponent):
            shared = _shared_shift(sides) if len(sides) == 2 and z.device.type == "cpu" else None
            if shared is not None:  # e^{z−m} · (g_i e^{m−R_i} + h_j e^{m−C_j})
                _minus(z, exponent, shared, work).exp_()
                sides = [(dim, value, exponent * grad * (shared - value).exp_()) for dim, value, grad in sides]
                return tile.drop(work, reduction, 0.0).mul_(_outer(sides, scores, z))
            for number, (_, value, grad) in enumerate(sides):
                out = scores.work(4, z) if number else work
                _minus(z, exponent, value, out).exp_()
                tile.drop(out, reduction, 0.0).mul_(exponent * grad)
            return work.add_(scores.work(4, z)) if len(sides) == 2 else work
        case SoftplusSum():
            return tile.drop(torch.sigmoid(z, out=work), reduction, 0.0).mul_(_outer(sides, scores, z))
        case Sum():
            return tile.drop(work.copy_(_outer(sides, scores, z).expand_as(z)), reduction, 0.0)
        case CrossSum():
            work.zero_()
            for dim, _, grad in sides:
                work.addcmul_(tile.targets(dim), grad)
            return tile.drop(work, reduction, 0.0)
    raise TypeError(f"the torch backend has no {reduction}")


def _minus(z: Tensor, exponent: float, shift: Tensor, out: Tensor) -> Tensor:
    """Return exponent · z − shift, in `out`."""
    return torch.sub(z, shift, out=out) if exponent == 1 else torch.mul(z, exponent, out=out).sub_(shift)


def _outer(sides: Sides, scores: _Scores, like: Tensor) -> Tensor:
    """Return the sides' gradients, or the sum of two, to be multiplied with [R, C]."""
    if len(sides) == 1:
        return sides[0][2]
    return torch.add(sides[0][2], sides[1][2], out=scores.work(4, like))


def _shared_shift(sides: Sides) -> Tensor | None:
    """Return the largest of both sides' values; None if another value is out of range of it."""
    ends = [(value.amax(), value.amin()) for _, value, _ in sides]
    shift = torch.maximum(ends[0][0], ends[1][0])
    return shift if shift - min(ends[0][1], ends[1][1]) <= SAFE_RANGE else None
