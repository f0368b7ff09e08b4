"""The debiased contrastive loss: a known share of an anchor's negatives are in fact positives."""

import math

import torch
from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.objectives.hard_negative import log_weighted_mean
from mmcontrast.score import Direction, LogSumExp, log1pexp


class Debiased(Objective):
    """The loss −log[e^p / (e^p + n g)], g = max((mean_neg e^z − τ⁺ e^p) / (1 − τ⁺), e^{−1/τ}) (arXiv:2007.00224, equation 8,
    with one positive), in log space; 1/τ is the logit scale, n the number of negatives. With beta the mean is weighted by
    e^{βz}: the hard variant (arXiv:2010.04592). 0 for an anchor without negatives.

    Args:
        tau_plus: the probability that a negative is of the anchor's class, in [0, 1); or for each sample, where
            `contrastive_loss` is given sample_values {"tau_plus": [N]}.
        beta: hardness, ≥ 0; 0: all negatives have equal weights.
    """

    sample_values = ("tau_plus",)
    of_cosines = True  # −1/τ is the lowest possible score

    def __init__(self, tau_plus: float = 0.1, beta: float = 0.0) -> None:
        super().__init__()
        if not 0 <= tau_plus < 1:
            raise ValueError(f"tau_plus is {tau_plus}, it must be in [0, 1)")
        if not (beta >= 0 and math.isfinite(beta)):
            raise ValueError(f"beta is {beta}, it must be ≥ 0")
        self.tau_plus, self.beta = tau_plus, beta
        self.reductions = (LogSumExp(exponent=1 + beta), LogSumExp(exponent=beta))

    def forward(self, d: Direction) -> Tensor:
        log_mean, has_negatives = log_weighted_mean(d, self.beta), d.num_negatives > 0
        floor = -d.scale.expand_as(log_mean)
        tau_plus = d.given["tau_plus"].to(log_mean) if "tau_plus" in d.given else log_mean.new_tensor(self.tau_plus)
        share = tau_plus.log() + d.positives - log_mean  # log of what is subtracted, in units of the mean
        below = share < 0
        log_remaining = (-torch.expm1(torch.where(below, share, -1.0))).log()
        estimate = torch.where(below, log_mean + log_remaining - torch.log1p(-tau_plus), floor)
        negatives = d.num_negatives.clamp(min=1).to(log_mean.dtype).log() + torch.maximum(estimate, floor)
        return torch.where(has_negatives, log1pexp(negatives - d.positives), 0.0)
