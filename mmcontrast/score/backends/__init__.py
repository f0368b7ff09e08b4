"""Backends by name, and the rule by which "auto" takes one."""

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
    """The backend of that name; "auto" is "triton" on a GPU if that has what is asked for, else "torch".

    Raises:
        ValueError: for an unknown name, or what the named backend lacks; it names one that has it.
    """
    if name == "auto":
        fused = x.is_cuda and not BACKENDS["triton"].lacks(x, reductions, link)
        return BACKENDS["triton" if fused else "torch"]
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: there is auto, {', '.join(BACKENDS)}")
    lacking = BACKENDS[name].lacks(x, reductions, link)
    if lacking:
        able = [other for other, backend in BACKENDS.items() if not backend.lacks(x, reductions, link)]
        raise ValueError(f"backend {name!r} has no {lacking}: {' and '.join(map(repr, able)) or 'no backend'} has")
    return BACKENDS[name]


__all__ = ["BACKENDS", "Backend", "Block", "Dense", "Gradients", "SameGroup", "Statistics", "TorchTiled", "choose"]
