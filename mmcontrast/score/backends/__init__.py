"""The backends by name, and the rule by which "auto" chooses one."""

from collections.abc import Sequence

from torch import Tensor

from mmcontrast.score.backends.base import Backend, Block, Gradients, SameGroup, Statistics
from mmcontrast.score.backends.dense import Dense
from mmcontrast.score.backends.torch_tiled import TorchTiled
from mmcontrast.score.backends.triton_tiled import TritonTiled
from mmcontrast.score.links import Link
from mmcontrast.score.reductions import Reduction

BACKENDS: dict[str, Backend] = {"triton": TritonTiled(), "torch": TorchTiled(), "dense": Dense()}


def choose(name: str, x: Tensor, reductions: Sequence[Reduction], link: Link | None = None) -> Backend:
    """Return the backend of a name; "auto" is "triton" on a GPU if it supports the inputs, else "torch".

    Raises:
        ValueError: for an unknown name, or inputs that the backend does not support; it names one that does.
    """
    if name == "auto":
        fused = x.is_cuda and not BACKENDS["triton"].lacks(x, reductions, link)
        return BACKENDS["triton" if fused else "torch"]
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: there is auto, {', '.join(BACKENDS)}")
    missing = BACKENDS[name].lacks(x, reductions, link)
    if missing:
        able = [other for other, backend in BACKENDS.items() if not backend.lacks(x, reductions, link)]
        raise ValueError(f"backend {name!r} has no {missing}: {' and '.join(map(repr, able)) or 'no backend'} has")
    return BACKENDS[name]


__all__ = ["BACKENDS", "Backend", "Block", "Dense", "Gradients", "SameGroup", "Statistics", "TorchTiled", "choose"]
