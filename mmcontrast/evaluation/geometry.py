"""Measure the geometry of unit embeddings: alignment, uniformity, modality gap, hubness, effective rank.

Each is an `Estimate`: a value, and its value for resamples. Shapes: N rows (pairs: row i of x belongs to row i of y), D
dimensions. O(N·D) memory.
"""

import math

import torch
from torch import Tensor

from mmcontrast.evaluation.bootstrap import Estimate, means
from mmcontrast.evaluation.neighbours import nearest
from mmcontrast.score import LogSumExp, score_statistics

HUB_NEIGHBOURS = 10


def alignment(x: Tensor, y: Tensor) -> Estimate:
    """Return the mean of ‖x_i − y_i‖² over pairs [N, D] (Wang and Isola, arXiv:2005.10242, with α = 2): 0 where pairs agree."""
    return Estimate.of_mean((x - y).double().square().sum(1))


def uniformity(rows: Tensor) -> Estimate:
    """Compute the log of the mean of e^{−2 ‖x − y‖²} over all pairs of different rows of unit embeddings [N, D] (Wang and
    Isola, arXiv:2005.10242): 0 where all are one point, about −4 where they fill the sphere. NaN for one row.

    Resamples have it to first order: row i's influence is 2 (m_i / m − 1), with its mean m_i over the others and the mean m
    of all."""
    if len(rows) < 2:
        return Estimate.of_mean(rows.new_full((1,), torch.nan))
    direction, _ = score_statistics(rows, rows, [LogSumExp()], scale=4.0, columns=False)
    log_sums = direction[LogSumExp()].double() - math.log(len(rows) - 1) - 4.0  # ‖x − y‖² = 2 − 2 x·y
    value = log_sums.logsumexp(0) - math.log(len(rows))
    return Estimate.of_mean(value + 2 * (log_sums - value).expm1())


def modality_gap(x: Tensor, y: Tensor) -> Estimate:
    """Compute ‖mean of x − mean of y‖ of pairs [N, D] (Liang et al., arXiv:2203.02053): 0 for a common centre, 2 at most."""
    differences = (x - y).double()
    return Estimate.of(lambda weights: means(differences, weights).norm(dim=1), len(x), x.device)


def hubness(
    queries: Tensor, candidates: Tensor, k: int = HUB_NEIGHBOURS, *, exclude: Tensor | None = None
) -> tuple[Estimate, Estimate]:
    """Return (skewness, share of antihubs) of N_k, how many of the queries [Q, D] have a candidate [C, D] among their nearest k
    (Radovanović et al., 2010, JMLR 11): 0 skewness without hubs; an antihub is nobody's neighbour.

    Resamples draw candidates, each with the N_k that it has. The skewness is NaN where all have the same.

    Args:
        exclude: as `nearest`'s; rows among themselves: `torch.arange(len(rows))`.

    Raises:
        ValueError: if there are not k candidates.
    """
    neighbours = nearest(queries, candidates, k, exclude=exclude)[1]
    occurrences = neighbours.flatten().bincount(minlength=len(candidates)).double()
    centred = occurrences - occurrences.mean()  # the third moment is a difference of powers, small ones
    powers = torch.stack([centred, centred**2, centred**3], 1)

    def skewness(weights: Tensor) -> Tensor:
        first, second, third = means(powers, weights).unbind(1)
        return (third - 3 * first * second + 2 * first**3) / (second - first**2).clamp(min=0) ** 1.5

    return Estimate.of(skewness, len(candidates), candidates.device), Estimate.of_mean(occurrences == 0)


def effective_rank(rows: Tensor, *, centred: bool = False) -> Estimate:
    """Compute exp of the entropy of the singular values of rows [N, D], as shares of their sum (Roy and Vetterli, 2007): from 1
    to D. Uncentred it is RankMe (arXiv:2210.02885), without its ε; `centred` subtracts the rows' mean first.

    Resamples have it to first order: the singular values are roots of the eigenvalues λ_d of Σ x xᵀ, which row i moves by
    (u_d·x_i)² − λ_d / N. Of few rows the value is too low, by about a constant over N, which the interval does not make good.
    """
    number = len(rows)
    if not number:
        return Estimate.of_mean(rows.new_empty(0))
    rows = rows.double()
    if centred:
        rows = rows - rows.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(rows.T @ rows)
    kept = eigenvalues > eigenvalues[-1] * number * torch.finfo(torch.float64).eps
    singular = eigenvalues[kept].sqrt()
    shares = singular / singular.sum()
    entropy = torch.special.entr(shares).sum()
    # ∂ entropy / ∂σ_d = −(log p_d + entropy) / Σσ, and ∂σ_d / ∂λ_d = 1 / 2σ_d
    slopes = -(shares.log() + entropy) / (2 * singular * singular.sum())
    influence = number * ((rows @ vectors[:, kept]).square() @ slopes) - (eigenvalues[kept] * slopes).sum()
    return Estimate.of_mean(entropy.exp() * (1 + influence))
