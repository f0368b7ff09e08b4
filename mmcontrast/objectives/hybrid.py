"""Hybrid NCE, with several positives inside the logarithm and reweighted hard negatives."""

import math

import torch
from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.objectives.hard_negative import log_weighted_mean
from mmcontrast.score import Direction, LogSumExp

POSITIVES = LogSumExp(over="positives")


class Hybrid(Objective):
    """The loss log(α + N/P): P = (1 − λ) e^p + λ Σ e^z over the anchor's group, N the negatives' sum weighted by e^{βz} as in
    `HardNegative` (AuroLA's Hybrid-NCE, which takes τ = 0.05). 0 for an anchor without negatives.

    Args:
        positives_weight: λ in [0, 1].
        alpha: α in [0, 1]. beta: β ≥ 0.
    """

    def __init__(self, positives_weight: float = 0.2, alpha: float = 1.0, beta: float = 0.1) -> None:
        super().__init__()
        if not (0 <= positives_weight <= 1 and 0 <= alpha <= 1 and 0 <= beta < math.inf):
            raise ValueError(f"positives_weight {positives_weight} and alpha {alpha} must be in [0, 1], beta {beta} at least 0")
        self.positives_weight, self.alpha, self.beta = positives_weight, alpha, beta
        self.reductions = (LogSumExp(exponent=1 + beta), LogSumExp(exponent=beta), POSITIVES)

    def forward(self, d: Direction) -> Tensor:
        log_mean, has_negatives = log_weighted_mean(d, self.beta), d.num_negatives > 0
        negatives = d.num_negatives.clamp(min=1).to(log_mean.dtype).log() + log_mean
        parts = [(1.0 - self.positives_weight, d.positives), (self.positives_weight, d[POSITIVES])]
        positives = torch.stack([math.log(weight) + value for weight, value in parts if weight > 0]).logsumexp(0)
        loss = negatives - positives
        if self.alpha > 0:
            loss = torch.logaddexp(torch.full_like(loss, math.log(self.alpha)), loss)
        return torch.where(has_negatives, loss, 0.0)
