"""Decoupled contrastive learning: the softmax without its positive."""

import torch
from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.score import Direction, LogSumExp


class DCL(Objective):
    """The loss L₁ − p (arXiv:2110.06848, equation 6, without weights): the positive is left out of the denominator, so that
    easy positives keep their gradient and small batches lose less; p is the positive's score, L₁ the log-sum-exp over the
    negatives. It is 0 for an anchor without any."""

    reductions = (LogSumExp(),)

    def forward(self, d: Direction) -> Tensor:
        return torch.where(d.num_negatives > 0, d[LogSumExp()] - d.positives, 0.0)
