"""What a tower is: a network that turns one modality's prepared batch into one feature vector a sample."""

from typing import Any

from torch import Tensor, nn


class Tower(nn.Module):
    """Adapters set `width` and map a batch of N inputs to features [N, width]; a projection head follows in the model.

    Attributes:
        width: the number of features.
        network: the wrapped network, as its library made it.
    """

    width: int
    network: Any

    def forward(self, batch: Tensor) -> Tensor:
        return self.network(batch)
