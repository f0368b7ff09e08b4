"""Statistics of each anchor's own candidates: N × K scores, which fit in memory, in plain operations."""

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
    present: Tensor,
    reductions: Sequence[Reduction],
    *,
    scale: Tensor,
    bias: Tensor | float | None = None,
    link: Link | None = None,
    limits: Tensor | None = None,
) -> Direction:
    """Return the reductions of the scores of anchors x [N, D] with their own negatives [N, K, D], to be merged with others.

    Args:
        present: bool [N, K], which of the candidates exist.
        scale: [] or [N]. limits: [N], for reductions with `below`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if link is not None:
        x, candidates = link.rows(x, columns=False), link.rows(candidates, columns=True)
    dots = torch.linalg.vecdot(x.to(dtype).unsqueeze(1), candidates.to(dtype))
    z = (dots if link is None else link.value(dots)) * (scale.unsqueeze(1) if scale.dim() else scale)
    z = z if bias is None else z + bias
    above = None if limits is None else z.detach() > limits[:, None]
    values: dict[Reduction, Tensor] = {}
    for reduction in reductions:
        if reduction.over == "positives":
            values[reduction] = z.new_full((len(z),), reduction.identity)
        else:
            values[reduction] = reduce_rows(replace(reduction, over="negatives"), z, ~present, above, None)
    return Direction(z.new_zeros(()), present.sum(1), scale, values)
