"""Signals of training: a few numbers per direction, from further reductions of the same scores."""

import torch
from torch import Tensor

from mmcontrast.score import Direction, LogSumExp, Maximum

FIRST, SECOND, HARDEST = LogSumExp(), LogSumExp(exponent=2.0), Maximum()
WATCHED = (FIRST, SECOND, HARDEST)  # over the negatives


@torch.no_grad()
def signals_of(d: Direction, share: float) -> dict[str, Tensor]:
    """Return the means over the anchors, [] each: sums times `share`, to be averaged over the ranks. An anchor without
    negatives counts as 0.

    accuracy: the share whose positive's score is above every negative's.
    effective_negatives: (Σ w)² / Σ w² of the negatives' weights w = e^z: the number of negatives that carry the loss, at least
        1.
    temperature: 1 / scale; with individual temperatures also its quantiles at 5, 50 and 95 %, over all ranks.
    """
    has_negatives = d.num_negatives > 0
    number = (2.0 * d[FIRST] - d[SECOND]).exp()
    temperature = 1.0 / d.scale
    signals = {
        "accuracy": ((d.positives > d[HARDEST]) & has_negatives).to(number.dtype).sum() * share,
        "effective_negatives": number.where(has_negatives, number.new_zeros(())).sum() * share,
        "temperature": temperature.expand_as(number).sum() * share,
    }
    if temperature.dim():
        temperatures = d.everyone(temperature).sort().values
        for percent in (5, 50, 95):
            signals[f"temperature_p{percent:02d}"] = temperatures[round(percent / 100 * (len(temperatures) - 1))]
    return signals
