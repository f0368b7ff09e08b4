"""Which fields of a sample are contrasted with which."""

from collections.abc import Sequence
from itertools import combinations


class Pairing:
    """`pairs` names the (row field, column field) pairs of the fields at hand."""

    def pairs(self, fields: Sequence[str]) -> list[tuple[str, str]]:
        raise NotImplementedError


class AllPairs(Pairing):
    """Every field with every other: M·(M − 1)/2 pairs."""

    def pairs(self, fields: Sequence[str]) -> list[tuple[str, str]]:
        return list(combinations(fields, 2))


class Anchor(Pairing):
    """Every other field with one (ImageBind, arXiv:2305.05665).

    Args:
        field: the one.
    """

    def __init__(self, field: str) -> None:
        self.field = field

    def pairs(self, fields: Sequence[str]) -> list[tuple[str, str]]:
        if self.field not in fields:
            raise ValueError(f"pairing anchor: no field {self.field!r} among {', '.join(fields)}")
        return [(self.field, other) for other in fields if other != self.field]
