"""What to watch while a contrastive model learns: a few numbers a direction, from two more reductions of the same scores."""

from torch import Tensor

from mmcontrast.score import Direction, LogSumExp, Maximum

FIRST, SECOND, HARDEST = LogSumExp(), LogSumExp(exponent=2.0), Maximum()
WATCHED = (FIRST, SECOND, HARDEST)  # over the negatives


def signals_of(d: Direction) -> dict[str, Tensor]:
    """Per anchor [N], without gradient; 0 for one without negatives.

    accuracy: 1 where the positive's score is above every negative's.
    effective_negatives: (Σ w)² / Σ w² of the negatives' weights w = e^z: how many of them carry the loss; 1 to their number.
    temperature: 1 / scale.
    """
    some = d.num_negatives > 0
    number = (2.0 * d[FIRST] - d[SECOND]).detach().exp()
    return {
        "accuracy": ((d.positives > d[HARDEST]) & some).to(number.dtype),
        "effective_negatives": number.where(some, number.new_zeros(())),
        "temperature": (1.0 / d.scale).detach().expand_as(number),
    }
