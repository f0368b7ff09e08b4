"""Correct cosines for hubs (CSLS, inverted softmax, margin) by one number a query and one number a candidate.

Shapes: Q queries, C candidates, D dimensions; a tile of scores is [R, T]. s is a cosine, r the mean cosine with the k nearest
of the other side.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.evaluation.neighbours import nearest
from mmcontrast.score import LogSumExp, score_statistics

Kind = Literal["csls", "inverted_softmax", "margin"]
SMALLEST = 1e-3  # of a margin's denominator


@dataclass(frozen=True)
class ScoreCorrection:
    """A correction of tiles of cosines, fitted to all queries and candidates beforehand.

    Attributes:
        of_queries, of_candidates: [Q] and [C].
        kind:
            "csls": 2s − r_q − r_c (Conneau et al., arXiv:1710.04087).
            "inverted_softmax": β·s − log Σ_q exp(β·s(q, c)) (Smith et al., arXiv:1702.03859); `of_queries` is 0.
            "margin": the ratio 2s / (r_q + r_c) (Artetxe and Schwenk, arXiv:1811.01136). It has no meaning for a denominator
                that is not positive: below 0.001 it is taken to be 0.001, and such scores go by the cosine alone.
        beta: β.
    """

    of_queries: Tensor
    of_candidates: Tensor
    kind: Kind
    beta: float = 1.0

    @classmethod
    @torch.no_grad()
    def of(
        cls, kind: Kind, queries: Tensor, candidates: Tensor, *, k: int = 10, beta: float = 30.0, alike: bool = False
    ) -> "ScoreCorrection":
        """Fit the correction to unit rows [Q, D] and [C, D]. O((Q + C)·D) memory.

        Args:
            alike: both are the same rows, and none is a candidate for itself.
            k: neighbours of "csls" and "margin"; all of them where there are fewer.
            beta: β of "inverted_softmax".

        Raises:
            UserError: for an unknown kind or invalid options.
        """
        if kind not in get_args(Kind):
            raise UserError(f"scoring {kind!r} is unknown; {suggestion(kind, get_args(Kind))}")
        if k < 1 or not beta > 0:
            raise UserError(f"scoring {kind}: k = {k} and beta = {beta} must be more than 0")
        if kind == "inverted_softmax":
            sums, _ = score_statistics(candidates, queries, [LogSumExp()], scale=beta, columns=False, paired=alike)
            of_candidates = sums[LogSumExp()]
            return cls(of_candidates.new_zeros(len(queries)), of_candidates, kind, beta)
        return cls(_nearness(queries, candidates, k, alike), _nearness(candidates, queries, k, alike), kind)

    def __call__(self, cosines: Tensor, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """Return the scores [R, T] of these rows of queries and columns of candidates; the cosines are overwritten."""
        of_queries, of_candidates = self.of_queries[rows, None], self.of_candidates[columns]
        if self.kind == "csls":
            return cosines.mul_(2).sub_(of_queries).sub_(of_candidates)
        if self.kind == "inverted_softmax":
            return cosines.mul_(self.beta).sub_(of_candidates)
        return cosines.mul_(2).div_((of_queries + of_candidates).clamp_(min=SMALLEST))


def _nearness(rows: Tensor, others: Tensor, k: int, alike: bool) -> Tensor:
    """Return the mean cosine of each row with its k nearest of the others."""
    exclude = torch.arange(len(rows), device=rows.device) if alike else None
    return nearest(rows, others, min(k, len(others) - alike), exclude=exclude)[0].mean(1)
