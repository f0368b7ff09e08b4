"""Files of tensors (.safetensors) that no rank holds whole: written one tensor at a time, read by each rank in its part."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from mmcontrast.evaluation.sending import bytes_of, sent
from mmcontrast.training.parallel import in_shards, shard_like

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return names in the order in which a file has them: the widest numbers first, so that all of them are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def whole_on_first(tensor: Tensor) -> Tensor | None:
    """Return a tensor of which every rank holds a part, whole, on the first rank alone; one that is in no parts as it is. All
    ranks must ask. The others hold no more than their part of it meanwhile.
    """
    if not in_shards(tensor):
        return tensor
    mesh, sharded = tensor.device_mesh, tensor.placements[-1]
    if not sharded.is_shard(0) or any(not outer.is_replicate() for outer in tensor.placements[:-1]):
        whole = tensor.full_tensor()
        return None if dist.get_rank() else whole
    if any(mesh.get_local_rank(dim) for dim in range(mesh.ndim - 1)):
        return None  # the first of several that have the same sends it
    group, local = mesh.get_group(mesh.ndim - 1), tensor.to_local()
    if dist.get_rank(group):
        _exchanged([dist.P2POp(dist.isend, local.contiguous(), dist.get_global_rank(group, 0), group)] if len(local) else [])
        return None
    whole = local.new_empty(tensor.shape)
    parts = [whole[start:stop] for start, stop in map(partial(_rows_of, tensor), range(dist.get_world_size(group)))]
    parts[0].copy_(local)
    peers = [(dist.get_global_rank(group, rank), part) for rank, part in enumerate(parts) if rank and len(part)]
    _exchanged([dist.P2POp(dist.irecv, part, peer, group) for peer, part in peers])
    return whole


def _rows_of(tensor: Tensor, rank: int) -> tuple[int, int]:
    """Return which rows of a tensor in shards a rank has: the first, and the one after the last."""
    assert in_shards(tensor)
    rows = tensor.shape[0]
    each = -(-rows // tensor.device_mesh.size(tensor.device_mesh.ndim - 1))
    return min(rank * each, rows), min((rank + 1) * each, rows)


def _exchanged(exchanges: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(exchanges) if exchanges else ():
        work.wait()


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], whole: Iterator[Tensor | None], about: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file, one tensor after the other.

    Args:
        tensors: their names, shapes and types.
        whole: they themselves, `in_order`, taken when they are due.
        about: the file's metadata.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": about} if about else {}
    names, start = in_order(tensors), 0
    for name in names:
        end = start + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": TYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for _ in names:
            tensor = next(whole)
            assert tensor is not None
            target.write(bytes_of(tensor.detach().cpu()).numpy().data)
            del tensor  # before the next one comes


def read_parts(
    file: Path, examples: Mapping[str, Tensor], group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, Tensor]:
    """Read a .safetensors file into tensors like the examples: of what is in shards each rank reads its own part; what is whole
    on every rank the first one reads, and sends the others. Other names and shapes come as tensors without data.

    Args:
        group: of all ranks; None: this process is alone.
    """
    found: dict[str, Tensor] = {}
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys()):
            part = opened.get_slice(name)
            shape, example = torch.Size(part.get_shape()), examples.get(name)
            if example is None or example.shape != shape:
                found[name] = torch.empty(shape, device="meta")
            elif in_shards(example):
                found[name] = _own_part(opened, name, example)
            elif group is None:
                found[name] = opened.get_tensor(name)
            else:
                dtype = next(kind for kind, text in TYPES.items() if text == part.get_dtype())
                mine = None if dist.get_rank(group) else opened.get_tensor(name)
                found[name] = sent(mine, shape, dtype, group, device)
    return found


def _own_part(opened: Any, name: str, example: Tensor) -> Tensor:
    """Return what this rank has of a tensor in shards, read from a file."""
    from torch.distributed.tensor import DTensor

    assert in_shards(example)
    mesh, sharded = example.device_mesh, example.placements[-1]
    if not sharded.is_shard(0) or any(not outer.is_replicate() for outer in example.placements[:-1]):
        return shard_like(opened.get_tensor(name), example)
    start, stop = _rows_of(example, mesh.get_local_rank(mesh.ndim - 1))
    local = example.to_local()
    read = opened.get_slice(name)[start:stop] if stop > start else local.new_empty(0, *example.shape[1:])
    return DTensor.from_local(
        read.to(local.device), mesh, example.placements, run_check=False, shape=example.shape, stride=example.stride()
    )


def drained(tensors: Iterable[Tensor | None]) -> None:
    """Take part in sending what others want, and keep nothing of it."""
    for _ in tensors:
        pass
