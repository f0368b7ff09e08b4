"""Write and read .safetensors files of tensors that no rank holds whole: one tensor at a time, each rank its own part."""

import json
from collections.abc import Iterable, Iterator, Mapping
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
    """Return names in their order in a file: the widest numbers first, so that all are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def whole_on_first(tensor: Tensor) -> Tensor | None:
    """Return a tensor in shards whole on the first rank, and None on the others, which hold no more than their own shard
    meanwhile; return any other tensor as it is. All ranks must call this.
    """
    if not in_shards(tensor):
        return tensor
    mesh, sharded = tensor.device_mesh, tensor.placements[-1]
    if not sharded.is_shard(0) or any(not outer.is_replicate() for outer in tensor.placements[:-1]):
        whole = tensor.full_tensor()
        return None if dist.get_rank() else whole
    if any(mesh.get_local_rank(dim) for dim in range(mesh.ndim - 1)):
        return None  # the first of the ranks with the same shard sends it
    group, local = mesh.get_group(mesh.ndim - 1), tensor.to_local()
    if dist.get_rank(group):
        _exchange([dist.P2POp(dist.isend, local.contiguous(), dist.get_global_rank(group, 0), group)] if len(local) else [])
        return None
    whole = local.new_empty(tensor.shape)
    parts = [whole[start:stop] for start, stop in (_rows_of(tensor, rank) for rank in range(dist.get_world_size(group)))]
    parts[0].copy_(local)
    peers = [(dist.get_global_rank(group, rank), part) for rank, part in enumerate(parts) if rank and len(part)]
    _exchange([dist.P2POp(dist.irecv, part, peer, group) for peer, part in peers])
    return whole


def _rows_of(tensor: Tensor, rank: int) -> tuple[int, int]:
    """Return the first row of a tensor in shards that a rank has, and the one after its last."""
    assert in_shards(tensor)
    rows = tensor.shape[0]
    rows_per_rank = -(-rows // tensor.device_mesh.size(tensor.device_mesh.ndim - 1))
    return min(rank * rows_per_rank, rows), min((rank + 1) * rows_per_rank, rows)


def _exchange(operations: list[dist.P2POp]) -> None:
    """Send and receive, and wait for it."""
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], whole: Iterator[Tensor | None], metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file, one tensor after the other.

    Args:
        tensors: give the names, shapes and dtypes.
        whole: yields the tensors themselves, `in_order`, each when it is due.
        metadata: of the file.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
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
            del tensor  # before the next one is asked for


def read_parts(
    file: Path, examples: Mapping[str, Tensor], group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, Tensor]:
    """Read a .safetensors file into tensors like the examples: each rank reads its own part of those in shards; the first reads
    those that are whole on every rank and sends them. Names and shapes that no example has become tensors without data.

    Args:
        group: of all ranks; None: this process is alone.
    """
    tensors: dict[str, Tensor] = {}
    with safe_open(file, "pt") as reader:
        for name in sorted(reader.keys()):
            part = reader.get_slice(name)
            shape, example = torch.Size(part.get_shape()), examples.get(name)
            if example is None or example.shape != shape:
                tensors[name] = torch.empty(shape, device="meta")
            elif in_shards(example):
                tensors[name] = _read_own_part(reader, name, example)
            elif group is None:
                tensors[name] = reader.get_tensor(name)
            else:
                dtype = next(dtype for dtype, code in TYPES.items() if code == part.get_dtype())
                tensor = None if dist.get_rank(group) else reader.get_tensor(name)
                tensors[name] = sent(tensor, shape, dtype, group, device)
    return tensors


def _read_own_part(reader: Any, name: str, example: Tensor) -> Tensor:
    """Read this rank's part of a tensor in shards."""
    from torch.distributed.tensor import DTensor

    assert in_shards(example)
    mesh, sharded = example.device_mesh, example.placements[-1]
    if not sharded.is_shard(0) or any(not outer.is_replicate() for outer in example.placements[:-1]):
        return shard_like(reader.get_tensor(name), example)
    start, stop = _rows_of(example, mesh.get_local_rank(mesh.ndim - 1))
    local = example.to_local()
    rows = reader.get_slice(name)[start:stop] if stop > start else local.new_empty(0, *example.shape[1:])
    return DTensor.from_local(
        rows.to(local.device), mesh, example.placements, run_check=False, shape=example.shape, stride=example.stride()
    )


def drain(tensors: Iterable[Tensor | None]) -> None:
    """Take part in sending tensors to other ranks, and keep none of them."""
    for _ in tensors:
        pass
