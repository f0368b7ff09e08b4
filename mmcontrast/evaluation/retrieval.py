"""Compute retrieval metrics from the ranks of each query's relevant candidates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcontrast.evaluation.rankings import Ranking


def first_of_each_group(groups: Tensor) -> Tensor:
    """Return the positions [G] of the first row of every group, ascending: text candidates that say the same count once."""
    order = torch.argsort(groups, stable=True)
    new = torch.ones(len(groups), dtype=torch.bool)
    new[1:] = groups[order][1:] != groups[order][:-1]
    return order[new].sort().values


def query_metrics(ranking: Ranking, at: Sequence[int]) -> dict[str, Tensor]:
    """Compute metrics per query that has a relevant candidate, float64 [Q'], in the queries' order.

    recall_at_k: 1 if a relevant candidate is among the first k, as CLIP's papers count (trec_eval: success).
    all_recall_at_k: the share of the relevant candidates that are among the first k (trec_eval: recall).
    mrr: 1 / the rank of the first. map: average precision, the mean over relevant candidates of the precision at their ranks.
    ndcg_at_k: Σ gain / log₂(rank + 1) over the first k, divided by the largest possible (Järvelin and Kekäläinen 2002).
    rank: of the first relevant candidate.
    """
    queries, num_relevant = ranking.queries.unique_consecutive(return_counts=True)
    query_of_pair = torch.arange(len(queries)).repeat_interleave(num_relevant)
    ranks = ranking.ranks.double()
    starts = num_relevant.cumsum(0) - num_relevant
    position = torch.arange(len(query_of_pair)) - starts[query_of_pair] + 1  # from 1, among the query's relevant candidates
    first = ranks[position == 1]

    def total(values: Tensor) -> Tensor:
        return torch.zeros(len(queries), dtype=torch.float64).index_add_(0, query_of_pair, values.double())

    ideal_gains = ranking.gains[_by_query_and_gain(query_of_pair, ranking.gains)]
    metrics: dict[str, Tensor] = {f"recall_at_{k}": (first <= k).double() for k in at}
    if len(query_of_pair) > len(queries):
        metrics |= {f"all_recall_at_{k}": total(ranks <= k) / num_relevant for k in at}
    for k in at:
        dcg = total(ranking.gains / (ranks + 1).log2() * (ranks <= k))
        metrics[f"ndcg_at_{k}"] = dcg / total(ideal_gains / (position + 1).double().log2() * (position <= k))
    return metrics | {"mrr": 1 / first, "map": total(position / ranks) / num_relevant, "rank": first}


def _by_query_and_gain(query_of_pair: Tensor, gains: Tensor) -> Tensor:
    order = gains.argsort(descending=True, stable=True)
    return order[query_of_pair[order].argsort(stable=True)]


def retrieval_metrics(ranking: Ranking, at: Sequence[int]) -> dict[str, float]:
    """Return the means of the queries' metrics, median_rank, and the counts. Queries without a relevant candidate are left
    out; NaN if none has one."""
    metrics = query_metrics(ranking, at)
    ranks = metrics.pop("rank")
    means = {name: values.mean().item() for name, values in metrics.items()}
    median = ranks.quantile(0.5).item() if len(ranks) else float("nan")
    return {**means, "median_rank": median, "num_queries": len(ranks), "num_candidates": ranking.num_candidates}
