"""Sends what the first rank has to all others: tensors one at a time, in the bytes that they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcontrast.errors import EveryRankError, UserError


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def sent(
    tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """Return the first rank's tensor, on all, in the memory of the host."""
    sent = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    if sent.numel():
        dist.broadcast(bytes_of(sent), group=group, group_src=0)
    return sent.cpu()


@dataclass
class _Expected:
    """A tensor that is on its way."""

    shape: torch.Size
    dtype: torch.dtype


def from_first(make: Callable[[], Any], group: dist.ProcessGroup | None, device: torch.device) -> Any:
    """Return what the first rank makes, on all ranks: mappings, lists and tuples of tensors and plain values. Tensors are sent
    one at a time, and lie in the memory of the host.

    Raises:
        EveryRankError: if making it is a UserError.
    """
    if group is None:
        return make()
    first = dist.get_rank(group) == 0
    tree: Any = None
    told: list[Any] = [None, None]
    tensors: list[Tensor] = []

    def expected(tensor: Tensor) -> _Expected:
        tensors.append(tensor)
        return _Expected(tensor.shape, tensor.dtype)

    if first:
        try:
            tree = make()
            told[1] = _mapped(expected, Tensor, tree)
        except UserError as error:
            told[0] = str(error)
    dist.broadcast_object_list(told, group=group, group_src=0, device=device)
    if told[0] is not None:
        raise EveryRankError(told[0])
    waiting = iter(tensors)
    received = _mapped(lambda of: sent(next(waiting, None), of.shape, of.dtype, group, device), _Expected, told[1])
    return tree if first else received


def _mapped(change: Callable[[Any], Any], kind: type, tree: Any) -> Any:
    """Return a tree with what `change` makes of each value of a kind, in an order that is the same everywhere."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(change, kind, value) for key, value in tree.items()}
    return type(tree)(_mapped(change, kind, value) for value in tree) if isinstance(tree, list | tuple) else tree
