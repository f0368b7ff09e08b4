"""A tower for fields that already are vectors: one linear layer."""

from torch import nn

from mmcontrast.models.base import Tower


class LinearTower(Tower):
    """A linear layer, [N, inputs] → [N, width].

    Args:
        inputs: the number of components of a vector.
        width: the number of features.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        if inputs < 1 or width < 1:
            raise ValueError(f"inputs={inputs}, width={width}: they must be 1 or more")
        self.network, self.width = nn.Linear(inputs, width), width
