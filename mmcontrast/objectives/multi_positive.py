"""A loss with several positives per anchor: all present candidates of its group."""

import torch
from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.score import Direction, LogSumExp, Sum

POSITIVES, ALL, COUNT = Sum(over="positives"), LogSumExp(over="all"), LogSumExp(over="positives", exponent=0.0)


class MultiPositive(Objective):
    """The loss −1/|P| Σ_{p∈P} [z_p − log Σ_all e^z] over the candidates P of the anchor's group: the outside form of SupCon
    (arXiv:2004.11362, equation 2), UniCL (2204.03610) and 1-to-K. If all group ids are different, it is
    InfoNCE. 0 for an anchor without negatives."""

    reductions = (POSITIVES, ALL, COUNT)

    def forward(self, d: Direction) -> Tensor:
        return torch.where(d.num_negatives > 0, d[ALL] - d[POSITIVES] * (-d[COUNT]).exp(), 0.0)
