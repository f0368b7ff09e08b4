"""Where the weights live, whole on every rank or in shards (FSDP2), and what blocks do to take less memory or time.

The shards are torch's own `fully_shard`: accelerate's wrapping computes the logit scale in half precision, and needs a GPU.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcontrast.components import nearest
from mmcontrast.errors import UserError
from mmcontrast.model import ContrastiveModel
from mmcontrast.towers import blocks_of
from mmcontrast.training.grad_cache import batch_norms, running_statistics_kept
from mmcontrast.training.options import TrainOptions

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

NOT_IN_SHARDS = ("adafactor", "adamp", "mars", "novograd", "nvnovograd")  # of timm's: they fail on DTensors


def is_sharded(options: TrainOptions) -> bool:
    return options.parallel == "fsdp" and dist.is_initialized() and dist.get_world_size() > 1


def shard(model: ContrastiveModel, options: TrainOptions, device: torch.device) -> None:
    """Cuts every block's weights, and the rest's, over all ranks, in place; their parameters are `DTensor`s then.

    With bf16, blocks are fetched and computed in it; what surrounds them (embeddings, projections, the logit scale), and blocks
    with batch norms, stay fp32 under autocast. Gradients are averaged in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for tower in model.towers.values():
        for block in blocks_of(tower).values():
            policy = half if options.precision == "bf16" and not batch_norms(block) else MixedPrecisionPolicy()
            fully_shard(block, mesh=mesh, reshard_after_forward=options.reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def place(
    model: ContrastiveModel, copies: list[ContrastiveModel], options: TrainOptions, accelerator: Accelerator
) -> nn.Module:
    """The model as the loop calls it, on its device, for several ranks; `copies` of it are placed as it is.

    Raises:
        UserError: for towers that are not there, or what does not go together.
    """
    check_placement(model, options)
    recompute_blocks(model, options.recompute)
    for name in options.compile:
        for block in blocks_of(model.towers[name]).values() or [model.towers[name]]:
            block.forward = torch.compile(block.forward)
    sharded = is_sharded(options)
    for one in [model, *copies]:
        if sharded:
            shard(one, options, accelerator.device)
        else:
            one.to(accelerator.device)
    for copy in copies:
        accelerator.prepare_model(copy, evaluation_mode=True)  # it computes in the same precision
    placed: nn.Module = accelerator.prepare_model(model, evaluation_mode=sharded)
    return placed


def check_placement(model: ContrastiveModel, options: TrainOptions) -> None:
    """
    Raises:
        UserError: for towers that are not there, or what does not go together.
    """
    for option in ("recompute", "compile"):
        for name in getattr(options, option):
            if name not in model.towers:
                raise UserError(f"train.{option}: no tower {name!r}; {nearest(name, model.towers)}")
    for name in set(options.recompute) & set(options.compile):
        if batch_norms(model.towers[name]):
            raise UserError(f"train.recompute and train.compile of tower {name!r}: its batch norms allow one of the two")
    if options.parallel == "fsdp" and options.precision == "fp16":
        raise UserError("train.parallel=fsdp with train.precision=fp16 is not there: take bf16")
    kind = options.optimizer if isinstance(options.optimizer, str) else str(options.optimizer.get("type"))
    if options.parallel == "fsdp" and kind in NOT_IN_SHARDS:
        raise UserError(
            f"train.parallel=fsdp with train.optimizer={kind}: it does not work on shards; take adamw, lion, adopt, …"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError("accelerate's own FSDP is on: launch without it, and set train.parallel=fsdp")


def recompute_blocks(model: ContrastiveModel, towers: Sequence[str]) -> None:
    """The blocks of some towers keep their inputs alone from now on."""
    for name in towers:
        for block in blocks_of(model.towers[name]).values():
            block.forward = MethodType(_recomputed, block)


def _recomputed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's forward that keeps its inputs alone. Batch norms count once."""
    forward = type(self).forward.__get__(self)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    if not batch_norms(self):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), running_statistics_kept(self)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@torch.no_grad()
def same_statistics(model: nn.Module) -> None:
    """Batch norms' running statistics of every rank become the first one's, as in DistributedDataParallel: each rank
    has seen its own part of the batch."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
    if statistics:
        told = torch.cat([statistic.float() for statistic in statistics])
        dist.broadcast(told, src=0)
        for statistic, first in zip(statistics, told.split([len(s) for s in statistics]), strict=True):
            statistic.copy_(first)


def in_shards(tensor: Any) -> TypeGuard["DTensor"]:
    """Return whether it is a tensor in shards, without importing what makes them: that takes half as long as torch itself."""
    made_here = sys.modules.get("torch.distributed.tensor")
    return made_here is not None and isinstance(tensor, made_here.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Of all ranks' shards, if it is in shards: then every rank must ask."""
    return tensor.full_tensor() if in_shards(tensor) else tensor


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor as the example is: in the same shards (of another shape: whole on every rank). No rank asks another."""
    if not in_shards(example) or in_shards(tensor):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = example.placements if tensor.shape == example.shape else [Replicate()] * example.device_mesh.ndim
    return distribute_tensor(tensor.to(example.device), example.device_mesh, placements, src_data_rank=None)


def all_like(tensors: Mapping[str, Tensor], examples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: like(tensor, examples[name]) for name, tensor in tensors.items()}
