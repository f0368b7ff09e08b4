"""Exact ranks of relevant candidates over any number of embeddings: counted tile by tile, never stored, both ways at once.

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
PASSES = 48  # relevant candidates of a query up to which each is compared by itself; beyond, scores are sorted in among them
ScoreFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # of products [R, T], rows of queries [R] and of candidates [T]


@dataclass(frozen=True)
class Pairs:
    """Which candidates are relevant to which queries; a pair occurs once.

    Attributes:
        queries, candidates: int64 [P], places.
        gains: float64 [P], more than 0.
    """

    queries: Tensor
    candidates: Tensor
    gains: Tensor

    @classmethod
    def of_groups(cls, query_groups: Tensor, candidate_groups: Tensor) -> "Pairs":
        """All pairs of equal groups, int64 [Q] and [C], each with a gain of 1."""
        order = candidate_groups.argsort(stable=True)
        ordered = candidate_groups[order]
        first, last = torch.searchsorted(ordered, query_groups), torch.searchsorted(ordered, query_groups, right=True)
        queries = torch.arange(len(query_groups)).repeat_interleave(last - first)
        return cls(queries, order[_runs(first, last - first)], torch.ones(len(queries), dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.queries)

    def transposed(self) -> "Pairs":
        return Pairs(self.candidates, self.queries, self.gains)

    def without(self, excluded: Tensor) -> "Pairs":
        """Without those of a query and the candidate excluded [Q] for it."""
        kept = self.candidates != excluded[self.queries]
        return Pairs(self.queries[kept], self.candidates[kept], self.gains[kept])


@dataclass(frozen=True)
class Ranking:
    """Where each query's relevant candidates stand, sorted by query and rank.

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
    """The ranks of the relevant candidates of each query, and with `both` those of the relevant queries of each candidate.

    A score is the inner product in fp32 (float64 of float64 rows). A relevant candidate stands behind every other that scores
    at least as much and is not relevant: **ties count against it**, and scores are tied that differ by no more than rounding
    (2 ε ‖q‖ ‖c‖, ε = 2⁻²³ in fp32). Relevant ones stand in the order of their scores, of equal ones that of the smaller gain
    first. Every product of a query and a candidate is computed once, for both ways.

    Args:
        queries, candidates: [Q, D] and [C, D], on any device.
        excluded: int64 [Q], a candidate that is none for that query (itself), −1: all are.
        scoring: makes another score of the products, in place or not; it must grow with them.
        bridge: through which rows are compared, in the place of their products.
        device: where tiles are computed; default: that of the queries.
        group: its ranks share the work; all give the same arguments and get the same result.

    Returns:
        One or two rankings. O(Q + C + P) memory beside a tile.

    Raises:
        ValueError: if a row is not finite.
    """
    for name, rows in (("queries", queries), ("candidates", candidates)):
        if not (finite := torch.isfinite(rows).all(1)).all():
            raise ValueError(f"{name}: the embedding at place {int(finite.logical_not().nonzero()[0])} is not finite")
    pairs = pairs if excluded is None else pairs.without(excluded)
    if bridge is not None:
        queries, candidates = bridge.lift(queries), bridge.lift(candidates, candidates=True)
    counted = _Count(queries, candidates, pairs, both, excluded, scoring, bridge, torch.device(device or queries.device))
    counted.run(group, progress)
    found = [_ranking(pairs, counted.scores, counted.rows.ahead, len(candidates))]
    return found + ([_ranking(pairs.transposed(), counted.scores, counted.columns.ahead, len(queries))] if both else [])


def _ranking(pairs: Pairs, scores: Tensor, ahead: Tensor, num_candidates: int) -> Ranking:
    """Ranks of the irrelevant candidates ahead of each, and of the relevant ones before it."""
    order = pairs.gains.argsort(stable=True)
    for key in (-scores, pairs.queries):
        order = order[key[order].argsort(stable=True)]
    queries = pairs.queries[order]
    before = torch.arange(len(queries)) - torch.searchsorted(queries, queries)
    return Ranking(queries, ahead[order] + before + 1, pairs.gains[order], num_candidates)


class _Side:
    """One direction: its anchors, those with the most pairs first, and the pairs of each tile of them.

    Attributes:
        order: int64 [A], places of the anchors.
        pairs: int64 [P], numbers of the pairs, those of an anchor together, in the anchors' order.
        counts, starts: int64 [A], of an anchor's pairs in `pairs`.
        ahead: int64 [P], what is counted, in the pairs' own order.
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
        """Numbers of the pairs of a tile's anchors: the first of each, the second of those that have one, and so on."""
        counts, starts = self.counts[tile], self.starts[tile]
        for k in range(int(counts[0])):
            yield self.pairs[starts[: int((counts > k).sum())] + k]


class _Count:
    """How many candidates are ahead of each pair's, by tiles of scores [R, T] in which no relevant pair is left."""

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
        self.rows, self.columns = _Side(pairs.queries, len(queries), heights), _Side(pairs.candidates, len(candidates), widths)
        masked_rows, masked_columns = self.rows.place[pairs.queries], self.columns.place[pairs.candidates]
        if excluded is not None:
            there = excluded >= 0
            masked_rows = torch.cat([masked_rows, self.rows.place[there.nonzero().squeeze(1)]])
            masked_columns = torch.cat([masked_columns, self.columns.place[excluded[there]]])
        self.wide = -(-len(candidates) // widths)
        tile_of = masked_rows // heights * self.wide + masked_columns // widths
        order = tile_of.argsort()
        self.masked = (masked_rows[order] % heights).to(device), (masked_columns[order] % widths).to(device)
        tiles = torch.arange(-(-len(queries) // heights) * self.wide + 1)
        self.masks = torch.searchsorted(tile_of[order], tiles).tolist()
        self.scores, self.least = (torch.zeros(len(pairs), dtype=self.dtype) for _ in range(2))

    def run(self, group: dist.ProcessGroup | None, progress: Progress | None) -> None:
        me, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        tiles = self.rows.tiles()
        for number, tile in enumerate(tiles):
            if number % world == me:
                self._score_pairs(tile)
        if group:
            _add_up([self.scores, self.least], self.device, group)  # a column's pairs are those of all rows
        task = progress.add_task("ranks", total=len(tiles[me::world]), note="") if progress else None
        for number in range(me, len(tiles), world):
            self._count_row_of_tiles(number, tiles[number])
            if progress and task is not None:
                progress.advance(task)
        if progress and task is not None:
            progress.remove_task(task)
        if group:
            _add_up([self.rows.ahead, self.columns.ahead], self.device, group)

    def _gathered(self, rows: Tensor, places: Tensor) -> Tensor:
        return rows[places.to(rows.device)].to(self.device, self.dtype)

    def _products(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(x, y.T, out=out) if self.bridge is None else self.bridge.products(x, y, out)

    def _scored(self, products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return products if self.scoring is None else self.scoring(products, rows, columns)

    def _score_pairs(self, tile: slice) -> None:
        """The scores of a tile's pairs, and the least that another candidate has to score to stand before them."""
        places = self.rows.order[tile]
        first, number = int(self.rows.starts[tile.start]), int(self.rows.counts[tile].sum())
        pairs = self.rows.pairs[first : first + number]
        wanted, which = self.pairs.candidates[pairs].unique(return_inverse=True)
        x = self._gathered(self.queries, places)
        local = (self.rows.place[self.pairs.queries[pairs]] - tile.start).to(self.device)
        for start in range(0, len(wanted), self.columns.tile):
            here = (which >= start) & (which < start + self.columns.tile)
            columns, at = (
                wanted[start : start + self.columns.tile],
                (local[here.to(self.device)], (which[here] - start).to(self.device)),
            )
            y = self._gathered(self.candidates, columns)
            products = self._products(x, y)
            if self.bridge is None:
                rounding = 2 * torch.finfo(self.dtype).eps * x.norm(dim=1, keepdim=True) * y.norm(dim=1)
            else:
                rounding = self.bridge.rounding(x, y, products)
            self.least[pairs[here]] = self._scored(products - rounding, places, columns)[at].cpu()
            self.scores[pairs[here]] = self._scored(products, places, columns)[at].cpu()

    def _count_row_of_tiles(self, number: int, tile: slice) -> None:
        places = self.rows.order[tile]
        x = self._gathered(self.queries, places)
        height, width = len(places), min(self.columns.tile, len(self.candidates))
        scores, over = (torch.empty(height, width, dtype=self.dtype, device=self.device) for _ in range(2))
        ones = torch.ones(max(height, width), dtype=self.dtype, device=self.device)
        for k, columns in enumerate(self.columns.tiles()):
            wanted = self.columns.order[columns]
            products = self._products(x, self._gathered(self.candidates, wanted), out=scores[:, : len(wanted)])
            found = self._scored(products, places, wanted)
            inside = slice(*self.masks[number * self.wide + k : number * self.wide + k + 2])
            if inside.start < inside.stop:
                found[self.masked[0][inside], self.masked[1][inside]] = -torch.inf
            self._add(self.rows, tile, found, over[:, : len(wanted)], ones)
            if self.both:
                self._add(self.columns, columns, found.T, over[:, : len(wanted)].T, ones)

    def _add(self, side: _Side, tile: slice, scores: Tensor, over: Tensor, ones: Tensor) -> None:
        """Counts in a tile of scores [anchors, others] those that are at least an anchor's pair's, for each of its pairs."""
        most = int(side.counts[tile.start])
        if most > PASSES:
            self._add_sorted(side, tile, scores)
            return
        for pairs in side.passes(tile):
            least, n = self.least[pairs].to(self.device), len(pairs)
            # comparing into floats and multiplying by ones is three times as fast as counting booleans on a CPU
            torch.ge(scores[:n], least[:, None], out=over[:n])
            side.ahead[pairs] += (over[:n] @ ones[: scores.shape[1]]).to("cpu", torch.int64)

    def _add_sorted(self, side: _Side, tile: slice, scores: Tensor) -> None:
        """The same for anchors with many pairs: each score is looked up among the sorted scores of the anchor's pairs."""
        counts, most = side.counts[tile], int(side.counts[tile.start])
        anchors = torch.arange(len(counts)).repeat_interleave(counts)
        within = _runs(torch.zeros_like(counts), counts)
        pairs = side.pairs[_runs(side.starts[tile], counts)]
        least = torch.full((len(counts), most), torch.inf, dtype=self.dtype)
        least[anchors, within] = self.least[pairs]
        least, order = least.to(self.device).sort(1)
        below = torch.searchsorted(least, scores.contiguous(), right=True)  # how many pairs a score is at least
        histogram = torch.zeros(len(counts), most + 1, dtype=torch.int64, device=self.device)
        histogram.scatter_add_(1, below, torch.ones_like(below))
        over = histogram.flip(1).cumsum(1).flip(1)[:, 1:]
        unsorted = torch.empty_like(over).scatter_(1, order, over).cpu()
        side.ahead[pairs] += unsorted[anchors, within]


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """starts[0], starts[0] + 1, …, `lengths[0]` of them, then those of the next."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def _add_up(tensors: list[Tensor], device: torch.device, group: dist.ProcessGroup) -> None:
    """In place, over the ranks of a group."""
    for tensor in tensors:
        total = tensor.to(device)
        dist.all_reduce(total, group=group)
        tensor.copy_(total)
