"""What to watch while a contrastive model learns: a few numbers a direction, from two more reductions of the same scores."""

import torch
from torch import Tensor

from mmcontrast.score import Direction, LogSumExp, Maximum

FIRST, SECOND, HARDEST = LogSumExp(), LogSumExp(exponent=2.0), Maximum()
WATCHED = (FIRST, SECOND, HARDEST)  # over the negatives


@torch.no_grad()
def signals_of(d: Direction, share: float) -> dict[str, Tensor]:
    """Means over the anchors, [] each: sums times `share`, to be averaged over the ranks; 0 for one without negatives.

    accuracy: the share whose positive's score is above every negative's.
    effective_negatives: (Σ w)² / Σ w² of the negatives' weights w = e^z: how many of them carry the loss; 1 to their number.
    temperature: 1 / scale; and where anchors have their own, its quantiles at 5, 50 and 95 %, over all ranks.
    """
    some = d.num_negatives > 0
    number = (2.0 * d[FIRST] - d[SECOND]).exp()
    temperature = 1.0 / d.scale
    seen = {
        "accuracy": ((d.positives > d[HARDEST]) & some).to(number.dtype).sum() * share,
        "effective_negatives": number.where(some, number.new_zeros(())).sum() * share,
        "temperature": temperature.expand_as(number).sum() * share,
    }
    if temperature.dim():
        every = d.everyone(temperature).sort().values
        for percent in (5, 50, 95):
            seen[f"temperature_p{percent:02d}"] = every[round(percent / 100 * (len(every) - 1))]
    return seen
