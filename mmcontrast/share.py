"""The share that one of several processes has in work that is divided into numbered blocks."""

from collections.abc import Callable
from dataclasses import dataclass


def _no_others() -> None:
    """Wait for nobody."""


@dataclass(frozen=True)
class Share:
    """The part of one process among several that divide blocks of work.

    Attributes:
        rank, world_size: of this process, and how many there are.
        wait: returns once every process has called it.
    """

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = _no_others

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def has(self, number: int) -> bool:
        """Return whether a block is this process's."""
        return number % self.world_size == self.rank


WHOLE = Share()
