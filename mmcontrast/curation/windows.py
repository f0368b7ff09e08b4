"""Finds the best candidates of every query of an embedding table, without its own group: exactly, by tiles, or by faiss's IVF.

Shapes: Q queries of a block, C candidates of one, K candidates of a query's window, D numbers.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmcontrast.errors import UserError
from mmcontrast.search.query import faiss_module
from mmcontrast.search.table import StoredTable
from mmcontrast.whole_files import write_json, write_whole

Block = tuple[np.ndarray, np.ndarray]  # rows of the table, int64 [Q], and their vectors, float32 [Q, D]
QUERIES = 1024  # that are scored together with a block of candidates
SLACK = 8  # candidates beyond a window: float32 finds them, float64 orders them
PAIRS = 65_536  # vectors of a group's candidates that are scored together
GATHERED = 16_384  # vectors in memory at once, in float64
MAPPED = 2**27  # bytes that are read at random before their pages are released
LISTED = 39  # rows from which a list of the IVF is learnt, at least
LEARNT, MEASURED = "ivf.faiss", "ivf.json"
SAMPLE, SAME = 1000, 1e-6  # queries by which the recall is measured; scores that differ by less are equal


@dataclass(frozen=True)
class Windows:
    """The windows of a block of queries.

    Attributes:
        rows: [Q] the queries' rows of the table.
        candidates, scores: [Q, K] rows of the table and scores in float64, best first, of equal ones the lower row; −1 and −inf
            where there are no more.
        positives: [Q] float64, the smallest score with a candidate of the query's own group (other than its own row in its own
            field), NaN if there is none.
        same_group: pairs of these queries with candidates of their group.
    """

    rows: np.ndarray
    candidates: np.ndarray
    scores: np.ndarray
    positives: np.ndarray
    same_group: int


class WindowSearch:
    """Windows of K candidates of one field for queries of another, or of the same.

    A sample of the query's own group is no candidate, whatever its score. The candidates of a window are found in float32; then
    their scores are computed in float64, so they depend on neither tiles nor threads.

    Args:
        groups: [N] of all rows of the table.
        size: K.
        device: of the product; default: the CPU.

    Raises:
        UserError: for a device that does not exist.
    """

    def __init__(
        self, table: StoredTable, query: str, candidate: str, groups: np.ndarray, size: int, device: str = "cpu"
    ) -> None:
        self.table, self.query, self.candidate, self.groups, self.size = table, query, candidate, groups, size
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {' '.join(str(error).split())[:200]}") from error
        self.read = 0  # vectors, since pages were released
        rows = table.present(candidate)
        order = np.argsort(groups[rows], kind="stable")
        self.grouped_rows, self.sorted_groups = rows[order], groups[rows[order]]  # candidates by their group

    def exact(self, blocks: Iterable[Block] | None = None) -> Iterator[Windows]:
        """Yield the windows of all queries, or of these, by the product of all pairs, a tile at a time."""
        for rows, vectors in self.table.blocks(self.query) if blocks is None else blocks:
            top = _TopCandidates(len(rows), self.size + SLACK)
            queries = torch.from_numpy(vectors).to(self.device)
            for numbers, block in self.table.blocks(self.candidate):
                candidates = torch.from_numpy(block).to(self.device).T
                group_pairs = _GroupPairs(self.groups[numbers])
                for first in range(0, len(rows), QUERIES):
                    part = slice(first, min(first + QUERIES, len(rows)))
                    scores = queries[part] @ candidates
                    scores[group_pairs.pairs(self.groups[rows[part]])] = -torch.inf
                    top.add(part, scores, numbers)
            yield self._make_windows(rows, vectors, top.rows)

    def approximate(self, index: Any, blocks: Iterable[Block] | None = None) -> Iterator[Windows]:
        """Yield the same by an index of `make_ivf`. Where candidates of the query's group take the places of others, more are
        searched for."""
        for rows, vectors in self.table.blocks(self.query) if blocks is None else blocks:
            needed, k = self.size + SLACK, self.size + 2 * SLACK
            rows_found = np.full((len(rows), needed), -1, dtype=np.int64)
            unfinished = np.arange(len(rows))
            while len(unfinished):
                k = min(k, index.ntotal)
                candidates = index.search(vectors[unfinished], k)[1]
                exhausted = candidates[:, -1] < 0  # the searched lists have no more
                candidates[(candidates >= 0) & (self.groups[candidates] == self.groups[rows[unfinished]][:, None])] = -1
                order = np.argsort(candidates < 0, 1, kind="stable")[:, :needed]
                candidates = np.take_along_axis(candidates, order, 1)
                rows_found[unfinished, : candidates.shape[1]] = candidates
                if k == index.ntotal:
                    break
                unfinished, k = unfinished[~exhausted & (candidates[:, -1] < 0)], 4 * k
            yield self._make_windows(rows, vectors, rows_found)

    def _make_windows(self, rows: np.ndarray, vectors: np.ndarray, candidates: np.ndarray) -> Windows:
        """Return the windows of queries, whose candidates are scored and sorted in float64."""
        scores = np.full(candidates.shape, -np.inf)
        queries, places = np.nonzero(candidates >= 0)
        scores[queries, places] = self._score_pairs(vectors, queries, candidates[queries, places])
        order = np.lexsort((candidates, -scores))[:, : self.size]
        first, last = (np.searchsorted(self.sorted_groups, self.groups[rows], side=side) for side in ("left", "right"))
        positives = np.full(len(rows), np.inf)
        step = max(1, PAIRS * len(rows) // max(1, int((last - first).sum())))
        for start in range(0, len(rows), step):  # groups may be large
            part = slice(start, start + step)
            owners, numbers = _expand_ranges(first[part], last[part])
            owners, others = owners + start, self.grouped_rows[numbers]
            if self.query == self.candidate:
                is_other = others != rows[owners]
                owners, others = owners[is_other], others[is_other]
            np.minimum.at(positives, owners, self._score_pairs(vectors, owners, others))
        return Windows(
            rows,
            np.take_along_axis(candidates, order, 1),
            np.take_along_axis(scores, order, 1),
            np.where(np.isinf(positives), np.nan, positives),
            int((last - first).sum()),
        )

    def _score_pairs(self, vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return float64 [P], the scores of P pairs of a query and a row of the table."""
        scores = np.empty(len(rows))
        for first in range(0, len(rows), GATHERED):
            part = slice(first, first + GATHERED)
            candidates = self.table.vectors(self.candidate, rows[part], check=False).astype(np.float64)
            scores[part] = np.einsum("pd,pd->p", vectors[queries[part]].astype(np.float64), candidates)
            self.read += len(candidates)
            if 4 * self.table.dim * self.read > MAPPED:
                self.table.release()
                self.read = 0
        return scores

    def make_ivf(self, recall: float, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Return an index of the candidates, faiss's IVF with the vectors as they are, and its measured recall: the share that
        it finds of the windows of up to 1,000 queries, evenly spread. So many lists are searched that it is `recall` at least.

        Args:
            folder: keeps the centroids of the lists and the measures, from which another run makes the same index.
        """
        faiss, rows = faiss_module(), self.table.present(self.candidate)
        centroids_file, measures_file = folder / LEARNT, folder / MEASURED
        if not centroids_file.exists():
            lists = max(1, min(round(4 * np.sqrt(len(rows))), len(rows) // LISTED))
            index = faiss.index_factory(self.table.dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
            index.cp.seed = 1234
            training_rows = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 64 * lists)).astype(np.int64))
            index.train(self.table.vectors(self.candidate, rows[training_rows]))
            self.table.release()
            write_whole(centroids_file, lambda partial: faiss.write_index(index, str(partial)))
        index = faiss.read_index(str(centroids_file))
        for candidate_rows, vectors in self.table.blocks(self.candidate):
            index.add_with_ids(vectors, candidate_rows)
        if not measures_file.exists():
            write_json(measures_file, self._measure_recall(index, recall))
        measures = json.loads(measures_file.read_text())
        index.nprobe = measures["nprobe"]
        return index, measures

    def _measure_recall(self, index: Any, recall: float) -> dict[str, Any]:
        """Raise an index's nprobe until its recall is enough, and return the measures."""
        queries = self.table.present(self.query)
        queries = queries[np.unique(np.linspace(0, len(queries) - 1, min(len(queries), SAMPLE)).astype(np.int64))]
        block = [(queries, self.table.vectors(self.query, queries))]
        (exact,) = self.exact(block)
        lists, value = index.nlist, 0.0
        index.nprobe = 1
        while True:
            (approximate,) = self.approximate(index, block)
            sizes = (exact.candidates >= 0).sum(1)
            least_scores = exact.scores[np.arange(len(queries)), np.maximum(sizes - 1, 0)]
            correct = (approximate.scores >= least_scores[:, None] - SAME).sum(1)
            value = float(np.minimum(correct, sizes).sum() / max(1, sizes.sum()))
            if value >= recall or index.nprobe >= lists:
                break
            index.nprobe = min(lists, 2 * index.nprobe)
        measures = {"lists": lists, "nprobe": index.nprobe, "asked": recall, "recall": round(value, 4)}
        return measures | {"at": self.size, "queries": len(queries)}


class _TopCandidates:
    """The best k candidates so far of each query of a block: `rows` [Q, k], −1 where there are fewer, and their scores."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.rows = np.full((queries, k), -1, dtype=np.int64)
        self.scores = np.full((queries, k), -np.inf, dtype=np.float32)

    def add(self, part: slice, scores: torch.Tensor, candidate_rows: np.ndarray) -> None:
        """Add scores [q, C] of a part of the queries with candidates whose rows follow the earlier ones."""
        least = torch.from_numpy(self.scores[part, -1]).to(scores.device)[:, None]
        better = scores > least
        if int(better.count_nonzero()) > 4 * self.k * len(scores):
            better &= scores >= scores.topk(min(self.k, scores.shape[1]), 1).values[:, -1:]
        queries, columns = better.nonzero(as_tuple=True)
        if not len(queries):
            return
        new_scores = scores[queries, columns].cpu().numpy()
        owners, rows = queries.cpu().numpy() + part.start, candidate_rows[columns.cpu().numpy()]
        touched = np.unique(owners)
        owners = np.concatenate([np.repeat(touched, self.k), owners])
        new_scores = np.concatenate([self.scores[touched].ravel(), new_scores])
        rows = np.concatenate([self.rows[touched].ravel(), rows])
        order = np.lexsort((rows, -new_scores, owners))
        starts = np.searchsorted(owners[order], touched)
        kept = order[starts[:, None] + np.arange(self.k)]  # each has k earlier ones at least
        self.scores[touched], self.rows[touched] = new_scores[kept], rows[kept]


class _GroupPairs:
    """Finds the pairs of equal groups of queries and a block of C candidates."""

    def __init__(self, groups: np.ndarray) -> None:
        self.order = np.argsort(groups, kind="stable")
        self.sorted = groups[self.order]

    def pairs(self, groups: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (query, candidate) of all pairs with equal groups."""
        first, last = (np.searchsorted(self.sorted, groups, side=side) for side in ("left", "right"))
        owners, numbers = _expand_ranges(first, last)
        return torch.from_numpy(owners), torch.from_numpy(self.order[numbers])


def _expand_ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (k, number) for every number of every range first[k] … last[k] − 1."""
    counts = last - first
    owners = np.repeat(np.arange(len(first)), counts)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owners, first[owners] + within
