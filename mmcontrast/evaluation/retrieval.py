"""Cross-modal retrieval: exact ranks by streaming over tiles of scores, and the metrics made of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 4096


def ranks(queries: Tensor, candidates: Tensor, query_groups: Tensor, candidate_groups: Tensor) -> Tensor:
    """The rank of each query's best hit, from 1: the number of candidates of other groups that score at least as much
    as the best candidate of its own, plus one. So ties count against the query. 0 where no candidate is of its group.

    Args:
        queries, candidates: [Q, D] and [C, D]; scores are their inner products.
        query_groups, candidate_groups: int64 [Q] and [C].

    Returns:
        int64 [Q]. O(Q + C) memory beside one tile.
    """
    found = torch.zeros(len(queries), dtype=torch.int64)
    for rows in torch.arange(len(queries)).split(TILE):
        best = torch.full((len(rows),), -torch.inf)
        ahead = torch.zeros(len(rows), dtype=torch.int64)
        for counting in (False, True):
            for columns in torch.arange(len(candidates)).split(TILE):
                scores = queries[rows] @ candidates[columns].T
                own = query_groups[rows, None] == candidate_groups[columns]
                if counting:
                    ahead += ((scores >= best[:, None]) & ~own).sum(1)
                else:
                    best = torch.maximum(best, scores.masked_fill(~own, -torch.inf).amax(1))
        found[rows] = torch.where(best.isfinite(), ahead + 1, 0)
    return found


def first_of_each_group(groups: Tensor) -> Tensor:
    """Positions [G] of the first row of every group, ascending: text candidates that say the same count once."""
    order = torch.argsort(groups, stable=True)
    new = torch.ones(len(groups), dtype=torch.bool)
    new[1:] = groups[order][1:] != groups[order][:-1]
    return order[new].sort().values


def retrieval_metrics(ranks: Tensor, num_candidates: int, at: Sequence[int]) -> dict[str, float]:
    """recall_at_k (the share of queries with a hit among the first k), median_rank, and the counts behind them.
    Queries without any hit among the candidates (rank 0) are left out."""
    ranks = ranks[ranks > 0]
    counts = {"num_queries": len(ranks), "num_candidates": num_candidates}
    if not len(ranks):
        return {**{f"recall_at_{k}": float("nan") for k in at}, "median_rank": float("nan"), **counts}
    recalls = {f"recall_at_{k}": (ranks <= k).double().mean().item() for k in at}
    return {**recalls, "median_rank": ranks.double().quantile(0.5).item(), **counts}
