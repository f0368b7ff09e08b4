"""Symile: a pairing that scores all fields of a sample at once, by their multilinear inner product."""

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

ROWS = 16384  # products of an anchor and a tuple that are in memory at a time in mode n_squared


class Multilinear(Pairing):
    """The pairing of M ≥ 3 fields with scores z = scale · Σ_d Π_f r_f[d] (Symile, arXiv:2411.01053). Each field in turn is the
    anchor; its candidates are products of the others, its positive that of its own sample. A sample that lacks a field takes no
    part.

    With unit embeddings the scores of independent fields are about 1/D, those of equal ones at most 1/√D: give the model a
    logit scale √D times that of a pair (`logit_scale`, `max_logit_scale`). Every rank gathers all embeddings.

    Args:
        negatives: "n": one product for every sample, of the other fields' embeddings in random orders, drawn again for every
            anchor field and step. A product at the position of a sample of the anchor's group is not its negative, nor is one
            whose factors are all of its group. "n_squared": all combinations, N^(M−1) an anchor, in O(N·D) memory, and
            recomputed in the backward; those whose factors are all of the anchor's group are no negatives.
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
        over_positives = any(reduction.over != "negatives" for reduction in objective.reductions)
        if self.negatives == "n" and over_positives:
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
        first = next(iter(s.rows.values()))
        start = [0, *accumulate(s.sizes)][0 if s.group is None else dist.get_rank(s.group)]
        ids = torch.arange(start, start + len(first), device=first.device) if s.ids is None else s.ids
        generator = torch.Generator().manual_seed(s.draw)
        all_rows = {field: s.everyone(rows) for field, rows in s.rows.items()}
        all_ids = s.everyone(ids)
        for anchor, rows in s.rows.items():
            others = [field for field in s.rows if field != anchor]
            name = f"{anchor}_to_{'+'.join(others)}"
            scale = s.scale(name)
            if self.negatives == "n":
                orders = [torch.randperm(sum(s.sizes), generator=generator)[start : start + len(rows)] for _ in others]
                direction = self._score_n(s, rows, [all_rows[field] for field in others], ids, all_ids, scale, orders)
            else:
                leading = [all_rows[field] for field in others[:-1]]
                direction = self._score_n_squared(s, rows, leading, s.rows[others[-1]], ids, all_ids, scale)
            dots = (rows * _product([s.rows[field] for field in others])).sum(1, dtype=direction.scale.dtype)
            yield s.complete(direction, name, dots * direction.scale + s.bias)

    def _score_n(
        self,
        s: TermInputs,
        rows: Tensor,
        others: list[Tensor],
        ids: Tensor,
        all_ids: Tensor,
        scale: Tensor,
        orders: list[Tensor],
    ) -> Direction:
        """Score against random products, one at the position of each sample, made of all ranks' rows in random orders."""
        orders = [order.to(rows.device) for order in orders]
        columns = _product([other[order] for other, order in zip(others, orders, strict=True)])
        factor_ids = torch.stack([all_ids[order] for order in orders])
        column_ids = torch.where((factor_ids == factor_ids[0]).all(0), factor_ids[0], ids)
        return s.statistics(rows, columns, scale=scale, ids=ids, column_ids=column_ids, paired=False, columns=False)[0]

    def _score_n_squared(
        self, s: TermInputs, rows: Tensor, leading: list[Tensor], columns: Tensor, ids: Tensor, all_ids: Tensor, scale: Tensor
    ) -> Direction:
        """Score against all products: the anchor times each tuple of the other fields but the last is a row against the last
        field's columns."""
        number, width = len(all_ids), max(1, ROWS // max(1, *s.sizes))  # the same on all ranks

        def score_tuples(rows: Tensor, columns: Tensor, scale: Tensor, start: int, *leading: Tensor) -> tuple[Tensor, ...]:
            tuples = torch.arange(start, min(start + width, number ** len(leading)), device=rows.device)
            positions = [tuples // number**k % number for k in range(len(leading))]
            products = _product([other[position] for other, position in zip(leading, positions, strict=True)])
            same_group = torch.stack([all_ids[position] for position in positions]).eq(ids[:, None, None]).all(1)
            direction, _ = s.statistics(
                (rows[:, None] * products).flatten(0, 1),
                columns,
                scale=scale.repeat_interleave(len(tuples)) if scale.dim() else scale,
                ids=torch.where(same_group, ids[:, None], UNGROUPED).flatten(),
                column_ids=ids,
                paired=False,
                columns=False,
                sizes=[(size * len(tuples), size) for size in s.sizes],
            )
            shape = (len(rows), len(tuples))
            merged = [reduce(reduction.merge, direction[reduction].view(shape).unbind(1)) for reduction in s.reductions]
            return direction.num_negatives.view(shape).sum(1), *merged

        inputs = rows, columns, scale
        total: Direction | None = None
        for first in range(0, number ** len(leading), width):
            counts, *values = checkpoint(score_tuples, *inputs, first, *leading, use_reentrant=False, preserve_rng_state=False)
            part = Direction(rows.new_zeros(()), counts, scale, dict(zip(s.reductions, values, strict=True)))
            total = part if total is None else total.with_more(part)
        assert total is not None, "some rank has a sample"
        return total


def _product(factors: list[Tensor]) -> Tensor:
    """Return the elementwise product of tensors."""
    return reduce(torch.mul, factors)
