"""The interface of backends, which compute the statistics of a rectangle of scores, and the gradients through them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mmcontrast.score.links import Link
from mmcontrast.score.reductions import CrossSum, LogSumExp, Maximum, Reduction, SoftplusSum, Sum
from mmcontrast.score.teachers import Limits, Teacher

SPARSE_PAIRS = 8  # the most same-group pairs per row and column for which pairs are listed rather than compared in each tile


@dataclass(frozen=True)
class SameGroup:
    """The pairs of rows and columns of a rectangle that have the same group: row_ids [n] against column_ids [m], int64.

    Usually these are few (the diagonal), and are listed once; with large groups, ids are compared in each tile.
    """

    row_ids: Tensor
    column_ids: Tensor

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the columns sorted by id, and for each row the position of the first one of its group, and their number."""
        ids, order = torch.sort(self.column_ids)
        rows = self.row_ids.contiguous()
        first = torch.searchsorted(ids, rows)
        return order, first, torch.searchsorted(ids, rows, right=True) - first

    @cached_property
    def row_counts(self) -> Tensor:
        """Return the number of columns [n] of each row's group."""
        return self._sorted[2]

    @cached_property
    def column_counts(self) -> Tensor:
        """Return the number of rows [m] of each column's group."""
        return SameGroup(self.column_ids, self.row_ids).row_counts

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, list[int]] | None:
        """Return (rows, columns) of all pairs by row, and where each row's begin; None if they are too many to list, or on a
        device that the look-up would wait for."""
        if self.row_ids.device.type != "cpu":
            return None
        order, first, counts = self._sorted
        n, m, total = len(self.row_ids), len(self.column_ids), int(counts.sum())
        if total > SPARSE_PAIRS * (n + m):
            return None
        rows = torch.repeat_interleave(torch.arange(n), counts)
        ends = counts.cumsum(0)
        within = torch.arange(total) - (ends - counts)[rows]
        return rows, order[first[rows] + within], [0, *ends.tolist()]

    def tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | Tensor | None:
        """Return the pairs in a tile as an index into it: (row, column) positions, a bool mask, or None if there are none."""
        if self._pairs is None:
            return self.row_ids[rows, None] == self.column_ids[columns]
        pair_rows, pair_columns, starts = self._pairs
        strip = slice(starts[rows.start], starts[rows.stop])
        inside = (pair_columns[strip] >= columns.start) & (pair_columns[strip] < columns.stop)
        if not inside.any():
            return None
        return pair_rows[strip][inside] - rows.start, pair_columns[strip][inside] - columns.start


@dataclass(frozen=True)
class Block:
    """A rectangle of scores z_ij = scale · φ(x_i·y_j) + bias, where φ is the link, or the identity without one.

    Attributes:
        x, y: [n, D] and [m, D]; x_needs_grad, y_needs_grad: whether to compute their gradients.
        row_scale: [] for both directions, or [n] for the row direction with column_scale [m] for the columns'.
        bias: [], or None.
        same: the pairs of the same group.
        reductions: of every row and, if `both`, of every column.
        tile_size: rows and columns of a tile; None: the backend's default.
        link: see `Link`. limits: of the reductions with `below`. teachers: of `CrossSum`.
    """

    x: Tensor
    y: Tensor
    row_scale: Tensor
    column_scale: Tensor | None
    bias: Tensor | None
    same: SameGroup
    reductions: tuple[Reduction, ...]
    both: bool
    tile_size: tuple[int, int] | None
    link: Link | None = None
    limits: Limits | None = None
    teachers: tuple[Teacher, ...] = ()
    x_needs_grad: bool = True
    y_needs_grad: bool = True

    @property
    def folded(self) -> bool:
        """Return whether the weights W include the scale: unless it is a scalar of linear scores."""
        return self.row_scale.dim() > 0 or self.link is not None

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of scores, statistics and accumulators: float64 for float64 inputs, else float32."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


@dataclass
class Statistics:
    """The reductions of a block's rows ([n] each) and columns ([m] each; none for the row direction alone)."""

    rows: list[Tensor]
    columns: list[Tensor]


@dataclass
class Gradients:
    """A block's share of the gradients. `dx` and `dy` do not include a scalar scale of linear scores: the caller multiplies the
    sum over blocks by it once, and computes its gradient as Σ_i x_i · dx_i.

    Attributes:
        dy: [m, D], Σ_i w_ij x_i with w = ∂loss/∂(x·y), without the scale unless `Block.folded`; None if it is not needed.
        row_scale, column_scale: [n] and [m] for scales per anchor; [] and None for a scalar with a link; else None.
        bias: [], or None without a bias.
        parameter: [], the link's; None without a link.
    """

    dy: Tensor | None
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    bias: Tensor | None = None
    parameter: Tensor | None = None


class Backend(Protocol):
    """The forward and backward of one block. `final` are the statistics over all blocks, `grads` the loss's gradients by them;
    the gradient of x is added to `dx` [n, D] in place, unless that is None."""

    def lacks(self, x: Tensor, reductions: Sequence[Reduction], link: Link | None) -> str | None:
        """Return what this backend does not support of the inputs, in words; None if it supports all."""

    def forward(self, block: Block) -> Statistics: ...

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor | None) -> Gradients: ...


def lacks_in_torch(x: Tensor, reductions: Sequence[Reduction], link: Link | None) -> str | None:
    """Return what backends of plain torch operations do not support of the inputs; None if they support all."""
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"statistics of {x.dtype}"
    supported = (LogSumExp, SoftplusSum, Sum, Maximum, CrossSum)
    return next((f"reduction {reduction}" for reduction in reductions if type(reduction) not in supported), None)


def finite(values: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return values and gradients with 0 for statistics without candidates (−inf), which have no gradient."""
    empty = [value.isneginf() for value in values]
    return (
        [value.masked_fill(none, 0.0) for value, none in zip(values, empty, strict=True)],
        [grad.masked_fill(none, 0.0) for grad, none in zip(grads, empty, strict=True)],
    )
