"""Distillation of a teacher's similarities between the samples of a batch."""

from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.score import CrossSum, Direction, LogSumExp, log1pexp

ALL, NEGATIVES, TARGET = LogSumExp(over="all"), LogSumExp(), CrossSum()


class Distillation(Objective):
    """The loss alpha · cross-entropy between a teacher's softmax and the model's + (1 − alpha) · InfoNCE, in each direction.

    The softmaxes of several teachers are averaged (DataCompDR, arXiv:2311.17049). open_clip's and TinyCLIP's distillation
    loss is alpha = 1 beside InfoNCE. All candidates take part in the teacher's term, whatever their group ids.

    Args:
        alpha: the weight of the teacher's term, in [0, 1].
    """

    teachers = True

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, it must be in [0, 1]")
        self.alpha = alpha
        self.reductions = (ALL, TARGET, *((NEGATIVES,) if alpha < 1 else ()))

    def forward(self, d: Direction) -> Tensor:
        distilled = d[ALL] - d[TARGET]
        if self.alpha == 1:
            return distilled
        return self.alpha * distilled + (1.0 - self.alpha) * log1pexp(d[NEGATIVES] - d.positives)
