"""Where the weights live, whole on every rank or in shards (FSDP2), and what blocks do to take less memory or time.

The shards are torch's own `fully_shard`: accelerate's wrapping computes the logit scale in half precision, and needs a GPU.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.models import ContrastiveModel, evaluating
from mmcontrast.training.grad_cache import batch_norms, running_statistics_kept, with_statistics
from mmcontrast.training.options import TrainOptions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

NOT_IN_SHARDS = ("adafactor", "adamp", "mars", "novograd", "nvnovograd")  # of timm's: they fail on DTensors


def is_sharded(options: TrainOptions) -> bool:
    return options.parallel == "fsdp" and dist.is_initialized() and dist.get_world_size() > 1


def shard(model: ContrastiveModel, options: TrainOptions, device: torch.device) -> None:
    """Cuts every block's weights, and the rest's, over all ranks, in place; their parameters are `DTensor`s then.

    With bf16, blocks are fetched and computed in it; what surrounds them (embeddings, projections, the logit scale), and blocks
    with batch norms, stay fp32 under autocast. Gradients are averaged in fp32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = make_mesh(options, device)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for tower in map(model.tower, model.towers):
        for block in tower.blocks().values():
            policy = half if options.precision == "bf16" and not batch_norms(block) else MixedPrecisionPolicy()
            fully_shard(block, mesh=mesh, reshard_after_forward=options.reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    model.reduced_once = options.reduce_gradients == "step"
    if device.type == "cpu":  # gloo of torch 2.8 sums gradients that it is asked to average
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)


def make_mesh(options: TrainOptions, device: torch.device) -> "DeviceMesh":
    """Return the ranks that share a copy of the weights, all or `shard_ranks` of them that follow each other.

    Raises:
        UserError: if copies cannot be shared evenly.
    """
    from torch.distributed.device_mesh import init_device_mesh

    ranks, each = dist.get_world_size(), options.shard_ranks or dist.get_world_size()
    if ranks % each:
        raise UserError(f"train.shard_ranks={each}: {ranks} processes cannot be cut into groups of {each}: take a divisor")
    if each == ranks:
        return init_device_mesh(device.type, (ranks,))
    return init_device_mesh(device.type, (ranks // each, each), mesh_dim_names=("copies", "shards"))


def distribute(
    model: ContrastiveModel, copies: list[ContrastiveModel], options: TrainOptions, accelerator: Accelerator
) -> nn.Module:
    """The model as the loop calls it, on its device, for several ranks; `copies` of it are placed as it is.

    Raises:
        UserError: for towers that are not there, or what does not go together.
    """
    check_placement(model, options)
    check_rows(model, options, accelerator.num_processes)
    recompute_blocks(model, options.recompute)
    for name in options.compile:
        for block in model.tower(name).blocks().values() or [model.towers[name]]:
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
    for option in ("recompute", "compile", "layer_decay"):
        for name in getattr(options, option):
            if name not in model.towers:
                raise UserError(f"train.{option}: no tower {name!r}; {suggestion(name, model.towers)}")
    for option in ("recompute", "layer_decay"):
        for name in getattr(options, option):
            if not model.tower(name).blocks():
                instead = "leave it out" if option == "recompute" else f"set train.tower_lr: {{{name}: …}}"
                raise UserError(f"train.{option}: towers.{name} has no blocks that could be found: {instead}")
    for name in model.towers if options.parallel == "fsdp" else ():
        layers = [module for module in model.towers[name].modules() if next(module.parameters(recurse=False), None) is not None]
        if len(layers) > 1 and not model.tower(name).blocks():
            raise UserError(
                f"train.parallel=fsdp: towers.{name} has no blocks that could be found, so it would be fetched as a whole: set"
                " train.parallel: ddp, or name its repeated parts blocks.0, blocks.1, …"
            )
    if options.channels_last and not any(parameter.dim() == 4 for parameter in model.parameters()):
        raise UserError("train.channels_last: no tower has a convolution of pictures: leave it out")
    for name in set(options.recompute) & set(options.compile):
        if batch_norms(model.towers[name]):
            raise UserError(f"train.recompute and train.compile of tower {name!r}: its batch norms allow one of the two")
    if options.shard_ranks and options.parallel != "fsdp":
        raise UserError(
            f"train.shard_ranks={options.shard_ranks}: nothing is in shards: set train.parallel: fsdp, or leave it out"
        )
    if options.parallel == "fsdp" and options.precision == "fp16":
        raise UserError("train.parallel=fsdp with train.precision=fp16 is not there: take bf16")
    kind = options.optimizer if isinstance(options.optimizer, str) else str(options.optimizer.get("type"))
    if options.parallel == "fsdp" and kind in NOT_IN_SHARDS:
        raise UserError(
            f"train.parallel=fsdp with train.optimizer={kind}: it does not work on shards; take adamw, lion, adopt, …"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError("accelerate's own FSDP is on: launch without it, and set train.parallel=fsdp")


def check_rows(model: ContrastiveModel, options: TrainOptions, ranks: int) -> None:
    """
    Raises:
        UserError: where a rank's samples cannot be cut into parts, or one of them would go alone through batch norms.
    """
    samples = options.batch_size // ranks
    if samples % options.accumulation_steps:
        raise UserError(
            f"train.batch_size={options.batch_size} on {ranks} processes cannot be cut into"
            f" train.accumulation_steps={options.accumulation_steps} equal parts"
        )
    samples //= options.accumulation_steps
    size = options.micro_batch_size or samples
    smallest = samples // max(1, -(-samples // max(1, size)))
    learning = [
        name for name, tower in model.towers.items() if any(tower.get_submodule(n).training for n in batch_norms(tower))
    ]
    if smallest == 1 and learning:
        micro = f", in parts of at most {size} (train.micro_batch_size)" if samples > 1 else ""
        raise UserError(
            f"towers.{learning[0]} has batch norms, which need two samples at a time: train.batch_size={options.batch_size} on"
            f" {ranks} processes and train.accumulation_steps={options.accumulation_steps} is {samples} at a time{micro}"
        )


def recompute_blocks(model: ContrastiveModel, towers: Sequence[str]) -> None:
    """The blocks of some towers keep their inputs alone from now on."""
    for name in towers:
        for block in model.tower(name).blocks().values():
            block.forward = MethodType(_recomputed, block)


def _recomputed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's forward that keeps its inputs alone. Batch norms count once; what was in evaluation mode is so again."""
    forward = type(self).forward.__get__(self)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    if (
        self.training and not batch_norms(self)
    ) or torch.compiler.is_compiling():  # what is compiled is computed again as it is
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    still = [module for module in self.modules() if not module.training]

    @contextmanager
    def as_it_was() -> Iterator[None]:
        with evaluating(still), running_statistics_kept(self):
            yield

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), as_it_was()

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def batches_counted(model: nn.Module) -> Tensor:
    """How many batches each of the model's norms has counted so far, [norms]; 0 for those that do not count."""
    norms = with_statistics(model)
    counts = [_count(norm) for norm in norms]
    numbers = [n.running_var.new_zeros(()) if count is None else count for n, count in zip(norms, counts, strict=True)]
    return torch.stack([number.float() for number in numbers]) if norms else torch.empty(0)


def _count(norm: nn.Module) -> Tensor | None:
    """What a batch norm counts its batches in; others have it too, and leave it at 0."""
    return norm.num_batches_tracked if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None


@torch.no_grad()
def same_statistics(model: nn.Module, before: Tensor) -> None:
    """Batch norms' running statistics of every rank become the mean of those of the ranks that counted in this step: each has
    seen its own part of the batch, and one that lacks a field has seen nothing of it.

    Args:
        before: `batches_counted` at the step's beginning.
    """
    norms = with_statistics(model)
    if not norms or not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    counts = [_count(norm) for norm in norms]
    counted = batches_counted(model) - before
    weights = ((counted > 0) | counted.new_tensor([count is None for count in counts]).bool()).float()
    statistics = [
        (k, statistic)
        for k, norm in enumerate(norms)
        for statistic in (getattr(norm, "running_mean", None), norm.running_var)
        if statistic is not None
    ]
    told = torch.cat([weights, counted, *(statistic.float() * weights[k] for k, statistic in statistics)])
    dist.all_reduce(told)
    weights, counted, *sums = told.split([len(norms), len(norms), *(len(statistic) for _, statistic in statistics)])
    share = weights.clamp(min=1)
    for (k, statistic), total in zip(statistics, sums, strict=True):
        statistic.copy_(torch.where(weights[k] > 0, total / share[k], statistic))
    for count, number in zip(counts, (before + (counted / share).round()).long(), strict=True):
        if count is not None:
            count.copy_(number)


def in_shards(tensor: Any) -> TypeGuard["DTensor"]:
    """Return whether it is a tensor in shards, without importing what makes them: that takes half as long as torch itself."""
    made_here = sys.modules.get("torch.distributed.tensor")
    return made_here is not None and isinstance(tensor, made_here.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Of all ranks' shards, if it is in shards: then every rank must ask."""
    return tensor.full_tensor() if in_shards(tensor) else tensor


def shard_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor as the example is: in the same shards (of another shape: whole on every rank). No rank asks another."""
    if not in_shards(example) or in_shards(tensor):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = example.placements if tensor.shape == example.shape else [Replicate()] * example.device_mesh.ndim
    return distribute_tensor(tensor.to(example.device), example.device_mesh, placements, src_data_rank=None)


def shard_all_like(tensors: Mapping[str, Tensor], examples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: shard_like(tensor, examples[name]) for name, tensor in tensors.items()}
