"""SigLIP: every pair a binary classification of its own."""

from typing import ClassVar

from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.score import Direction, SoftplusSum, log1pexp


class SigLIP(Objective):
    """log(1 + exp(−p)) + Σ over the negatives of log(1 + exp(z)) (arXiv:2303.15343, equation 1); scores p and z include
    the bias, −10 at the start of training; each pair is counted once."""

    reductions = (SoftplusSum(),)
    both_directions: ClassVar[bool] = False

    def forward(self, d: Direction) -> Tensor:
        return log1pexp(-d.positives) + d[SoftplusSum()]
