"""What a tower is: a network that turns one modality's prepared batch into one feature vector a sample."""

import re
from typing import Any

from torch import Tensor, nn

BLOCK = re.compile(r".*?(stages\.\d+\.(blocks|layers)\.\d+|layer\d+\.\d+|(stages|blocks|layers|layer|resblocks|h)\.\d+)\.")


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


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The repeated parts of a network by their names: transformer layers, residual blocks; the innermost that are numbered."""
    named = {name: module for name, module in network.named_modules() if BLOCK.fullmatch(f"{name}.")}
    return {name: block for name, block in named.items() if not any(other.startswith(f"{name}.") for other in named)}
