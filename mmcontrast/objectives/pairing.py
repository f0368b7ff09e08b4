"""Which fields of a sample are scored together, in which directions, and how much each counts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, permutations
from typing import TYPE_CHECKING, ClassVar

import torch.distributed as dist
from torch import Tensor

from mmcontrast.score import Direction, Reduction
from mmcontrast.score.ranks import gather_rows

if TYPE_CHECKING:
    from mmcontrast.objectives.base import Objective

Fields = tuple[str, ...]
UNGROUPED = -3  # the id of rows and products of nobody's group


@dataclass(frozen=True)
class Scoring:
    """The samples that have all fields of a term of the loss, and how their scores are taken.

    Attributes:
        rows: per field, [n, D].
        ids, sample_ids: int64 [n]: groups, and the key of per-sample state; None: all different; none given.
        extras: per field, further candidates: ([K, D], group ids [K]).
        sizes: n of every rank. draw: a random number, the same on all ranks.
        scale: (a direction's name) → [] or [n], what multiplies its scores. bias: what is added.
        reductions: what to compute. both: of each direction of a pair, or of its rows alone.
        statistics: `score_statistics` with all that is the same throughout the term.
    """

    rows: dict[str, Tensor]
    ids: Tensor | None
    sample_ids: Tensor | None
    extras: Mapping[str, tuple[Tensor, Tensor]]
    sizes: list[int]
    draw: int
    group: dist.ProcessGroup | None
    scale: Callable[[str], Tensor]
    bias: Tensor | float
    reductions: tuple[Reduction, ...]
    both: bool
    statistics: Callable[..., tuple[Direction, Direction | None]]

    @property
    def everyone(self) -> Callable[[Tensor], Tensor]:
        """[n, …] → those of all ranks, in their order; differentiable."""
        return partial(gather_rows, group=self.group, sizes=self.sizes)

    def named(self, direction: Direction, name: str, positives: Tensor) -> Direction:
        return replace(direction, name=name, positives=positives, sample_ids=self.sample_ids, everyone=self.everyone)


class Pairing:
    """`terms` names the tuples of fields that are scored together, of the fields at hand; each is a term of the loss.

    Args:
        weights: of terms that count more or less than the others' 1, by name: {"image-text": 2.0}, in any order. The loss
            is the weighted mean over the terms that are not empty.
    """

    weights: Mapping[str, float] = {}
    draws: ClassVar[bool] = False  # candidates are drawn at random
    takes_extra_negatives: ClassVar[bool] = True

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.weights = dict(weights or {})
        for name, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"the weight of {name!r} is {weight}, it must be ≥ 0")

    def terms(self, fields: Sequence[str]) -> Sequence[Fields]:
        raise NotImplementedError

    def check(self, objective: "Objective") -> None:
        """
        Raises:
            ValueError: if the objective makes no sense under this pairing; it says why.
        """

    def weighted_terms(self, fields: Sequence[str]) -> dict[Fields, float]:
        """The terms with their weights.

        Raises:
            ValueError: for a weight of a term that is not there, or if none counts.
        """
        terms = self.terms(fields)
        named = {term_name(order): term for term in terms for order in permutations(term)}
        for name in self.weights:
            if name not in named:
                raise ValueError(f"pairing: weights name {name!r}; there is {', '.join(map(term_name, terms))}")
        given = {named[name]: weight for name, weight in self.weights.items()}
        weights = {term: given.get(term, 1.0) for term in terms}
        if not any(weights.values()):
            raise ValueError("pairing: all weights are 0")
        return weights

    def directions(self, s: Scoring) -> Iterator[Direction]:
        """Every direction of a term: here the two of a pair, or, unless `both`, its rows."""
        (a, x), (b, y) = s.rows.items()
        names = f"{a}_to_{b}", f"{b}_to_{a}"
        scales = [s.scale(name) for name in (names if s.both else names[:1])]
        per_anchor = any(scale.dim() for scale in scales)
        there, back = s.statistics(
            x,
            y,
            scale=scales[0],
            column_scale=scales[1] if per_anchor and s.both else None,
            ids=s.ids,
            columns=s.both,
        )
        for direction, name, own, other in zip((there, back), names, (x, y), (b, a), strict=True):
            if direction is not None:
                if other in s.extras:
                    more, more_ids = s.extras[other]
                    ids = more_ids.new_full((len(own),), UNGROUPED) if s.ids is None else s.ids
                    further = partial(s.statistics, paired=False, columns=False, scale=direction.scale)
                    direction = direction.with_more(further(own, more, ids=ids, column_ids=more_ids)[0])
                yield s.named(direction, name, direction.positives)


def term_name(fields: Sequence[str]) -> str:
    return "-".join(fields)


class AllPairs(Pairing):
    """Every field with every other: M·(M − 1)/2 pairs."""

    def terms(self, fields: Sequence[str]) -> Sequence[Fields]:
        return list(combinations(fields, 2))


class Anchor(Pairing):
    """Every other field with one (ImageBind, arXiv:2305.05665).

    Args:
        field: the one.
    """

    def __init__(self, field: str, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(weights)
        self.field = field

    def terms(self, fields: Sequence[str]) -> Sequence[Fields]:
        if self.field not in fields:
            raise ValueError(f"pairing anchor: no field {self.field!r} among {', '.join(fields)}")
        return [(self.field, other) for other in fields if other != self.field]
