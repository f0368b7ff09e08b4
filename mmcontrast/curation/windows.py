"""The best candidates of every query of an embedding table, without its own group: exactly, by tiles, or by faiss's IVF.

Shapes: Q queries of a block, C candidates of one, K candidates of a query's window, D numbers.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmcontrast.curation.stage import write_json, write_whole
from mmcontrast.errors import UserError
from mmcontrast.search.query import faiss_module
from mmcontrast.search.table import StoredTable

Block = tuple[np.ndarray, np.ndarray]  # rows of the table, int64 [Q], and their vectors, float32 [Q, D]
QUERIES = 1024  # that are scored together with a block of candidates
SLACK = 8  # candidates beyond a window: where float32 cannot tell which is better, float64 does
PAIRS = 65_536  # vectors of a group's candidates that are scored together
GATHERED = 16_384  # vectors in memory at once, in float64
MAPPED = 2**27  # bytes that are read at random before their pages are let go
LISTED = 39  # rows that a list of the IVF is learnt from, at least
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

    A sample of the query's own group is no candidate, whatever its score. Which candidates are in a window is found in float32;
    their scores are then computed in float64, so they depend on neither tiles nor threads.

    Args:
        groups: [N] of all rows of the table.
        size: K.
        device: of the product; default: the CPU.

    Raises:
        UserError: for a device that there is not.
    """

    def __init__(
        self, table: StoredTable, query: str, candidate: str, groups: np.ndarray, size: int, device: str = "cpu"
    ) -> None:
        self.table, self.query, self.candidate, self.groups, self.size = table, query, candidate, groups, size
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {' '.join(str(error).split())[:200]}") from error
        self.read = 0  # vectors, since pages were let go
        rows = table.present(candidate)
        order = np.argsort(groups[rows], kind="stable")
        self.grouped_rows, self.sorted_groups = rows[order], groups[rows[order]]  # candidates by their group

    def exact(self, blocks: Iterable[Block] | None = None) -> Iterator[Windows]:
        """Yield the windows of all queries, or of these, by the product of all pairs, a tile at a time."""
        for rows, vectors in self.table.blocks(self.query) if blocks is None else blocks:
            found = _Best(len(rows), self.size + SLACK)
            queries = torch.from_numpy(vectors).to(self.device)
            for numbers, block in self.table.blocks(self.candidate):
                candidates, groups = torch.from_numpy(block).to(self.device).T, _Groups(self.groups[numbers])
                for first in range(0, len(rows), QUERIES):
                    part = slice(first, min(first + QUERIES, len(rows)))
                    scores = queries[part] @ candidates
                    scores[groups.pairs(self.groups[rows[part]])] = -torch.inf
                    found.add(part, scores, numbers)
            yield self._scored(rows, vectors, found.rows)

    def approximate(self, index: Any, blocks: Iterable[Block] | None = None) -> Iterator[Windows]:
        """Yield the same by an index that `make_ivf` made. Where candidates of the query's group take the places of others, as
        many more are asked for."""
        for rows, vectors in self.table.blocks(self.query) if blocks is None else blocks:
            wanted, k = self.size + SLACK, self.size + 2 * SLACK
            found = np.full((len(rows), wanted), -1, dtype=np.int64)
            left = np.arange(len(rows))
            while len(left):
                k = min(k, index.ntotal)
                candidates = index.search(vectors[left], k)[1]
                ended = candidates[:, -1] < 0  # the lists that were looked into have no more
                candidates[(candidates >= 0) & (self.groups[candidates] == self.groups[rows[left]][:, None])] = -1
                order = np.argsort(candidates < 0, 1, kind="stable")[:, :wanted]
                candidates = np.take_along_axis(candidates, order, 1)
                found[left, : candidates.shape[1]] = candidates
                if k == index.ntotal:
                    break
                left, k = left[~ended & (candidates[:, -1] < 0)], 4 * k
            yield self._scored(rows, vectors, found)

    def _scored(self, rows: np.ndarray, vectors: np.ndarray, candidates: np.ndarray) -> Windows:
        scores = np.full(candidates.shape, -np.inf)
        queries, places = np.nonzero(candidates >= 0)
        scores[queries, places] = self._products(vectors, queries, candidates[queries, places])
        order = np.lexsort((candidates, -scores))[:, : self.size]
        first, last = (np.searchsorted(self.sorted_groups, self.groups[rows], side=side) for side in ("left", "right"))
        positives = np.full(len(rows), np.inf)
        step = max(1, PAIRS * len(rows) // max(1, int((last - first).sum())))
        for start in range(0, len(rows), step):  # groups may be large
            some = slice(start, start + step)
            owners, numbers = _ranges(first[some], last[some])
            owners, others = owners + start, self.grouped_rows[numbers]
            if self.query == self.candidate:
                apart = others != rows[owners]
                owners, others = owners[apart], others[apart]
            np.minimum.at(positives, owners, self._products(vectors, owners, others))
        return Windows(
            rows,
            np.take_along_axis(candidates, order, 1),
            np.take_along_axis(scores, order, 1),
            np.where(np.isinf(positives), np.nan, positives),
            int((last - first).sum()),
        )

    def _products(self, vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return float64 [P], of P pairs of a query and a row of the table."""
        found = np.empty(len(rows))
        for first in range(0, len(rows), GATHERED):
            some = slice(first, first + GATHERED)
            others = self.table.vectors(self.candidate, rows[some], check=False).astype(np.float64)
            found[some] = np.einsum("pd,pd->p", vectors[queries[some]].astype(np.float64), others)
            self.read += len(others)
            if 4 * self.table.dim * self.read > MAPPED:
                self.table.release()
                self.read = 0
        return found

    def make_ivf(self, recall: float, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Return an index of the candidates, faiss's IVF with the vectors as they are, and what was measured: of the windows of
        up to 1,000 queries, evenly spread, the share that it finds. So many lists are looked into that it is `recall` at
        least.

        Args:
            folder: keeps the centroids of the lists and what was measured, from which another run makes the same index.
        """
        faiss, rows = faiss_module(), self.table.present(self.candidate)
        learnt, measured = folder / LEARNT, folder / MEASURED
        if not learnt.exists():
            lists = max(1, min(round(4 * np.sqrt(len(rows))), len(rows) // LISTED))
            index = faiss.index_factory(self.table.dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
            index.cp.seed = 1234
            learnt_from = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 64 * lists)).astype(np.int64))
            index.train(self.table.vectors(self.candidate, rows[learnt_from]))
            self.table.release()
            write_whole(learnt, lambda partial: faiss.write_index(index, str(partial)))
        index = faiss.read_index(str(learnt))
        for numbers, vectors in self.table.blocks(self.candidate):
            index.add_with_ids(vectors, numbers)
        if not measured.exists():
            write_json(self._measured(index, recall), measured)
        about = json.loads(measured.read_text())
        index.nprobe = about["nprobe"]
        return index, about

    def _measured(self, index: Any, recall: float) -> dict[str, Any]:
        """Raise an index's nprobe until its recall is enough, and return what was measured."""
        asking = self.table.present(self.query)
        asking = asking[np.unique(np.linspace(0, len(asking) - 1, min(len(asking), SAMPLE)).astype(np.int64))]
        block = [(asking, self.table.vectors(self.query, asking))]
        (best,) = self.exact(block)
        lists, value = index.nlist, 0.0
        index.nprobe = max(1, lists // 64)
        while True:
            (found,) = self.approximate(index, block)
            wanted = (best.candidates >= 0).sum(1)
            last = best.scores[np.arange(len(asking)), np.maximum(wanted - 1, 0)]
            right = (found.scores >= last[:, None] - SAME).sum(1)
            value = float(np.minimum(right, wanted).sum() / max(1, wanted.sum()))
            if value >= recall or index.nprobe >= lists:
                break
            index.nprobe = min(lists, 2 * index.nprobe)
        about = {"lists": lists, "nprobe": index.nprobe, "asked": recall, "recall": round(value, 4)}
        return about | {"at": self.size, "queries": len(asking)}


class _Best:
    """The best k candidates so far of each query of a block: `rows` [Q, k], −1 where there are fewer, and their scores."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.rows = np.full((queries, k), -1, dtype=np.int64)
        self.scores = np.full((queries, k), -np.inf, dtype=np.float32)

    def add(self, part: slice, scores: torch.Tensor, numbers: np.ndarray) -> None:
        """Take note of scores [q, C] of a part of the queries with candidates whose rows follow those of before."""
        least = torch.from_numpy(self.scores[part, -1]).to(scores.device)[:, None]
        better = scores > least
        if int(better.count_nonzero()) > 4 * self.k * len(scores):
            better &= scores >= scores.topk(min(self.k, scores.shape[1]), 1).values[:, -1:]
        queries, columns = better.nonzero(as_tuple=True)
        if not len(queries):
            return
        new = scores[queries, columns].cpu().numpy()
        owners, rows = queries.cpu().numpy() + part.start, numbers[columns.cpu().numpy()]
        touched = np.unique(owners)
        owners = np.concatenate([np.repeat(touched, self.k), owners])
        new = np.concatenate([self.scores[touched].ravel(), new])
        rows = np.concatenate([self.rows[touched].ravel(), rows])
        order = np.lexsort((rows, -new, owners))
        starts = np.searchsorted(owners[order], touched)
        kept = order[starts[:, None] + np.arange(self.k)]  # each has k of before at least
        self.scores[touched], self.rows[touched] = new[kept], rows[kept]


class _Groups:
    """The groups [C] of a block of candidates."""

    def __init__(self, groups: np.ndarray) -> None:
        self.order = np.argsort(groups, kind="stable")
        self.sorted = groups[self.order]

    def pairs(self, groups: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (query, candidate) of all pairs with equal groups."""
        first, last = (np.searchsorted(self.sorted, groups, side=side) for side in ("left", "right"))
        owners, numbers = _ranges(first, last)
        return torch.from_numpy(owners), torch.from_numpy(self.order[numbers])


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (k, number) for every number of every range first[k] … last[k] − 1."""
    counts = last - first
    owners = np.repeat(np.arange(len(first)), counts)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owners, first[owners] + within
