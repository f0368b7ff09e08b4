"""What a backend computes: the statistics of one rectangle of scores, and the gradients that flow back through them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mmcontrast.score.links import Link
from mmcontrast.score.reductions import CrossSum, LogSumExp, Maximum, Reduction, SoftplusSum, Sum
from mmcontrast.score.teachers import Limits, Teacher

SPARSE_PAIRS = 8  # same-group pairs a row and column up to which they are listed rather than compared tile by tile


@dataclass(frozen=True)
class SameGroup:
    """Which row and column of a rectangle are of the same group: row_ids [n] against column_ids [m], int64.

    Usually a few pairs (the diagonal), which are listed once; with large groups, a comparison in each tile.
    """

    row_ids: Tensor
    column_ids: Tensor

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Columns in the order of their ids, and for each row the first of its own there, and how many."""
        ids, order = torch.sort(self.column_ids)
        rows = self.row_ids.contiguous()
        first = torch.searchsorted(ids, rows)
        return order, first, torch.searchsorted(ids, rows, right=True) - first

    @cached_property
    def row_counts(self) -> Tensor:
        """[n]: columns of each row's group."""
        return self._sorted[2]

    @cached_property
    def column_counts(self) -> Tensor:
        """[m]: rows of each column's group."""
        return SameGroup(self.column_ids, self.row_ids).row_counts

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, list[int]] | None:
        """(rows, columns) of all pairs by row, and where each row's begin; None if they are too many to list, or on a
        device where looking them up would wait for it."""
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
        """The pairs in a tile, ready to index it: (row, column) positions, a bool mask, or None if there are none."""
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
    """A rectangle of scores z_ij = scale · φ(x_i·y_j) + bias, where φ is the link, if there is one.

    Attributes:
        x, y: [n, D] and [m, D]; x_needs_grad, y_needs_grad: whether their gradients are wanted.
        row_scale: [] for both directions, or [n] for the row direction with column_scale [m] for the columns'.
        bias: [], or None.
        same: who is of whose group.
        reductions: of every row and, if `both`, of every column.
        tile_size: rows and columns of a tile; None: the backend's own.
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
        """Whether the weights W already carry the scale: where it is not one number of linear scores."""
        return self.row_scale.dim() > 0 or self.link is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of scores, statistics and accumulators: float64 for float64 inputs, else float32."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


@dataclass
class Statistics:
    """The reductions of a block's rows ([n] each) and columns ([m] each; none for the row direction alone)."""

    rows: list[Tensor]
    columns: list[Tensor]


@dataclass
class Gradients:
    """A block's share of the gradients. A scalar scale of linear scores stays out of `dx` and `dy`: whoever adds the blocks
    up multiplies by it once, and has its own gradient as Σ_i x_i · dx_i.

    Attributes:
        dy: [m, D], Σ_i w_ij x_i with w = ∂loss/∂(x·y), without the scale unless `Block.folded`; None if it is not wanted.
        row_scale, column_scale: [n] and [m] where scales are per anchor; [] and None of a scalar under a link; else None.
        bias: [], or None without a bias.
        parameter: [], the link's; None without a link.
    """

    dy: Tensor | None
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    bias: Tensor | None = None
    parameter: Tensor | None = None


class Backend(Protocol):
    """Two functions on one block. `final` are the statistics over all blocks, `grads` the loss's gradients by them; `dx`
    [n, D] is added to in place, if it is wanted."""

    def lacks(self, x: Tensor, reductions: Sequence[Reduction], link: Link | None) -> str | None:
        """What this backend has not of what is asked for, in words."""

    def forward(self, block: Block) -> Statistics: ...

    def backward(self, block: Block, final: Statistics, grads: Statistics, dx: Tensor | None) -> Gradients: ...


def lacks_in_torch(x: Tensor, reductions: Sequence[Reduction], link: Link | None) -> str | None:
    """What backends of plain torch operations lack."""
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"statistics of {x.dtype}"
    known = (LogSumExp, SoftplusSum, Sum, Maximum, CrossSum)
    return next((f"reduction {r}" for r in reductions if type(r) not in known), None)


def finite(values: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Statistics over no candidate at all (−inf) have no gradient: both become 0 there."""
    empty = [value.isneginf() for value in values]
    return (
        [value.masked_fill(none, 0.0) for value, none in zip(values, empty, strict=True)],
        [grad.masked_fill(none, 0.0) for grad, none in zip(grads, empty, strict=True)],
    )
