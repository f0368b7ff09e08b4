"""Backends by name. `auto` is "torch": tiled, exact, on any device; "dense" is the oracle, for small batches and tests."""

from mmcontrast.score.backends.base import Backend, Block, Gradients, SameGroup, Statistics
from mmcontrast.score.backends.dense import Dense
from mmcontrast.score.backends.torch_tiled import TorchTiled

BACKENDS: dict[str, Backend] = {"auto": TorchTiled(), "torch": TorchTiled(), "dense": Dense()}

__all__ = ["BACKENDS", "Backend", "Block", "Dense", "Gradients", "SameGroup", "Statistics", "TorchTiled"]
