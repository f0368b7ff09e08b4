"""Which fields of a sample are scored together, in which directions, and how much each counts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import combinations, permutations
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mmcontrast.score import Direction, Limits, Link, Reduction, Teacher, own_statistics, row_dots
from mmcontrast.score.ranks import gather_rows

if TYPE_CHECKING:
    from mmcontrast.objectives.base import Objective

Fields = tuple[str, ...]
UNGROUPED = -3  # the id of rows and products of nobody's group


@dataclass(frozen=True)
class TermInputs:
    """The samples that have all fields of a term of the loss, and how their scores are taken.

    Attributes:
        rows: per field, [n, D].
        ids, sample_ids: int64 [n]: groups, and the key of per-sample state; None: all different; none given.
        given: [n] of each value of samples.
        extras: per field, further candidates: ([K, D], group ids [K]).
        own: per field, candidates of each anchor alone: ([n, K, D], which are there [n, K]).
        teachers: (per field, [n, E]; its scale) of each.
        sizes: n of every rank. extra_sizes: per field, K of every rank. draw: a random number, the same on all ranks.
        scale: (a direction's name) → [] or [n], what multiplies its scores. bias: what is added.
        reductions: what to compute. both: of each direction of a pair, or of its rows alone.
        link, margin, guided: of scores; of the objective.
        statistics: `score_statistics` with all that is the same throughout the term.
    """

    rows: dict[str, Tensor]
    ids: Tensor | None
    sample_ids: Tensor | None
    given: Mapping[str, Tensor]
    extras: Mapping[str, tuple[Tensor, Tensor]]
    own: Mapping[str, tuple[Tensor, Tensor]]
    teachers: Sequence[tuple[Mapping[str, Tensor], float]]
    sizes: list[int]
    extra_sizes: Mapping[str, list[int]]
    draw: int
    group: dist.ProcessGroup | None
    scale: Callable[[str], Tensor]
    bias: Tensor | float
    reductions: tuple[Reduction, ...]
    both: bool
    link: Link | None
    margin: float | None
    guided: bool
    statistics: Callable[..., tuple[Direction, Direction | None]]

    @property
    def everyone(self) -> Callable[[Tensor], Tensor]:
        """[n, …] → those of all ranks, in their order; differentiable."""
        return partial(gather_rows, group=self.group, sizes=self.sizes)

    @property
    def global_ids(self) -> Tensor:
        """int64 [n]: group ids; where there are none, a number of its own for each sample of all ranks."""
        if self.ids is not None:
            return self.ids
        rows = next(iter(self.rows.values()))
        first = sum(self.sizes[: 0 if self.group is None else dist.get_rank(self.group)])
        return torch.arange(first, first + len(rows), device=rows.device)

    def teachers_of(self, rows: str, columns: str) -> list[Teacher]:
        return [Teacher(given[rows], given[columns], scale) for given, scale in self.teachers]

    def limits_of(self, rows: str, columns: str, limits: Tensor | None, back: Tensor | None = None) -> Limits | None:
        """The limits of a pass of some field's rows against another's columns."""
        if limits is None:
            return None
        given = self.teachers[0][0] if self.guided else None
        return Limits(limits, back, None if given is None else Teacher(given[rows], given[columns]))

    @torch.no_grad()
    def highest(self, scale: Tensor) -> Tensor | None:
        """[n]: the score, or the guide's cosine, above which a candidate is no negative; None: all are."""
        if self.margin is None:
            return None
        compared = self.teachers[0][0] if self.guided else self.rows
        x, y = (compared[field] for field in self.rows)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.guided:
            return row_dots(x, y, dtype) + self.margin
        if self.link is not None:
            x, y = self.link.rows(x, columns=False), self.link.rows(y, columns=True)
        dots = row_dots(x, y, dtype)
        return ((dots if self.link is None else self.link.value(dots)) + self.margin) * scale + self.bias

    def named(self, direction: Direction, name: str, positives: Tensor) -> Direction:
        direction = replace(direction, name=name, positives=positives, everyone=self.everyone)
        return replace(direction, sample_ids=self.sample_ids, given=self.given)


class Pairing:
    """`terms` names the tuples of fields that are scored together, of the fields at hand; each is a term of the loss.

    Args:
        weights: of terms that count more or less than the others' 1, by name: {"image-text": 2.0}, in any order. The loss
            is the weighted mean over the terms that are not empty.
        same_field: the other samples of a term's fields are candidates too (queries against queries); true: of every term, or
            the names of some, ["view1-view2"].
        joint: which of those share a denominator with an anchor's candidates of the other field. false: none, each field
            is a direction of its own, with the same positive. "anchor": those of the anchor's field (SimCLR's NT-Xent,
            arXiv:2002.05709). true: also those of its positive's field, compared with the positive (GISTEmbed,
            Qwen3-Embedding). "pair": also the positive's candidates of the anchor's field (GTE, arXiv:2308.03281).
    """

    weights: Mapping[str, float] = {}
    same_field: bool | Sequence[str] = False
    joint: bool | Literal["anchor", "pair"] = False
    draws: ClassVar[bool] = False  # candidates are drawn at random
    takes_extra_negatives: ClassVar[bool] = True  # and teachers, limits, links: all that scores two fields at a time

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        same_field: bool | Sequence[str] = False,
        joint: bool | Literal["anchor", "pair"] = False,
    ) -> None:
        if joint not in (False, True, "anchor", "pair"):
            raise ValueError(f'joint is {joint!r}, it must be false, true, "anchor" or "pair"')
        if joint and not same_field:
            raise ValueError("joint needs same_field: what is it that shares the denominator?")
        self.same_field, self.joint = same_field if isinstance(same_field, bool) else list(same_field), joint
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
        for name in (*self.weights, *([] if isinstance(self.same_field, bool) else self.same_field)):
            if name not in named:
                raise ValueError(f"pairing: no term is named {name!r}; there is {', '.join(map(term_name, terms))}")
        given = {named[name]: weight for name, weight in self.weights.items()}
        weights = {term: given.get(term, 1.0) for term in terms}
        if not any(weights.values()):
            raise ValueError("pairing: all weights are 0")
        return weights

    def has_same_field(self, term: Fields) -> bool:
        if isinstance(self.same_field, bool):
            return self.same_field
        return any(term_name(order) in self.same_field for order in permutations(term))

    def directions(self, s: TermInputs) -> Iterator[Direction]:
        """Every direction of a term: here the two of a pair, or, unless `both`, its rows; then those of its own fields."""
        (a, x), (b, y) = s.rows.items()
        names, same_field = (f"{a}_to_{b}", f"{b}_to_{a}"), self.has_same_field((a, b))
        columns = s.both or (same_field and self.joint == "pair")
        scales = [s.scale(name) for name in (names if columns else names[:1])]
        limits = [s.highest(scale) for scale in scales]
        per_anchor = any(scale.dim() for scale in scales)
        there, back = s.statistics(
            x,
            y,
            scale=scales[0],
            column_scale=scales[1] if per_anchor and columns else None,
            ids=s.ids,
            columns=columns,
            limits=s.limits_of(a, b, *limits),
            teachers=s.teachers_of(a, b),
        )
        within: dict[tuple[str, int], Direction] = {}

        def among(field: str, number: int) -> Direction:
            """The field's own samples, scored and limited as a direction is."""
            key = field, number if per_anchor else 0
            if key not in within:
                rows, ids = s.rows[field], s.global_ids
                given = {"ids": ids, "column_ids": ids, "limits": s.limits_of(field, field, limits[number])}
                within[key] = s.statistics(rows, rows, scale=scales[number], paired=False, columns=False, **given)[0]
            return within[key]

        directions = [(there, a, b), (back, b, a)]
        for number, (direction, field, other) in enumerate(directions[: 1 + s.both]):
            assert direction is not None
            further = self._further(s, direction, field, other, limits[number])
            if same_field and self.joint:
                fields = (field,) if self.joint == "anchor" else (field, other)
                further += [among(one, number) for one in fields]
            if same_field and self.joint == "pair":
                opposite = directions[1 - number][0]
                assert opposite is not None
                further.append(opposite)
            yield s.named(reduce(Direction.with_more, further, direction), names[number], direction.positives)
            if same_field and not self.joint:
                yield s.named(among(field, number), f"{field}_to_{field}", direction.positives)

    def _further(self, s: TermInputs, direction: Direction, field: str, other: str, limits: Tensor | None) -> list[Direction]:
        """A direction's anchors against extra candidates, and against their own."""
        further, rows = [], s.rows[field]
        if other in s.extras:
            more, more_ids = s.extras[other]
            ids = more_ids.new_full((len(rows),), UNGROUPED) if s.ids is None else s.ids
            given = {"ids": ids, "column_ids": more_ids, "limits": None if limits is None else Limits(limits)}
            among = partial(s.statistics, sizes=list(zip(s.sizes, s.extra_sizes[other], strict=True)), **given)
            further.append(among(rows, more, scale=direction.scale, paired=False, columns=False)[0])
        if other in s.own:
            candidates, there = s.own[other]
            own = partial(own_statistics, scale=direction.scale, bias=s.bias, link=s.link, limits=limits)
            further.append(own(rows, candidates, there, s.reductions))
        return further


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

    def __init__(
        self,
        field: str,
        weights: Mapping[str, float] | None = None,
        same_field: bool | Sequence[str] = False,
        joint: bool | Literal["anchor", "pair"] = False,
    ) -> None:
        super().__init__(weights, same_field, joint)
        self.field = field

    def terms(self, fields: Sequence[str]) -> Sequence[Fields]:
        if self.field not in fields:
            raise ValueError(f"pairing anchor: no field {self.field!r} among {', '.join(fields)}")
        return [(self.field, other) for other in fields if other != self.field]
