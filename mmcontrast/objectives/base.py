"""What an objective is: the reductions it needs, and a per-anchor loss of them."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from mmcontrast.score import Direction, Reduction


class Objective(nn.Module):
    """Maps one `Direction` to a loss per anchor. It knows no rank, tile, mask, dtype or device.

    Attributes:
        reductions: what `forward` reads from its direction.
        both_directions: average the two directions of a pair; otherwise each pair is counted once, by its rows.
    """

    reductions: tuple[Reduction, ...]
    both_directions: ClassVar[bool] = True

    def __init__(self) -> None:  # no options, unless a subclass takes some
        super().__init__()

    @abstractmethod
    def forward(self, d: Direction) -> Tensor:
        """[N], one value per anchor."""
