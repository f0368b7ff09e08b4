"""`score_statistics`: streaming reductions of a score matrix that is never stored, with exact gradients, over any ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcontrast.score.backends import Backend, Block, SameGroup, Statistics, choose
from mmcontrast.score.exact import outside_autocast, scalar, without_autocast
from mmcontrast.score.links import Link
from mmcontrast.score.ranks import Communication, Driver, Everyone, Merge, agreed, driver, exchange, ranks_of_node
from mmcontrast.score.reductions import CrossSum, LogSumExp, Maximum, Reduction
from mmcontrast.score.teachers import Limits, Teacher

CHUNK = 8192  # rows that are copied to the accumulators' dtype at a time


@dataclass(frozen=True)
class Direction:
    """The input of an objective: one side of a pair as N anchors, each with its positive and its reductions.

    Attributes:
        positives: [N] scores z_ii of the matched pairs.
        num_negatives: [N] int64, candidates of other groups.
        scale: [] or [N], which the scores include.
        values: [N] for each reduction; read them as `direction[LogSumExp()]`.
        name: "image_to_text", anchors first.
        sample_ids: [N] int64 or None, the keys of per-sample state.
        given: the values [N] of the objective's `sample_values` that the caller passes, by name.
        everyone: the ranks with such anchors; calling it gathers [N, …] from all of them, in order.
    """

    positives: Tensor
    num_negatives: Tensor
    scale: Tensor
    values: dict[Reduction, Tensor]
    name: str = ""
    sample_ids: Tensor | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    everyone: Everyone = field(default_factory=Everyone)

    def __getitem__(self, reduction: Reduction) -> Tensor:
        return self.values[reduction]

    def with_more(self, other: "Direction") -> "Direction":
        """Return the same anchors with further candidates, whose statistics are `other`."""
        return replace(
            self,
            num_negatives=self.num_negatives + other.num_negatives,
            values={reduction: reduction.merge(value, other[reduction]) for reduction, value in self.values.items()},
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
    communication: Communication = "auto",
    sizes: Sequence[Sequence[int]] | None = None,
    within: int | None = None,
    link: Link | None = None,
    limits: Limits | None = None,
    teachers: Sequence[Teacher] = (),
) -> tuple[Direction, Direction | None]:
    """Return reductions of the scores z_ij = scale · x_i·y_j + bias along every row and, with `columns`, every column.

    Row i's candidates are the columns of all ranks of `group`; its positive is y_i. It needs O((N + M)·D) memory, and is
    differentiable once by x, y, scale, column_scale, bias and the link's parameter. Products for a side that needs no gradient
    are left out. Autocast does not affect it: the inputs' dtype determines the computation. With a group, every rank must call
    this and its backward, the same sides must need gradients on all ranks, and gradients are those of the sum of all ranks'
    results.

    Args:
        x, y: [N, D] and [M, D], this rank's rows and columns, of one dtype.
        reductions: those to compute; see `mmcontrast.score.reductions`.
        scale: scalar; or [N] for the row direction, with column_scale [M] for the columns' if `columns`.
        bias: scalar added to every score.
        ids: [N] int64 ≥ 0, the rows' groups; default: all different, over all ranks; row i and column i have the same.
        column_ids: [M] int64; default: `ids` if paired, else in no row's group.
        paired: y_i is x_i's positive; otherwise the positives are 0.
        columns: also the reductions along columns, from the same pass.
        backend: "triton" (fused kernels, GPU), "torch" (tiled, any device) or "dense" (the oracle); "auto" is "triton"
            if it supports the device, dtype and reductions, else "torch".
        tile_size: rows and columns of a tile (one number, or two), for the tiled backends.
        group: a torch.distributed group; None: this process alone.
        communication: "ring" (two column blocks on a rank at a time, overlapped with the work), "gather" (all columns on
            every rank at once, in a few large collectives), "hierarchical" (a ring of nodes, whose ranks gather) or "auto"
            (the fastest by the model of `mmcontrast.score.traffic`). The same on all ranks.
        sizes, within: rows and columns of every rank, and ranks of a node, if the caller knows them; else they are exchanged.
        link: φ in z = scale · φ(x_i·y_j) + bias, as `Lorentz`; default: none.
        limits: for reductions with `below`: row limits [N], and column limits [M] with `columns`.
        teachers: for `CrossSum`, which averages their softmaxes; rows [N, E], columns [M, E].

    Returns:
        The rows' direction, and the columns' (with the same positives; None without `columns`).

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
    if link is not None:
        x, y = link.rows(x, columns=False), link.rows(y, columns=True)
    chosen_backend = choose(backend, x, reductions, link)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.as_tensor(scale, dtype=dtype, device=x.device)
    per_anchor = scale.dim() == 1
    if scale.dim() and scale.shape != x.shape[:1]:
        raise ValueError(f"scale is {tuple(scale.shape)}, it must be a scalar [] or one for each of {len(x)} rows")
    if columns and per_anchor and column_scale is None:
        raise ValueError("a scale per row needs column_scale for the columns' direction")
    if sizes is None or within is None:
        by_rank = exchange([len(x), len(y), ranks_of_node()], group, x.device)
        sizes = [(rows, columns_of_rank) for rows, columns_of_rank, _ in by_rank]
        within = agreed([ranks for _, _, ranks in by_rank])
    rank = dist.get_rank(group) if group is not None else 0
    negatives = None
    if ids is None and column_ids is None:
        negatives = sum(m for _, m in sizes) - paired, sum(n for n, _ in sizes) - paired
    if ids is None:
        ids = torch.arange(len(x), device=x.device) + sum(rows for rows, _ in sizes[:rank])
    if column_ids is None:
        column_ids = ids if paired else torch.full((len(y),), -2, device=x.device)
    _check(x, y, reductions, columns, limits, teachers)
    if any(isinstance(reduction, CrossSum) for reduction in reductions):
        all_candidates = partial(
            score_statistics, reductions=[LogSumExp(over="all")], ids=ids, column_ids=column_ids, paired=paired,
            columns=columns, tile_size=tile_size, group=group, communication=communication, sizes=sizes, within=within,
        )  # fmt: skip
        teachers = [_with_log_sums(teacher, all_candidates) for teacher in teachers]
    tile = (tile_size, tile_size) if isinstance(tile_size, int) else tile_size
    bias = None if bias is None else scalar(bias, dtype, x.device)
    if per_anchor and columns:
        assert column_scale is not None
        column_scale = column_scale.to(dtype)
    else:
        column_scale = scale.new_zeros(len(y)) if per_anchor else None
    plan = _Plan(
        tuple(reductions), columns, chosen_backend, tile,
        driver(group, [m for _, m in sizes], communication, within, y.shape[1], y.device), ids, column_ids, per_anchor,
        paired, negatives, link, limits, tuple(teachers),
    )  # fmt: skip
    parameter = None if link is None else link.parameter
    dots, row_negatives, column_negatives, *values = _Scores.apply(x, y, scale, column_scale, bias, parameter, plan)
    matched = dots if link is None else link.value(dots)
    offset = 0.0 if bias is None else bias
    k = len(plan.reductions)
    rows = Direction(matched * scale + offset, row_negatives, scale, dict(zip(plan.reductions, values[:k], strict=True)))
    if not columns:
        return rows, None
    scale = scale if column_scale is None else column_scale
    return rows, Direction(
        matched * scale + offset, column_negatives, scale, dict(zip(plan.reductions, values[k:], strict=True))
    )


def _check(
    x: Tensor, y: Tensor, reductions: Sequence[Reduction], columns: bool, limits: Limits | None, teachers: Sequence[Teacher]
) -> None:
    """Check the shapes of limits and teachers.

    Raises:
        ValueError: if one is missing or does not fit.
    """
    guide = None if limits is None else limits.guide
    for teacher in (*teachers, *(() if guide is None else (guide,))):
        same_width = teacher.rows.dim() == teacher.columns.dim() == 2 and teacher.rows.shape[1] == teacher.columns.shape[1]
        if not same_width or len(teacher.rows) != len(x) or len(teacher.columns) != len(y):
            raise ValueError(
                f"a teacher's rows and columns must be [{len(x)}, E] and [{len(y)}, E], not {tuple(teacher.rows.shape)} and"
                f" {tuple(teacher.columns.shape)}"
            )
    if any(isinstance(reduction, CrossSum) for reduction in reductions) and not teachers:
        raise ValueError("CrossSum needs teachers")
    if any(reduction.below for reduction in reductions) and limits is None:
        raise ValueError("reductions with below need limits")
    if limits is not None and (
        limits.rows.shape != x.shape[:1] or (columns and getattr(limits.columns, "shape", 0) != y.shape[:1])
    ):
        raise ValueError(f"limits must be [{len(x)}] of rows and, with columns, [{len(y)}] of columns")


@torch.no_grad()
def _with_log_sums(teacher: Teacher, all_candidates: Callable[..., tuple[Direction, Direction | None]]) -> Teacher:
    """Return a teacher with log Σ e^t over all candidates of each anchor."""
    rows, columns = teacher.rows.detach(), teacher.columns.detach().to(teacher.rows.dtype)
    forward, backward = all_candidates(rows, columns, scale=teacher.scale)
    log_sum = LogSumExp(over="all")
    return Teacher(rows, columns, teacher.scale, forward[log_sum], None if backward is None else backward[log_sum])


@dataclass(frozen=True)
class _Plan:
    """The inputs of both passes beside the differentiable ones.

    Attributes:
        negatives: of every row, and of every column, if all samples are of different groups; None: they are counted.
    """

    reductions: tuple[Reduction, ...]
    both: bool
    backend: Backend
    tile_size: tuple[int, int] | None
    driver: Driver
    ids: Tensor
    column_ids: Tensor
    per_anchor: bool
    paired: bool
    negatives: tuple[int, int] | None
    link: Link | None
    limits: Limits | None
    teachers: tuple[Teacher, ...]

    @property
    def guide(self) -> Teacher | None:
        """Return the teacher whose scores are compared with the limits."""
        return None if self.limits is None else self.limits.guide

    def visits(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        column_scale: Tensor | None,
        bias: Tensor | None,
        final: Sequence[Tensor] = (),
        needs: tuple[bool, bool] = (True, True),
    ) -> Iterator[tuple[int, Block, list[Tensor]]]:
        """Yield (step, block, the columns' part of `final`) until this rank's rows have seen the columns of all ranks."""
        travelling: dict[Any, Tensor | None] = {"y": y, "ids": self.column_ids, "scale": column_scale}
        travelling |= dict(enumerate(final))
        travelling["limits"] = self.limits.columns if self.limits is not None and self.both else None
        for number, teacher in enumerate((*self.teachers, self.guide)):
            if teacher is not None:
                travelling |= {("teacher", number): teacher.columns, ("sums", number): teacher.column_log_sums}
        sent = {name: tensor for name, tensor in travelling.items() if tensor is not None}
        for step, tensors in self.driver.visits(list(sent.values())):
            arrived = dict(zip(sent, tensors, strict=True))

            def arrived_teacher(teacher: Teacher, number: int, arrived: dict[Any, Tensor] = arrived) -> Teacher:
                return replace(teacher, columns=arrived["teacher", number], column_log_sums=arrived.get(("sums", number)))

            limits = self.limits
            if limits is not None:
                guide = None if self.guide is None else arrived_teacher(self.guide, len(self.teachers))
                limits = Limits(limits.rows, arrived.get("limits"), guide)
            block = Block(
                x, arrived["y"], scale, arrived.get("scale"), bias, SameGroup(self.ids, arrived["ids"]), self.reductions,
                self.both, self.tile_size, self.link, limits,
                tuple(arrived_teacher(teacher, number) for number, teacher in enumerate(self.teachers)), *needs,
            )  # fmt: skip
            yield step, block, [arrived[number] for number in range(len(final))]


def _add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


class _Scores(torch.autograd.Function):
    """Returns (x·y of the pairs, negatives of rows, of columns, row reductions …, column reductions …)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, y, scale, column_scale, bias, _, plan = inputs
        backend, dtype = plan.backend, scale.dtype
        rows: list[Tensor] = []
        row_negatives, column_negatives = x.new_zeros(len(x), dtype=torch.int64), y.new_zeros(len(y), dtype=torch.int64)
        accumulator = plan.driver.accumulator()
        merge: list[Merge] = [reduction.merge for reduction in plan.reductions if plan.both]
        counted = plan.negatives is None
        for step, block, _ in plan.visits(x, y, scale, column_scale, bias):
            part = backend.forward(block)
            rows = [r.merge(a, b) for r, a, b in zip(plan.reductions, rows, part.rows, strict=True)] if step else part.rows
            if counted:
                row_negatives += len(block.y) - block.same.row_counts
            if plan.both:
                counts = [len(x) - block.same.column_counts] if counted else []
                accumulator.add(step, [_add] * counted + merge, [*counts, *part.columns])
        columns = accumulator.home() if plan.both else []
        if plan.negatives is not None:
            row_negatives += plan.negatives[0]
            column_negatives += plan.negatives[1]
        elif plan.both:
            column_negatives, *columns = columns
        dots = row_dots(x, y, dtype) if plan.paired else x.new_zeros(len(x), dtype=dtype)
        ctx.plan = plan
        ctx.save_for_backward(x, y, scale, column_scale, bias, *rows, *columns)
        values = zip(plan.reductions * 2, rows + columns, strict=False)
        maxima = [value for reduction, value in values if isinstance(reduction, Maximum)]
        ctx.mark_non_differentiable(row_negatives, column_negatives, *maxima)
        return dots, row_negatives, column_negatives, *rows, *columns

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled():  # with create_graph; `once_differentiable` raises only where `upstream` has a gradient
            raise RuntimeError("the gradients of score statistics cannot be differentiated again (create_graph=True)")
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
        folded, dtype = plan.per_anchor or plan.link is not None, scale.dtype
        x_needs, y_needs, scale_needs = ctx.needs_input_grad[:3]
        x_needs |= scale_needs and not (y_needs or folded)  # the scale's gradient is computed from one of theirs
        dx = torch.zeros(x.shape, dtype=dtype, device=x.device) if x_needs else None
        d_scale, d_bias, d_parameter = torch.zeros_like(scale), scale.new_zeros(()), scale.new_zeros(())
        accumulator = plan.driver.accumulator()
        final, needs = [*column_values, *column_grads], (x_needs, y_needs)
        for step, block, arrived in plan.visits(x, y, scale, column_scale, bias, final, needs):
            arrived_values, arrived_grads = arrived[: len(column_values)], arrived[len(column_values) :]
            part = backend.backward(block, Statistics(row_values, arrived_values), Statistics(row_grads, arrived_grads), dx)
            for total, share in ((d_scale, part.row_scale), (d_bias, part.bias), (d_parameter, part.parameter)):
                if share is not None:
                    total += share
            parts = [gradient for gradient in (part.dy, part.column_scale) if gradient is not None]
            accumulator.add(step, [_add] * len(parts), parts)
        owned = accumulator.home()
        dy = owned.pop(0) if y_needs else None
        if not folded:  # Σ_ij w_ij s_ij = Σ_i x_i · (W Y)_i: no pass over the scores
            d_scale = row_dots(x, dx, dtype).sum() if dx is not None else scale if dy is None else row_dots(y, dy, dtype).sum()
        factor, d_dots = None if folded else scale, d_dots if plan.paired else None
        dx = None if dx is None else _finish(dx, factor, d_dots, y, x.dtype)  # freed before the next is read
        dy = None if dy is None else _finish(dy, factor, d_dots, x, y.dtype)
        d_bias = None if bias is None else d_bias
        return dx, dy, d_scale, owned[0] if owned else None, d_bias, None if plan.link is None else d_parameter, None


def row_dots(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a_i · b_i [N] in dtype, without a whole copy of either in that dtype."""
    parts = [torch.linalg.vecdot(p.to(dtype), q.to(dtype)) for p, q in zip(a.split(CHUNK), b.split(CHUNK), strict=True)]
    return torch.cat(parts)


def _finish(total: Tensor, factor: Tensor | None, weights: Tensor | None, partners: Tensor, dtype: torch.dtype) -> Tensor:
    """Return factor · total_i + weights_i · partners_i [N, D] in dtype. Overwrites total."""
    out = total if dtype == total.dtype else torch.empty_like(total, dtype=dtype)
    for start in range(0, len(total), CHUNK):
        rows = slice(start, start + CHUNK)
        part = total[rows] if factor is None else total[rows].mul_(factor)
        if weights is not None:
            part.addcmul_(weights[rows].unsqueeze(1), partners[rows].to(part.dtype))
        if out is not total:
            out[rows] = part
    return out
