"""The tower of a field that already is a vector: one linear layer."""

from torch import nn

from mmcontrast.models.base import Tower


class LinearTower(Tower):
    """[N, inputs] → [N, width].

    Args:
        inputs: components of the vectors.
        width: features.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        if inputs < 1 or width < 1:
            raise ValueError(f"inputs={inputs}, width={width}: they must be 1 or more")
        self.network, self.width = nn.Linear(inputs, width), width
