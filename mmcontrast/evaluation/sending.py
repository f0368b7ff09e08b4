"""Broadcast nested objects from the first rank to all others: tensors one at a time, as raw bytes."""

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
    """Return the first rank's tensor on all ranks, in host memory."""
    buffer = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    if buffer.numel():
        dist.broadcast(bytes_of(buffer), group=group, group_src=0)
    return buffer.cpu()


@dataclass
class _TensorHeader:
    """The shape and dtype of a tensor that follows."""

    shape: torch.Size
    dtype: torch.dtype


def from_first(make: Callable[[], Any], group: dist.ProcessGroup | None, device: torch.device) -> Any:
    """Return on all ranks what `make` returns on the first: mappings, lists and tuples of tensors and plain values. Tensors are
    sent one at a time, and are received in host memory.

    Raises:
        EveryRankError: if making it is a UserError.
    """
    if group is None:
        return make()
    first = dist.get_rank(group) == 0
    tree: Any = None
    message: list[Any] = [None, None]  # (error, tree of headers)
    tensors: list[Tensor] = []

    def header_of(tensor: Tensor) -> _TensorHeader:
        tensors.append(tensor)
        return _TensorHeader(tensor.shape, tensor.dtype)

    if first:
        try:
            tree = make()
            message[1] = _map_tree(header_of, Tensor, tree)
        except UserError as error:
            message[0] = str(error)
    dist.broadcast_object_list(message, group=group, group_src=0, device=device)
    if message[0] is not None:
        raise EveryRankError(message[0])
    remaining = iter(tensors)

    def receive(header: _TensorHeader) -> Tensor:
        return sent(next(remaining, None), header.shape, header.dtype, group, device)

    received = _map_tree(receive, _TensorHeader, message[1])
    return tree if first else received


def _map_tree(change: Callable[[Any], Any], kind: type, tree: Any) -> Any:
    """Return a tree with `change` applied to each value of a type, in an order that is the same on every rank."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _map_tree(change, kind, value) for key, value in tree.items()}
    return type(tree)(_map_tree(change, kind, value) for value in tree) if isinstance(tree, list | tuple) else tree
