"""Which fields of a sample are contrasted with which, and how much each pair counts."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

Pair = tuple[str, str]


class Pairing:
    """`pairs` names the (row field, column field) pairs of the fields at hand.

    Args:
        weights: of pairs that count more or less than the others' 1, by name: {"image-text": 2.0}, in either order. The loss
            is the weighted mean over the pairs that are not empty.
    """

    weights: Mapping[str, float] = {}

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.weights = dict(weights or {})
        for name, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"the weight of {name!r} is {weight}, it must be ≥ 0")

    def pairs(self, fields: Sequence[str]) -> list[Pair]:
        raise NotImplementedError

    def weighted_pairs(self, fields: Sequence[str]) -> dict[Pair, float]:
        """The pairs with their weights.

        Raises:
            ValueError: for a weight of a pair that is not there, or if none counts.
        """
        pairs = self.pairs(fields)
        named = {pair_name(*order): pair for pair in pairs for order in (pair, pair[::-1])}
        for name in self.weights:
            if name not in named:
                raise ValueError(f"pairing: weights name {name!r}; there is {', '.join(pair_name(*pair) for pair in pairs)}")
        given = {named[name]: weight for name, weight in self.weights.items()}
        weights = {pair: given.get(pair, 1.0) for pair in pairs}
        if not any(weights.values()):
            raise ValueError("pairing: all weights are 0")
        return weights


def pair_name(a: str, b: str) -> str:
    return f"{a}-{b}"


class AllPairs(Pairing):
    """Every field with every other: M·(M − 1)/2 pairs."""

    def pairs(self, fields: Sequence[str]) -> list[Pair]:
        return list(combinations(fields, 2))


class Anchor(Pairing):
    """Every other field with one (ImageBind, arXiv:2305.05665).

    Args:
        field: the one.
    """

    def __init__(self, field: str, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(weights)
        self.field = field

    def pairs(self, fields: Sequence[str]) -> list[Pair]:
        if self.field not in fields:
            raise ValueError(f"pairing anchor: no field {self.field!r} among {', '.join(fields)}")
        return [(self.field, other) for other in fields if other != self.field]
