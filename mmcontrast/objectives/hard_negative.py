"""Hard-negative reweighting, in which closer negatives have larger weights."""

import math

import torch
from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.score import Direction, LogSumExp


class HardNegative(Objective):
    """HN-NCE (DiHT, arXiv:2301.02280): −log[e^p / (α e^p + Σ_neg w_j e^{z_j})] with w_j = n e^{βz_j} / Σ_neg e^{βz}.

    The weights of an anchor's n negatives sum to n. Σ w e^z = n e^{L₁₊β − L_β}, so two log-sum-exps suffice. α = 1 and β = 0 is
    InfoNCE, α = 0 leaves the positive out as DCL does. 0 for an anchor without negatives.

    Args:
        beta: how strongly weight moves to hard negatives, ≥ 0; scores include the logit scale.
        alpha: the weight of the positive in the denominator, in [0, 1].
        detach_weights: treat the weights as constants in the gradient (the definition differentiates them).
    """

    def __init__(self, beta: float = 0.25, alpha: float = 1.0, detach_weights: bool = False) -> None:
        super().__init__()
        if not (beta >= 0 and math.isfinite(beta)):
            raise ValueError(f"beta is {beta}, it must be ≥ 0")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, it must be in [0, 1]")
        self.beta, self.alpha, self.detach_weights = beta, alpha, detach_weights
        self.reductions = (LogSumExp(exponent=1 + beta), LogSumExp(exponent=beta))

    def forward(self, d: Direction) -> Tensor:
        log_mean, has_negatives = log_weighted_mean(d, self.beta, self.detach_weights), d.num_negatives > 0
        negatives = d.num_negatives.clamp(min=1).to(log_mean.dtype).log() + log_mean
        loss = negatives - d.positives
        if self.alpha > 0:
            loss = torch.logaddexp(torch.full_like(loss, math.log(self.alpha)), loss)
        return torch.where(has_negatives, loss, 0.0)


def log_weighted_mean(d: Direction, beta: float, detach_weights: bool = False) -> Tensor:
    """Return the log of the mean of e^z over an anchor's negatives, weighted by e^{βz}: L₁₊β − L_β [N]; 0 without negatives."""
    has_negatives = d.num_negatives > 0
    numerator = torch.where(has_negatives, d[LogSumExp(exponent=1 + beta)], 0.0)
    denominator = torch.where(has_negatives, d[LogSumExp(exponent=beta)], 0.0)
    if detach_weights:  # with constant weights Σ w e^z has the gradient of L₁₊β over 1 + β
        numerator = numerator / (1 + beta) + (numerator * (beta / (1 + beta))).detach()
        denominator = denominator.detach()
    return numerator - denominator
