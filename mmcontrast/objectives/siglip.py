"""SigLIP: every pair is a separate binary classification."""

from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.score import Direction, SoftplusSum, Sum, log1pexp

POSITIVES, POSITIVE_SUM = SoftplusSum(over="positives"), Sum(over="positives")


class SigLIP(Objective):
    """The loss log(1 + exp(−p)) + Σ over the negatives of log(1 + exp(z)) (arXiv:2303.15343, equation 1); scores p and z
    include the bias, −10 at the start of training; each pair is counted once.

    Args:
        group_positives: all candidates of the anchor's group are positives, with log(1 + exp(−z)) each (as in FLAIR,
            arXiv:2412.03561, where several captions fit a picture); otherwise they are left out.
    """

    both_directions = False

    def __init__(self, group_positives: bool = False) -> None:
        super().__init__()
        self.group_positives = group_positives
        self.reductions = (SoftplusSum(), *((POSITIVES, POSITIVE_SUM) if group_positives else ()))

    def forward(self, d: Direction) -> Tensor:
        positives = d[POSITIVES] - d[POSITIVE_SUM] if self.group_positives else log1pexp(-d.positives)
        return positives + d[SoftplusSum()]
