"""Further inputs of a tile of scores: other models' embeddings of the same samples, and the anchors' limits."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """Another model's embeddings, whose scores t_ij = scale · u_i·v_j are computed tile by tile beside the scores. They get no
    gradient.

    Attributes:
        rows, columns: [N, E] and [M, E], of any width E.
        scale: the teacher's logit scale.
        row_log_sums, column_log_sums: [N] and [M], log Σ e^t over all candidates of each anchor, the logarithm of its
            softmax's denominator. `score_statistics` computes them.
    """

    rows: Tensor
    columns: Tensor
    scale: float = 1.0
    row_log_sums: Tensor | None = None
    column_log_sums: Tensor | None = None


@dataclass(frozen=True)
class Limits:
    """The highest score that a candidate of an anchor may have; reductions with `below` leave out higher ones.

    Attributes:
        rows, columns: [N] and [M], of each direction's anchors. They get no gradient.
        guide: compare its scores instead of the scores themselves.
    """

    rows: Tensor
    columns: Tensor | None = None
    guide: Teacher | None = None
