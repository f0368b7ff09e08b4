"""Symile: all fields of a sample scored at once, by their multilinear inner product."""

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmcontrast.objectives.pairing import UNGROUPED, Fields, Pairing, TermInputs
from mmcontrast.score import Direction

if TYPE_CHECKING:
    from mmcontrast.objectives.base import Objective

ROWS = 16384  # products of an anchor and a tuple that exist at a time in mode n_squared


class Multilinear(Pairing):
    """z = scale · Σ_d Π_f r_f[d] of M ≥ 3 fields (Symile, arXiv:2411.01053). Each field in turn is the anchor; its candidates
    are products of the others, its positive the sample's own. A sample that lacks a field takes no part.

    With unit embeddings the scores of independent fields are about 1/D, those of equal ones at most 1/√D: give the model a
    logit scale √D times that of a pair (`logit_scale`, `max_logit_scale`). Of several ranks each gathers all embeddings.

    Args:
        negatives: "n": one product for every sample, of the other fields' embeddings in random orders, drawn anew for every
            anchor field and step. A product at the place of a sample of the anchor's group is no negative of it, nor one that
            is wholly of its group. "n_squared": all combinations, N^(M−1) an anchor, in O(N·D) memory, and computed again in
            the backward; those wholly of the anchor's group are no negatives.
    """

    draws: ClassVar[bool] = True
    takes_extra_negatives: ClassVar[bool] = False

    def __init__(self, negatives: Literal["n", "n_squared"] = "n") -> None:
        super().__init__()
        if negatives not in ("n", "n_squared"):
            raise ValueError(f'negatives is {negatives!r}, it must be "n" or "n_squared"')
        self.negatives = negatives

    def terms(self, fields: Sequence[str]) -> Sequence[Fields]:
        if len(fields) < 3:
            raise ValueError(f"pairing multilinear: three fields at least, not {', '.join(fields)}; use all_pairs")
        return [tuple(fields)]

    def check(self, objective: "Objective") -> None:
        of_positives = [r for r in objective.reductions if r.over != "negatives"]
        if self.negatives == "n" and of_positives:
            raise ValueError(
                f"{type(objective).__name__} averages over all positives of an anchor; random products hold none but its own:"
                ' use pairing multilinear with negatives "n_squared", or a pairing of two fields'
            )

    def directions(self, s: TermInputs) -> Iterator[Direction]:
        if s.extras:
            raise ValueError(
                f"extra_negatives of {', '.join(s.extras)}: a product needs a partner in every other field, so pairing"
                " multilinear takes none"
            )
        here = next(iter(s.rows.values()))
        start = [0, *accumulate(s.sizes)][0 if s.group is None else dist.get_rank(s.group)]
        ids = torch.arange(start, start + len(here), device=here.device) if s.ids is None else s.ids
        draws = torch.Generator().manual_seed(s.draw)
        everyone, everyones = {field: s.everyone(rows) for field, rows in s.rows.items()}, s.everyone(ids)
        for anchor, rows in s.rows.items():
            others = [field for field in s.rows if field != anchor]
            name = f"{anchor}_to_{'+'.join(others)}"
            scale = s.scale(name)
            if self.negatives == "n":
                orders = [torch.randperm(sum(s.sizes), generator=draws)[start : start + len(rows)] for _ in others]
                direction = self._n(s, rows, [everyone[f] for f in others], ids, everyones, scale, orders)
            else:
                left = [everyone[field] for field in others[:-1]]
                direction = self._n_squared(s, rows, left, s.rows[others[-1]], ids, everyones, scale)
            dots = (rows * _product([s.rows[field] for field in others])).sum(1, dtype=direction.scale.dtype)
            yield s.named(direction, name, dots * direction.scale + s.bias)

    def _n(
        self,
        s: TermInputs,
        rows: Tensor,
        others: list[Tensor],
        ids: Tensor,
        everyones: Tensor,
        scale: Tensor,
        orders: list[Tensor],
    ) -> Direction:
        """The columns at the places of this rank's samples: of everybody's rows, in random orders."""
        orders = [order.to(rows.device) for order in orders]
        columns = _product([other[order] for other, order in zip(others, orders, strict=True)])
        parts = torch.stack([everyones[order] for order in orders])
        column_ids = torch.where((parts == parts[0]).all(0), parts[0], ids)
        return s.statistics(rows, columns, scale=scale, ids=ids, column_ids=column_ids, paired=False, columns=False)[0]

    def _n_squared(
        self, s: TermInputs, rows: Tensor, left: list[Tensor], columns: Tensor, ids: Tensor, everyones: Tensor, scale: Tensor
    ) -> Direction:
        """Every tuple of all other fields but the last, times the anchor, is a row against the last field's columns."""
        number, width = len(everyones), max(1, ROWS // max(1, *s.sizes))  # the same on all ranks

        def of_tuples(rows: Tensor, columns: Tensor, scale: Tensor, start: int, *left: Tensor) -> tuple[Tensor, ...]:
            tuples = torch.arange(start, min(start + width, number ** len(left)), device=rows.device)
            places = [tuples // number**k % number for k in range(len(left))]
            products = _product([other[place] for other, place in zip(left, places, strict=True)])
            own = torch.stack([everyones[place] for place in places]).eq(ids[:, None, None]).all(1)
            found, _ = s.statistics(
                (rows[:, None] * products).flatten(0, 1),
                columns,
                scale=scale.repeat_interleave(len(tuples)) if scale.dim() else scale,
                ids=torch.where(own, ids[:, None], UNGROUPED).flatten(),
                column_ids=ids,
                paired=False,
                columns=False,
                sizes=[(n * len(tuples), n) for n in s.sizes],
            )
            shape = (len(rows), len(tuples))
            merged = [reduce(r.merge, found[r].view(shape).unbind(1)) for r in s.reductions]
            return found.num_negatives.view(shape).sum(1), *merged

        inputs = rows, columns, scale
        total: Direction | None = None
        for first in range(0, number ** len(left), width):
            counts, *values = checkpoint(of_tuples, *inputs, first, *left, use_reentrant=False, preserve_rng_state=False)
            part = Direction(rows.new_zeros(()), counts, scale, dict(zip(s.reductions, values, strict=True)))
            total = part if total is None else total.with_more(part)
        assert total is not None, "somebody has a sample"
        return total


def _product(factors: list[Tensor]) -> Tensor:
    return reduce(torch.mul, factors)
