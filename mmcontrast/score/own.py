"""Candidates of each anchor alone: N × K scores, which fit into memory, in plain operations."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmcontrast.score.backends.dense import reduce_rows
from mmcontrast.score.links import Link
from mmcontrast.score.reductions import Reduction
from mmcontrast.score.statistics import Direction


def own_statistics(
    x: Tensor,
    candidates: Tensor,
    there: Tensor,
    reductions: Sequence[Reduction],
    *,
    scale: Tensor,
    bias: Tensor | float | None = None,
    link: Link | None = None,
    limits: Tensor | None = None,
) -> Direction:
    """Reductions of the scores of anchors x [N, D] with negatives of their own [N, K, D], to be merged with others.

    Args:
        there: bool [N, K], which of the candidates exist.
        scale: [] or [N]. limits: [N], for reductions with `below`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if link is not None:
        x, candidates = link.rows(x, columns=False), link.rows(candidates, columns=True)
    dots = torch.linalg.vecdot(x.to(dtype).unsqueeze(1), candidates.to(dtype))
    z = (dots if link is None else link.value(dots)) * (scale.unsqueeze(1) if scale.dim() else scale)
    z = z if bias is None else z + bias
    above = None if limits is None else z.detach() > limits[:, None]
    values = {
        r: z.new_full((len(z),), r.identity)
        if r.over == "positives"
        else reduce_rows(replace(r, over="negatives"), z, ~there, above, None)
        for r in reductions
    }
    return Direction(z.new_zeros(()), there.sum(1), scale, values)
