"""Broadcast nested objects from the first rank to all others: tensors one at a time, as raw bytes."""

import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcontrast.errors import EveryRankError, UserError

SHARED_MEMORY, BOOT = Path("/dev/shm"), Path("/proc/sys/kernel/random/boot_id")
LARGE = 2**20  # bytes from which a tensor lies in memory that the ranks of a machine share
ALIGNMENT = 64  # bytes
CHUNK = 2**26  # bytes that are sent at a time


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Return the device from which a group sends."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in str(dist.get_backend(group)) else torch.device("cpu")


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

    @property
    def size(self) -> int:
        """Return the tensor's bytes."""
        return self.shape.numel() * self.dtype.itemsize


class _MachineMemory:
    """A block of memory that the ranks of a machine map and one of them fills. Where there is no room for it, or other ranks
    cannot see it (in containers of their own), a rank has memory of its own. All ranks must make it at once.

    Args:
        size: its bytes.
    """

    def __init__(self, size: int, group: dist.ProcessGroup) -> None:
        machine = f"{socket.gethostname()} {BOOT.read_text() if BOOT.exists() else ''}"
        machines = _all_gather(machine, group)
        owner = machines.index(machine)
        is_owner = owner == dist.get_rank(group)
        path = _all_gather(_make_file(size) if is_owner and machines.count(machine) > 1 else None, group)[owner]
        mapped = _map_file(path, size, is_owner) if path else None
        _all_gather(None, group)  # by now all have mapped it
        if is_owner and path:
            os.unlink(path)
        self.fills = is_owner or mapped is None
        self.free = torch.empty(size, dtype=torch.uint8) if mapped is None else mapped

    def receive(self, tensor: Tensor | None, header: _TensorHeader, group: dist.ProcessGroup, device: torch.device) -> Tensor:
        """Return the first rank's tensor on all ranks, in this memory."""
        memory, self.free = self.free[: header.size], self.free[-(-header.size // ALIGNMENT) * ALIGNMENT :]
        data = None if tensor is None else bytes_of(tensor)
        for start in range(0, header.size, CHUNK):
            chunk = memory[start : start + CHUNK]
            buffer = torch.empty_like(chunk, device=device) if data is None else data[start : start + CHUNK].to(device)
            dist.broadcast(buffer, group=group, group_src=0)
            if self.fills:
                chunk.copy_(buffer)
        return memory.view(header.dtype).view(header.shape)


def _all_gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _make_file(size: int) -> str | None:
    """Return the path of a new file in the machine's memory, None if there is no room for it."""
    try:
        file, path = tempfile.mkstemp(prefix="mmcontrast-", dir=SHARED_MEMORY)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, size)
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(file)
    return path


def _map_file(path: str, size: int, is_owner: bool) -> Tensor | None:
    """Return a file's bytes, None if this process cannot see it. What a rank that is not the owner writes is its own."""
    try:
        return torch.from_file(path, shared=is_owner, size=size, dtype=torch.uint8)
    except RuntimeError:
        return None


def from_first(make: Callable[[], Any], group: dist.ProcessGroup | None, device: torch.device, share: bool = False) -> Any:
    """Return on all ranks what `make` returns on the first: mappings, lists and tuples of tensors and plain values. Tensors are
    sent one at a time, and are received in host memory.

    Args:
        share: the ranks of a machine hold one copy of large tensors together, which none of them may change.

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
    large: list[int] = []
    if share:
        _map_tree(lambda header: large.append(header.size) if header.size >= LARGE else None, _TensorHeader, message[1])
    memory = _MachineMemory(sum(-(-size // ALIGNMENT) * ALIGNMENT for size in large), group) if large else None

    def receive(header: _TensorHeader) -> Tensor:
        tensor = next(remaining, None)
        if memory and header.size >= LARGE:
            return memory.receive(tensor, header, group, device)
        return sent(tensor, header.shape, header.dtype, group, device)

    received = _map_tree(receive, _TensorHeader, message[1])
    if memory:
        _all_gather(None, group)  # by now all of it is filled
    return received if share or not first else tree


def _map_tree(change: Callable[[Any], Any], kind: type, tree: Any) -> Any:
    """Return a tree with `change` applied to each value of a type, in an order that is the same on every rank."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _map_tree(change, kind, value) for key, value in tree.items()}
    return type(tree)(_map_tree(change, kind, value) for value in tree) if isinstance(tree, list | tuple) else tree
