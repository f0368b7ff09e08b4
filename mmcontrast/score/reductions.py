"""The reductions of scores that objectives are made of, over an anchor's negatives, its positives, or all candidates."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Over = Literal["negatives", "positives", "all"]


@dataclass(frozen=True)
class Reduction:
    """One number per anchor, computed from its scores z with a set of candidates.

    Attributes:
        over: "negatives" (candidates of another group), "positives" (of its own group) or "all" of them.
        below: leave out candidates whose score exceeds the anchor's limit; see `Limits`.
    """

    over: Over = field(default="negatives", kw_only=True)
    below: bool = field(default=False, kw_only=True, repr=False)

    @property
    def identity(self) -> float:
        """Return the value without candidates."""
        return 0.0

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the value over the union of two disjoint sets of candidates."""
        return a + b


@dataclass(frozen=True)
class LogSumExp(Reduction):
    """The reduction log Σ exp(exponent · z); −inf without candidates. Exponent 0 gives the logarithm of their number."""

    exponent: float = 1.0

    @property
    def identity(self) -> float:
        return float("-inf")

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        if not (a.requires_grad or b.requires_grad):
            return torch.logaddexp(a, b)  # its gradient is NaN where both are −inf
        return torch.stack([a, b]).logsumexp(0)


@dataclass(frozen=True)
class SoftplusSum(Reduction):
    """The reduction Σ log(1 + exp(z))."""


@dataclass(frozen=True)
class Sum(Reduction):
    """The reduction Σ z."""


@dataclass(frozen=True)
class Maximum(Reduction):
    """The reduction max z, without gradient; −inf without candidates."""

    @property
    def identity(self) -> float:
        return float("-inf")

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)


@dataclass(frozen=True)
class CrossSum(Reduction):
    """The reduction Σ P z over all candidates, where P is the softmax of a teacher's scores of the same anchor (the mean of
    several teachers'): the cross-entropy between P and the softmax of z is LogSumExp(over="all") − CrossSum()."""

    over: Over = field(default="all", kw_only=True)


def log1pexp(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), exact for every x (`F.softplus` is linear above 20)."""
    return torch.logaddexp(x, x.new_zeros(()))
