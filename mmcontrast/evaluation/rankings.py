"""Compute exact ranks of relevant candidates: counted over tiles of scores, in both directions at once.

Shapes: Q queries, C candidates, P relevant pairs; R, T rows and columns of a tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor

from mmcontrast.evaluation.bridge import Bridge

TILE = {"cpu": (1024, 2048), "cuda": (8192, 16384)}
PASSES = 48  # relevant candidates of a query up to which each is compared by itself; beyond, scores are binned by sorting
ScoreFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # of products [R, T], rows of queries [R] and of candidates [T]


@dataclass(frozen=True)
class Pairs:
    """The relevant pairs of queries and candidates; each occurs once.

    Attributes:
        queries, candidates: int64 [P], row indices.
        gains: float64 [P], more than 0.
    """

    queries: Tensor
    candidates: Tensor
    gains: Tensor

    @classmethod
    def of_groups(cls, query_groups: Tensor, candidate_groups: Tensor) -> "Pairs":
        """Return all pairs of equal groups, int64 [Q] and [C], each with a gain of 1."""
        order = candidate_groups.argsort(stable=True)
        ordered = candidate_groups[order]
        first, last = torch.searchsorted(ordered, query_groups), torch.searchsorted(ordered, query_groups, right=True)
        queries = torch.arange(len(query_groups)).repeat_interleave(last - first)
        return cls(queries, order[_concatenated_ranges(first, last - first)], torch.ones(len(queries), dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.queries)

    def transposed(self) -> "Pairs":
        return Pairs(self.candidates, self.queries, self.gains)

    def without(self, excluded: Tensor) -> "Pairs":
        """Return the pairs without those of a query and the candidate excluded [Q] for it."""
        kept = self.candidates != excluded[self.queries]
        return Pairs(self.queries[kept], self.candidates[kept], self.gains[kept])


@dataclass(frozen=True)
class Ranking:
    """The ranks of each query's relevant candidates, sorted by query and rank.

    Attributes:
        queries: int64 [P], ascending. ranks: int64 [P], from 1. gains: float64 [P].
        num_candidates: C.
    """

    queries: Tensor
    ranks: Tensor
    gains: Tensor
    num_candidates: int


def rank(
    queries: Tensor,
    candidates: Tensor,
    pairs: Pairs,
    *,
    both: bool = False,
    excluded: Tensor | None = None,
    scoring: ScoreFunction | None = None,
    bridge: Bridge | None = None,
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> list[Ranking]:
    """Compute the ranks of each query's relevant candidates, and with `both` also those of each candidate's relevant queries.

    A score is the inner product in fp32 (float64 of float64 rows). A relevant candidate stands behind every other that scores
    at least as much and is not relevant: **ties count against it**, and scores are tied that differ by no more than rounding
    (2 ε ‖q‖ ‖c‖, ε = 2⁻²³ in fp32). Relevant ones stand in the order of their scores, of equal ones that of the smaller gain
    first. Every product of a query and a candidate is computed once, for both ways.

    Args:
        queries, candidates: [Q, D] and [C, D], on any device.
        excluded: int64 [Q], a row that is no candidate for that query (itself); −1: none.
        scoring: maps products to scores, in place or not; it must be increasing.
        bridge: compares rows instead of their products.
        device: where tiles are computed; default: that of the queries.
        group: its ranks share the work; all give the same arguments and get the same result.

    Returns:
        One or two rankings. O(Q + C + P) memory beside a tile.

    Raises:
        ValueError: if a row is not finite.
    """
    for name, rows in (("queries", queries), ("candidates", candidates)):
        finite = torch.isfinite(rows).all(1)
        if not finite.all():
            raise ValueError(f"{name}: the embedding at place {int(finite.logical_not().nonzero()[0])} is not finite")
    pairs = pairs if excluded is None else pairs.without(excluded)
    if bridge is not None:
        queries, candidates = bridge.lift(queries), bridge.lift(candidates, candidates=True)
    counter = _TileCounter(queries, candidates, pairs, both, excluded, scoring, bridge, torch.device(device or queries.device))
    counter.run(group, progress)
    rankings = [_make_ranking(pairs, counter.scores, counter.rows.ahead, len(candidates))]
    if both:
        rankings.append(_make_ranking(pairs.transposed(), counter.scores, counter.columns.ahead, len(queries)))
    return rankings


def _make_ranking(pairs: Pairs, scores: Tensor, ahead: Tensor, num_candidates: int) -> Ranking:
    """Return the ranks of the pairs: 1 + the irrelevant candidates ahead of each + the relevant ones before it."""
    order = pairs.gains.argsort(stable=True)
    for key in (-scores, pairs.queries):
        order = order[key[order].argsort(stable=True)]
    queries = pairs.queries[order]
    before = torch.arange(len(queries)) - torch.searchsorted(queries, queries)
    return Ranking(queries, ahead[order] + before + 1, pairs.gains[order], num_candidates)


class _Direction:
    """One direction of retrieval: its anchors, those with the most pairs first, and the pairs of each tile of them.

    Attributes:
        order: int64 [A], row indices of the anchors. place: its inverse, each anchor's position in the order.
        pairs: int64 [P], indices of the pairs, those of an anchor together, in the anchors' order.
        counts, starts: int64 [A], of an anchor's pairs in `pairs`.
        ahead: int64 [P], irrelevant candidates ahead of each pair's, in the pairs' own order.
    """

    def __init__(self, anchors: Tensor, number: int, tile: int) -> None:
        counts = torch.bincount(anchors, minlength=number)
        self.order = counts.argsort(descending=True, stable=True)
        self.counts, self.tile = counts[self.order], tile
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(number)
        self.pairs = self.place[anchors].argsort(stable=True)
        self.starts = self.counts.cumsum(0) - self.counts
        self.ahead = torch.zeros(len(anchors), dtype=torch.int64)

    def tiles(self) -> list[slice]:
        return [slice(start, min(start + self.tile, len(self.order))) for start in range(0, len(self.order), self.tile)]

    def passes(self, tile: slice) -> Iterator[Tensor]:
        """Yield indices of the pairs of a tile's anchors: the first of each, the second of those that have one, and so on."""
        counts, starts = self.counts[tile], self.starts[tile]
        for k in range(int(counts[0])):
            yield self.pairs[starts[: int((counts > k).sum())] + k]


class _TileCounter:
    """Counts the irrelevant candidates ahead of each pair's, by tiles of scores [R, T] in which relevant pairs are masked."""

    def __init__(
        self,
        queries: Tensor,
        candidates: Tensor,
        pairs: Pairs,
        both: bool,
        excluded: Tensor | None,
        scoring: ScoreFunction | None,
        bridge: Bridge | None,
        device: torch.device,
    ) -> None:
        self.queries, self.candidates, self.pairs, self.both = queries, candidates, pairs, both
        self.scoring, self.bridge, self.device = scoring, bridge, device
        self.dtype = torch.promote_types(queries.dtype, torch.float32)
        heights, widths = TILE.get(device.type, TILE["cpu"])
        self.rows = _Direction(pairs.queries, len(queries), heights)
        self.columns = _Direction(pairs.candidates, len(candidates), widths)
        masked_rows, masked_columns = self.rows.place[pairs.queries], self.columns.place[pairs.candidates]
        if excluded is not None:
            has_excluded = excluded >= 0
            masked_rows = torch.cat([masked_rows, self.rows.place[has_excluded.nonzero().squeeze(1)]])
            masked_columns = torch.cat([masked_columns, self.columns.place[excluded[has_excluded]]])
        self.wide = -(-len(candidates) // widths)
        tile_of = masked_rows // heights * self.wide + masked_columns // widths
        order = tile_of.argsort()
        self.masked = (masked_rows[order] % heights).to(device), (masked_columns[order] % widths).to(device)
        tiles = torch.arange(-(-len(queries) // heights) * self.wide + 1)
        self.masks = torch.searchsorted(tile_of[order], tiles).tolist()
        self.scores, self.least = (torch.zeros(len(pairs), dtype=self.dtype) for _ in range(2))

    def run(self, group: dist.ProcessGroup | None, progress: Progress | None) -> None:
        group_rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        tiles = self.rows.tiles()
        for number, tile in enumerate(tiles):
            if number % world == group_rank:
                self._score_pairs(tile)
        if group:
            _all_reduce([self.scores, self.least], self.device, group)  # a column's pairs are those of all rows
        task = progress.add_task("ranks", total=len(tiles[group_rank::world]), note="") if progress else None
        for number in range(group_rank, len(tiles), world):
            self._count_row_of_tiles(number, tiles[number])
            if progress and task is not None:
                progress.advance(task)
        if progress and task is not None:
            progress.remove_task(task)
        if group:
            _all_reduce([self.rows.ahead, self.columns.ahead], self.device, group)

    def _gather(self, rows: Tensor, indices: Tensor) -> Tensor:
        return rows[indices.to(rows.device)].to(self.device, self.dtype)

    def _products(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(x, y.T, out=out) if self.bridge is None else self.bridge.products(x, y, out)

    def _apply_scoring(self, products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return products if self.scoring is None else self.scoring(products, rows, columns)

    def _score_pairs(self, tile: slice) -> None:
        """Compute the scores of a tile's pairs, and the least score with which another candidate is ahead of them."""
        row_indices = self.rows.order[tile]
        first, num_pairs = int(self.rows.starts[tile.start]), int(self.rows.counts[tile].sum())
        pairs = self.rows.pairs[first : first + num_pairs]
        candidate_indices, candidate_of_pair = self.pairs.candidates[pairs].unique(return_inverse=True)
        x = self._gather(self.queries, row_indices)
        row_of_pair = (self.rows.place[self.pairs.queries[pairs]] - tile.start).to(self.device)
        for start in range(0, len(candidate_indices), self.columns.tile):
            in_tile = (candidate_of_pair >= start) & (candidate_of_pair < start + self.columns.tile)
            column_indices = candidate_indices[start : start + self.columns.tile]
            cells = row_of_pair[in_tile.to(self.device)], (candidate_of_pair[in_tile] - start).to(self.device)
            y = self._gather(self.candidates, column_indices)
            products = self._products(x, y)
            if self.bridge is None:
                rounding = 2 * torch.finfo(self.dtype).eps * x.norm(dim=1, keepdim=True) * y.norm(dim=1)
            else:
                rounding = self.bridge.rounding(x, y, products)
            self.least[pairs[in_tile]] = self._apply_scoring(products - rounding, row_indices, column_indices)[cells].cpu()
            self.scores[pairs[in_tile]] = self._apply_scoring(products, row_indices, column_indices)[cells].cpu()

    def _count_row_of_tiles(self, number: int, tile: slice) -> None:
        """Count for the pairs of one tile of rows, over all tiles of columns; with `both`, for the columns' pairs as well."""
        row_indices = self.rows.order[tile]
        x = self._gather(self.queries, row_indices)
        height, width = len(row_indices), min(self.columns.tile, len(self.candidates))
        scores, buffer = (torch.empty(height, width, dtype=self.dtype, device=self.device) for _ in range(2))
        ones = torch.ones(max(height, width), dtype=self.dtype, device=self.device)
        for k, columns in enumerate(self.columns.tiles()):
            column_indices = self.columns.order[columns]
            products = self._products(x, self._gather(self.candidates, column_indices), out=scores[:, : len(column_indices)])
            tile_scores = self._apply_scoring(products, row_indices, column_indices)
            masked = slice(*self.masks[number * self.wide + k : number * self.wide + k + 2])
            if masked.start < masked.stop:
                tile_scores[self.masked[0][masked], self.masked[1][masked]] = -torch.inf
            self._add(self.rows, tile, tile_scores, buffer[:, : len(column_indices)], ones)
            if self.both:
                self._add(self.columns, columns, tile_scores.T, buffer[:, : len(column_indices)].T, ones)

    def _add(self, direction: _Direction, tile: slice, scores: Tensor, buffer: Tensor, ones: Tensor) -> None:
        """Count in a tile of scores [anchors, others], for each pair of an anchor, the scores that are at least the pair's."""
        most = int(direction.counts[tile.start])
        if most > PASSES:
            self._add_sorted(direction, tile, scores)
            return
        for pairs in direction.passes(tile):
            least, n = self.least[pairs].to(self.device), len(pairs)
            # comparing into floats and multiplying by ones is three times as fast as counting booleans on a CPU
            torch.ge(scores[:n], least[:, None], out=buffer[:n])
            direction.ahead[pairs] += (buffer[:n] @ ones[: scores.shape[1]]).to("cpu", torch.int64)

    def _add_sorted(self, direction: _Direction, tile: slice, scores: Tensor) -> None:
        """Count the same for anchors with many pairs: look up each score among the sorted scores of the anchor's pairs."""
        counts, most = direction.counts[tile], int(direction.counts[tile.start])
        anchors = torch.arange(len(counts)).repeat_interleave(counts)
        within = _concatenated_ranges(torch.zeros_like(counts), counts)
        pairs = direction.pairs[_concatenated_ranges(direction.starts[tile], counts)]
        least = torch.full((len(counts), most), torch.inf, dtype=self.dtype)
        least[anchors, within] = self.least[pairs]
        least, order = least.to(self.device).sort(1)
        below = torch.searchsorted(least, scores.contiguous(), right=True)  # how many pairs a score is at least
        histogram = torch.zeros(len(counts), most + 1, dtype=torch.int64, device=self.device)
        histogram.scatter_add_(1, below, torch.ones_like(below))
        num_above = histogram.flip(1).cumsum(1).flip(1)[:, 1:]
        unsorted = torch.empty_like(num_above).scatter_(1, order, num_above).cpu()
        direction.ahead[pairs] += unsorted[anchors, within]


def _concatenated_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return starts[0], starts[0] + 1, …, `lengths[0]` of them, then those of the next."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def _all_reduce(tensors: list[Tensor], device: torch.device, group: dist.ProcessGroup) -> None:
    """Sum tensors in place over the ranks of a group."""
    for tensor in tensors:
        total = tensor.to(device)
        dist.all_reduce(total, group=group)
        tensor.copy_(total)
