"""Pairings: which fields of a sample are scored together, in which directions, with which weights."""

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
from mmcontrast.score.ranks import Everyone

if TYPE_CHECKING:
    from mmcontrast.objectives.base import Objective

Fields = tuple[str, ...]
UNGROUPED = -3  # the id of rows and products that belong to no group


@dataclass(frozen=True)
class TermInputs:
    """The samples that have all fields of a term of the loss, and how they are scored.

    Attributes:
        rows: per field, [n, D].
        ids, sample_ids: int64 [n]: group ids, None: all different; keys of per-sample state, None: not given.
        given: sample values [n] by name.
        extras: per field, further candidates: ([K, D], group ids [K]).
        own: per field, candidates of each anchor alone: ([n, K, D], present [n, K]).
        teachers: of each teacher, ([n, E] per field, its scale).
        sizes: n of every rank. extra_sizes: per field, K of every rank. draw: a random number, the same on all ranks.
        everyone: the ranks, with sizes; calling it gathers tensors [n, …] of all in order, differentiably.
        scale: (a direction's name) → its scale, [] or [n]. bias: added to all scores.
        reductions: those to compute. both: in both directions of a pair; False: for its rows alone.
        link: of the score. margin, guided: of the objective.
        statistics: `score_statistics` with the arguments that are the same for the whole term.
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
    everyone: Everyone
    scale: Callable[[str], Tensor]
    bias: Tensor | float
    reductions: tuple[Reduction, ...]
    both: bool
    link: Link | None
    margin: float | None
    guided: bool
    statistics: Callable[..., tuple[Direction, Direction | None]]

    @property
    def global_ids(self) -> Tensor:
        """Return group ids, int64 [n]; without any, a different number for each sample of all ranks."""
        if self.ids is not None:
            return self.ids
        rows = next(iter(self.rows.values()))
        first = sum(self.sizes[: 0 if self.group is None else dist.get_rank(self.group)])
        return torch.arange(first, first + len(rows), device=rows.device)

    def teachers_of(self, rows: str, columns: str) -> list[Teacher]:
        """Return the teachers of one field's rows against another's columns."""
        return [Teacher(embeddings[rows], embeddings[columns], scale) for embeddings, scale in self.teachers]

    def limits_of(self, rows: str, columns: str, limits: Tensor | None, back: Tensor | None = None) -> Limits | None:
        """Return the limits of one field's rows against another's columns."""
        if limits is None:
            return None
        guide = self.teachers[0][0] if self.guided else None
        return Limits(limits, back, None if guide is None else Teacher(guide[rows], guide[columns]))

    @torch.no_grad()
    def limit(self, scale: Tensor) -> Tensor | None:
        """Return the score [n], or the guide's cosine, above which a candidate is no negative; None: all are negatives."""
        if self.margin is None:
            return None
        embeddings = self.teachers[0][0] if self.guided else self.rows
        x, y = (embeddings[field] for field in self.rows)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.guided:
            return row_dots(x, y, dtype) + self.margin
        if self.link is not None:
            x, y = self.link.rows(x, columns=False), self.link.rows(y, columns=True)
        dots = row_dots(x, y, dtype)
        return ((dots if self.link is None else self.link.value(dots)) + self.margin) * scale + self.bias

    def complete(self, direction: Direction, name: str, positives: Tensor) -> Direction:
        """Return a direction with its name, its positives' scores and the samples' ids and values."""
        direction = replace(direction, name=name, positives=positives, everyone=self.everyone)
        return replace(direction, sample_ids=self.sample_ids, given=self.given)


class Pairing:
    """The base of pairings, whose `terms` are the tuples of fields that are scored together; each is a term of the loss.

    Args:
        weights: of terms, by name: {"image-text": 2.0}, the fields in any order; default: 1. The loss is the weighted mean over
            the terms that are not empty.
        same_field: the other samples of a term's fields are candidates too (queries against queries); true: in every term, or
            the names of some, ["view1-view2"].
        joint: which of those share a denominator with an anchor's candidates of the other field. false: none, each field
            is a separate direction with the same positive. "anchor": those of the anchor's field (SimCLR's NT-Xent,
            arXiv:2002.05709). true: also those of its positive's field, compared with the positive (GISTEmbed,
            Qwen3-Embedding). "pair": also the positive's candidates of the anchor's field (GTE, arXiv:2308.03281).
    """

    weights: Mapping[str, float] = {}
    same_field: bool | Sequence[str] = False
    joint: bool | Literal["anchor", "pair"] = False
    draws: ClassVar[bool] = False  # candidates are drawn at random
    takes_extra_negatives: ClassVar[bool] = True  # and teachers, limits and links, which concern scores of two fields

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
        """Return the tuples of fields that are scored together."""
        raise NotImplementedError

    def check(self, objective: "Objective") -> None:
        """Check that the objective can be used with this pairing.

        Raises:
            ValueError: if it cannot; it says why.
        """

    def weighted_terms(self, fields: Sequence[str]) -> dict[Fields, float]:
        """Return the terms with their weights.

        Raises:
            ValueError: for a weight of an unknown term, or if all weights are 0.
        """
        terms = self.terms(fields)
        by_name = {term_name(order): term for term in terms for order in permutations(term)}
        for name in (*self.weights, *([] if isinstance(self.same_field, bool) else self.same_field)):
            if name not in by_name:
                raise ValueError(f"pairing: no term is named {name!r}; there is {', '.join(map(term_name, terms))}")
        named_weights = {by_name[name]: weight for name, weight in self.weights.items()}
        weights = {term: named_weights.get(term, 1.0) for term in terms}
        if not any(weights.values()):
            raise ValueError("pairing: all weights are 0")
        return weights

    def has_same_field(self, term: Fields) -> bool:
        """Return whether `same_field` holds for a term."""
        if isinstance(self.same_field, bool):
            return self.same_field
        return any(term_name(order) in self.same_field for order in permutations(term))

    def directions(self, s: TermInputs) -> Iterator[Direction]:
        """Yield the directions of a term: here the two of a pair (without `both` the first), each followed by its same-field
        one."""
        (a, x), (b, y) = s.rows.items()
        names, same_field = (f"{a}_to_{b}", f"{b}_to_{a}"), self.has_same_field((a, b))
        columns = s.both or (same_field and self.joint == "pair")
        scales = [s.scale(name) for name in (names if columns else names[:1])]
        limits = [s.limit(scale) for scale in scales]
        per_anchor = any(scale.dim() for scale in scales)
        forward, backward = s.statistics(
            x,
            y,
            scale=scales[0],
            column_scale=scales[1] if per_anchor and columns else None,
            ids=s.ids,
            columns=columns,
            limits=s.limits_of(a, b, *limits),
            teachers=s.teachers_of(a, b),
        )
        within_field: dict[tuple[str, int], Direction] = {}

        def score_within(field: str, number: int) -> Direction:
            """Return a field's samples against each other, with the scale and limits of a direction."""
            key = field, number if per_anchor else 0
            if key not in within_field:
                rows, ids = s.rows[field], s.global_ids
                within_field[key], _ = s.statistics(
                    rows, rows, scale=scales[number], ids=ids, column_ids=ids,
                    limits=s.limits_of(field, field, limits[number]), paired=False, columns=False,
                )  # fmt: skip
            return within_field[key]

        directions = [(forward, a, b), (backward, b, a)]
        for number, (direction, field, other) in enumerate(directions[: 1 + s.both]):
            assert direction is not None
            further = self._score_further(s, direction, field, other, limits[number])
            if same_field and self.joint:
                further.append(score_within(field, number))
                if self.joint != "anchor":
                    further.append(score_within(other, number))
            if same_field and self.joint == "pair":
                opposite = directions[1 - number][0]
                assert opposite is not None
                further.append(opposite)
            yield s.complete(reduce(Direction.with_more, further, direction), names[number], direction.positives)
            if same_field and not self.joint:
                yield s.complete(score_within(field, number), f"{field}_to_{field}", direction.positives)

    def _score_further(
        self, s: TermInputs, direction: Direction, field: str, other: str, limits: Tensor | None
    ) -> list[Direction]:
        """Return a direction's anchors against extra candidates, and against their own."""
        further, rows = [], s.rows[field]
        if other in s.extras:
            extra_rows, extra_ids = s.extras[other]
            ids = extra_ids.new_full((len(rows),), UNGROUPED) if s.ids is None else s.ids
            extra, _ = s.statistics(
                rows, extra_rows, scale=direction.scale, ids=ids, column_ids=extra_ids,
                limits=None if limits is None else Limits(limits), paired=False, columns=False,
                sizes=list(zip(s.sizes, s.extra_sizes[other], strict=True)),
            )  # fmt: skip
            further.append(extra)
        if other in s.own:
            candidates, present = s.own[other]
            score = partial(own_statistics, scale=direction.scale, bias=s.bias, link=s.link, limits=limits)
            further.append(score(rows, candidates, present, s.reductions))
        return further


def term_name(fields: Sequence[str]) -> str:
    """Return the name of a term, "image-text"."""
    return "-".join(fields)


class AllPairs(Pairing):
    """The pairing of every field with every other: M·(M − 1)/2 pairs."""

    def terms(self, fields: Sequence[str]) -> Sequence[Fields]:
        return list(combinations(fields, 2))


class Anchor(Pairing):
    """The pairing of one field with every other (ImageBind, arXiv:2305.05665).

    Args:
        field: the one field.
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
