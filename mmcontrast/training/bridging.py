"""The loss of training through a bridge: two fields without pairs learn from a third field of the batch."""

import torch.distributed as dist
from torch import Tensor

from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.score import CrossSum, LogSumExp, score_statistics
from mmcontrast.score.ranks import Communication, agreed, exchange, ranks_of_node
from mmcontrast.score.teachers import Teacher

ALL, TARGET = LogSumExp(over="all"), CrossSum()


def bridge_loss(
    first: Tensor,
    second: Tensor,
    bank: Tensor,
    *,
    logit_scale: Tensor | float,
    bank_scale: float,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    communication: Communication = "auto",
) -> Tensor:
    """Return the cross-entropy between the targets that a bank gives for two fields and the softmax of their own cosines, the
    mean over both directions and their anchors on all ranks.

    The targets of an anchor are softmax_j(κ · cos(E_i, E_j)) over the other field's rows j, where E are expected entries of
    the bank (`Bridge.expected`). They get no gradient. No row need be paired with another.

    Args:
        first, second: unit rows [N, D] and [M, D] of two fields on this rank; N and M may be 0.
        bank: unit rows [B, D] of this rank's entries. Without one this rank's rows are left out.
        logit_scale: of the cosines. bank_scale: κ.
        backend, group, communication: as `score_statistics`.

    Returns:
        Scalar. As that of `contrastive_loss`, its mean over the ranks is the whole batch's loss.
    """
    if not len(bank):
        first, second = first[:0], second[:0]
    counts = exchange([len(first), len(second), ranks_of_node()], group, first.device)
    totals = [sum(rank[side] for rank in counts) for side in (0, 1)]
    nothing = (first.sum() + second.sum()) * 0.0
    if not all(totals):
        return nothing
    entries = bank if len(bank) else first.new_ones(1, first.shape[1])
    bridge = Bridge(entries.detach(), entries.detach(), bank_scale, bank_scale)
    expected = bridge.expected(first.detach()).to(first.dtype), bridge.expected(second.detach()).to(second.dtype)
    loss = nothing
    for side, (x, y) in enumerate(((first, second), (second, first))):
        (rows, _) = score_statistics(
            x, y, [ALL, TARGET], scale=logit_scale, paired=False, columns=False, backend=backend, group=group,
            communication=communication, sizes=[(rank[side], rank[1 - side]) for rank in counts],
            within=agreed([rank[2] for rank in counts]), teachers=[Teacher(expected[side], expected[1 - side], bank_scale)],
        )  # fmt: skip
        loss = loss + (rows[ALL] - rows[TARGET]).sum() * (len(counts) / totals[side] / 2)
    return loss
