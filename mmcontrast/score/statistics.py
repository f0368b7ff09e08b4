"""The primitive: streaming reductions of a score matrix that is never stored, with exact gradients, over any ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcontrast.score.backends import Backend, Block, SameGroup, Statistics, choose
from mmcontrast.score.exact import outside_autocast, scalar, without_autocast
from mmcontrast.score.ranks import Communication, Driver, Merge, driver, exchange
from mmcontrast.score.reductions import Maximum, Reduction

CHUNK = 8192  # rows whose copies in the accumulators' dtype exist at a time


@dataclass(frozen=True)
class Direction:
    """What an objective sees: one side of a pair as anchors, N of them, each with its positive and its reductions.

    Attributes:
        positives: [N] scores z_ii of the matched pairs.
        num_negatives: [N] int64, candidates of other groups.
        scale: [] or [N], inside the scores.
        values: [N] for each reduction; read them as `direction[LogSumExp()]`.
        name: "image_to_text", anchors first.
        sample_ids: [N] int64 or None, the key of per-sample state.
        everyone: [N, …] of this rank's anchors → those of all ranks, in one order.
    """

    positives: Tensor
    num_negatives: Tensor
    scale: Tensor
    values: dict[Reduction, Tensor]
    name: str = ""
    sample_ids: Tensor | None = None
    everyone: Callable[[Tensor], Tensor] = lambda rows: rows

    def __getitem__(self, reduction: Reduction) -> Tensor:
        return self.values[reduction]

    def with_more(self, other: "Direction") -> "Direction":
        """The same anchors against further candidates, whose statistics are `other`."""
        return replace(
            self,
            num_negatives=self.num_negatives + other.num_negatives,
            values={r: r.merge(value, other[r]) for r, value in self.values.items()},
        )


@outside_autocast
def score_statistics(
    x: Tensor,
    y: Tensor,
    reductions: Sequence[Reduction],
    *,
    scale: Tensor | float,
    column_scale: Tensor | None = None,
    bias: Tensor | float | None = None,
    ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    paired: bool = True,
    columns: bool = True,
    backend: str = "auto",
    tile_size: int | tuple[int, int] | None = None,
    group: dist.ProcessGroup | None = None,
    communication: Communication = "ring",
) -> tuple[Direction, Direction | None]:
    """Reductions of the scores z_ij = scale · x_i·y_j + bias along every row and, with `columns`, every column.

    Row i's candidates are the columns of all ranks of `group`; its positive is y_i. O((N + M)·D) memory; differentiable
    once by x, y, scale, column_scale and bias. Autocast does not reach it: the inputs' dtype says how it is computed. With a
    group, every rank must call this and its backward, and gradients are those of the sum of what the ranks derive from it.

    Args:
        x, y: [N, D] and [M, D], this rank's rows and columns, of one dtype.
        reductions: what to compute; see `mmcontrast.score.reductions`.
        scale: scalar; or [N] for the row direction, with column_scale [M] for the columns' if `columns`.
        bias: scalar added to every score.
        ids: [N] int64 ≥ 0, the rows' groups; default: all different, over all ranks, i-th row and column alike.
        column_ids: [M] int64; default: `ids` if paired, else of no row's group.
        paired: y_i is x_i's positive; otherwise the positives are 0.
        columns: also the reductions along columns, from the same pass.
        backend: "triton" (fused kernels, GPU), "torch" (tiled, any device) or "dense" (the oracle); "auto" is "triton"
            where it has the device, dtype and reductions, else "torch".
        tile_size: rows and columns of a tile (one number, or two), for the tiled backends.
        group: a torch.distributed group; None: this process alone.
        communication: "ring" (two column blocks on a rank at a time, overlapped with the work) or "gather" (all columns on
            every rank at once, in a few large collectives). Same on all ranks.

    Returns:
        The rows' direction, and the columns' (positives shared; None without `columns`).

    Raises:
        ValueError: for shapes or options that do not fit.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or x.dtype != y.dtype:
        raise ValueError(
            f"x and y must be [N, D] and [M, D] of one dtype, not {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
        )
    if (paired and len(x) != len(y)) or (columns and not paired):
        raise ValueError(f"{len(x)} rows and {len(y)} columns: with paired or columns they must be matched pairs")
    if not x.is_floating_point():
        raise ValueError(f"x and y are {x.dtype}: embeddings are floating point")
    chosen = choose(backend, x, reductions)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.as_tensor(scale, dtype=dtype, device=x.device)
    per_anchor = scale.dim() == 1
    if scale.dim() and scale.shape != x.shape[:1]:
        raise ValueError(f"scale is {tuple(scale.shape)}, it must be a scalar [] or one for each of {len(x)} rows")
    if columns and per_anchor and column_scale is None:
        raise ValueError("a scale per row needs column_scale for the columns' direction")
    everyone = exchange([len(x), len(y)], group, x.device)
    rank = dist.get_rank(group) if group is not None else 0
    if ids is None:
        ids = torch.arange(len(x), device=x.device) + sum(rows for rows, _ in everyone[:rank])
    if column_ids is None:
        column_ids = ids if paired else torch.full((len(y),), -2, device=x.device)
    plan = _Plan(
        tuple(reductions),
        columns,
        chosen,
        (tile_size, tile_size) if isinstance(tile_size, int) else tile_size,
        driver(group, [m for _, m in everyone], communication),
        ids,
        column_ids,
        per_anchor,
        paired,
    )
    bias = None if bias is None else scalar(bias, dtype, x.device)
    if per_anchor and columns:
        assert column_scale is not None
        column_scale = column_scale.to(dtype)
    else:
        column_scale = scale.new_zeros(len(y)) if per_anchor else None
    positives, row_negatives, column_negatives, *values = _Scores.apply(x, y, scale, column_scale, bias, plan)
    offset = 0.0 if bias is None else bias
    k = len(plan.reductions)
    rows = Direction(positives * scale + offset, row_negatives, scale, dict(zip(plan.reductions, values[:k], strict=True)))
    if not columns:
        return rows, None
    scale = scale if column_scale is None else column_scale
    return rows, Direction(
        positives * scale + offset, column_negatives, scale, dict(zip(plan.reductions, values[k:], strict=True))
    )


@dataclass(frozen=True)
class _Plan:
    """All that the passes need beside the differentiable inputs."""

    reductions: tuple[Reduction, ...]
    both: bool
    backend: Backend
    tile_size: tuple[int, int] | None
    driver: Driver
    ids: Tensor
    column_ids: Tensor
    per_anchor: bool
    paired: bool

    def block(
        self, x: Tensor, y: Tensor, ids: Tensor, scale: Tensor, column_scale: Tensor | None, bias: Tensor | None
    ) -> Block:
        return Block(x, y, scale, column_scale, bias, SameGroup(self.ids, ids), self.reductions, self.both, self.tile_size)


def _add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


class _Scores(torch.autograd.Function):
    """(x·y of the pairs, negatives of rows, of columns, row reductions …, column reductions …)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, y, scale, column_scale, bias, plan = inputs
        backend, dtype = plan.backend, scale.dtype
        rows = [x.new_full((len(x),), r.identity, dtype=dtype) for r in plan.reductions]
        row_negatives = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        home = plan.driver.accumulator()
        merge: list[Merge] = [_add, *(r.merge for r in plan.reductions if plan.both)]
        travelling = [y, plan.column_ids] + ([column_scale] if plan.per_anchor else [])
        for step, (y_block, ids, *more) in plan.driver.visits(travelling):
            block = plan.block(x, y_block, ids, scale, more[0] if more else None, bias)
            part = backend.forward(block)
            row_negatives += len(y_block) - block.same.row_counts
            rows = [r.merge(a, b) for r, a, b in zip(plan.reductions, rows, part.rows, strict=True)]
            if plan.both:
                home.add(step, merge, [len(x) - block.same.column_counts, *part.columns])
        column_negatives, *columns = home.home() if plan.both else [row_negatives]
        dots = _row_dots(x, y, dtype) if plan.paired else x.new_zeros(len(x), dtype=dtype)
        ctx.plan = plan
        ctx.save_for_backward(x, y, scale, column_scale, bias, *rows, *columns)
        maxima = [v for r, v in zip(plan.reductions * 2, rows + columns, strict=False) if isinstance(r, Maximum)]
        ctx.mark_non_differentiable(row_negatives, column_negatives, *maxima)
        return dots, row_negatives, column_negatives, *rows, *columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        with without_autocast(upstream[0].device):
            return _Scores._gradients(ctx, *upstream)

    @staticmethod
    def _gradients(ctx: Any, *upstream: Any) -> Any:
        d_dots, _, _, *grads = upstream
        x, y, scale, column_scale, bias, *values = ctx.saved_tensors
        plan: _Plan = ctx.plan
        backend, k = plan.backend, len(plan.reductions)
        row_values, column_values = values[:k], values[k:]
        row_grads, column_grads = list(grads[:k]), list(grads[k:])
        dtype, mixed = scale.dtype, plan.per_anchor
        dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
        d_scale, d_bias = torch.zeros_like(scale), scale.new_zeros(())
        home = plan.driver.accumulator()
        travelling = [y, plan.column_ids, *column_values, *column_grads] + ([column_scale] if mixed else [])
        for step, (y_block, ids, *more) in plan.driver.visits(travelling):
            final = Statistics(row_values, more[: len(column_values)])
            grad = Statistics(row_grads, more[len(column_values) : 2 * len(column_values)])
            block = plan.block(x, y_block, ids, scale, more[-1] if mixed else None, bias)
            part = backend.backward(block, final, grad, dx)
            if part.row_scale is not None:
                d_scale += part.row_scale
            if part.bias is not None:
                d_bias += part.bias
            parts = [part.dy] if part.column_scale is None else [part.dy, part.column_scale]
            home.add(step, [_add] * len(parts), parts)
        dy, *d_column_scale = home.home()
        if not mixed:  # Σ_ij w_ij s_ij = Σ_i x_i · (W Y)_i: no pass over the scores
            d_scale = _row_dots(x, dx, dtype).sum()
        factor, d_dots = None if mixed else scale, d_dots if plan.paired else None
        dx = _finished(dx, factor, d_dots, y, x.dtype)  # its accumulator is free before the next is read
        dy = _finished(dy, factor, d_dots, x, y.dtype)
        return dx, dy, d_scale, d_column_scale[0] if d_column_scale else None, None if bias is None else d_bias, None


def _row_dots(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a_i · b_i [N] in dtype, without a copy of either in that dtype."""
    parts = [torch.linalg.vecdot(p.to(dtype), q.to(dtype)) for p, q in zip(a.split(CHUNK), b.split(CHUNK), strict=True)]
    return torch.cat(parts)


def _finished(total: Tensor, factor: Tensor | None, weights: Tensor | None, partners: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · total_i + weights_i · partners_i [N, D], in dtype. Overwrites total."""
    out = total if dtype == total.dtype else torch.empty_like(total, dtype=dtype)
    for start in range(0, len(total), CHUNK):
        rows = slice(start, start + CHUNK)
        part = total[rows] if factor is None else total[rows].mul_(factor)
        if weights is not None:
            part.addcmul_(weights[rows].unsqueeze(1), partners[rows].to(part.dtype))
        if out is not total:
            out[rows] = part
    return out
