"""InfoNCE: the softmax contrastive loss."""

from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.score import Direction, LogSumExp, log1pexp


class InfoNCE(Objective):
    """−log of the positive's share of the softmax (CLIP, arXiv:2103.00020): log(1 + exp(L₁ − p)), where p is the
    positive's score and L₁ the log-sum-exp over the negatives; 0 for an anchor without any."""

    reductions = (LogSumExp(),)  # over the negatives

    def forward(self, d: Direction) -> Tensor:
        return log1pexp(d[LogSumExp()] - d.positives)
