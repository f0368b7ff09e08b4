"""InfoNCE: the softmax contrastive loss."""

import math

import torch
from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.score import Direction, LogSumExp, Sum, log1pexp


class InfoNCE(Objective):
    """The loss −log of the positive's share of the softmax (CLIP, arXiv:2103.00020): log(1 + exp(L₁ − p)), where p is the
    positive's score and L₁ the log-sum-exp over the negatives; 0 for an anchor without any.

    Args:
        false_negative_margin: a candidate whose cosine is above the positive's by more than this is no negative of the anchor
            (Qwen3-Embedding, arXiv:2506.05176, takes 0.1); None: all are.
        guide: compare a teacher's cosines for that (GISTEmbed, arXiv:2402.16829, with a margin of 0).
        label_smoothing: the share of the target that is spread equally over all candidates, in [0, 1).
        both_directions: of a pair; False: only the first field's samples are anchors.
    """

    def __init__(
        self,
        false_negative_margin: float | None = None,
        label_smoothing: float = 0.0,
        guide: bool = False,
        both_directions: bool = True,
    ) -> None:
        super().__init__()
        if false_negative_margin is not None and not math.isfinite(false_negative_margin):
            raise ValueError(f"false_negative_margin is {false_negative_margin}, it must be a finite difference of cosines")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, it must be in [0, 1)")
        if guide and false_negative_margin is None:
            raise ValueError("guide needs a false_negative_margin, as 0")
        self.false_negative_margin, self.label_smoothing = false_negative_margin, label_smoothing
        if not both_directions:
            self.both_directions = False
        self.guided = self.teachers = guide
        below = false_negative_margin is not None
        self.negatives = LogSumExp(below=below)
        self.sum, self.log_count = Sum(below=below), LogSumExp(exponent=0.0, below=below)
        self.reductions = (self.negatives, *((self.sum, self.log_count) if label_smoothing else ()))

    def forward(self, d: Direction) -> Tensor:
        loss = log1pexp(d[self.negatives] - d.positives)
        if self.label_smoothing == 0:
            return loss
        mean = (d.positives + d[self.sum]) / (1.0 + d[self.log_count].exp())
        smoothed = loss + self.label_smoothing * (d.positives - mean)
        return torch.where(d.num_negatives > 0, smoothed, 0.0)
