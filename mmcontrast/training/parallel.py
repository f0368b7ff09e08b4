"""Distribute a model over ranks, whole or in shards (FSDP2), recompute or compile its blocks, and average batch norms.

Shards come from torch's own `fully_shard`: accelerate's wrapping computes the logit scale in half precision, and needs a GPU.
"""

import os
import sys
import warnings
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

NOT_IN_SHARDS = ("adafactor", "adamp", "mars", "novograd", "nvnovograd")  # timm's optimizers that fail on DTensors


def is_sharded(options: TrainOptions) -> bool:
    """Return whether weights are in shards."""
    return options.parallel == "fsdp" and dist.is_initialized() and dist.get_world_size() > 1


def shard(model: ContrastiveModel, options: TrainOptions, device: torch.device) -> None:
    """Shard every block's weights, and the other ones, over all ranks in place; their parameters are `DTensor`s then.

    With bf16, blocks are gathered and computed in it; other modules (embeddings, projections, the logit scale), and blocks with
    batch norms, stay fp32 under autocast. Gradients are averaged in fp32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = make_mesh(options, device)
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for tower in map(model.tower, model.towers):
        for block in tower.blocks().values():
            policy = bf16 if options.precision == "bf16" and not batch_norms(block) else MixedPrecisionPolicy()
            fully_shard(block, mesh=mesh, reshard_after_forward=options.reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    model.reduced_once = options.reduce_gradients == "step"
    if device.type == "cpu":  # gloo of torch 2.8 sums gradients that it is asked to average
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)


def make_mesh(options: TrainOptions, device: torch.device) -> "DeviceMesh":
    """Return the mesh of ranks: all share one copy of the weights, or each `shard_ranks` in a row share one.

    Raises:
        UserError: if the ranks cannot be cut into groups of `shard_ranks`.
    """
    from torch.distributed.device_mesh import init_device_mesh

    ranks = dist.get_world_size()
    size = options.shard_ranks or ranks
    if ranks % size:
        raise UserError(f"train.shard_ranks={size}: {ranks} processes cannot be cut into groups of {size}: take a divisor")
    if size == ranks:
        return init_device_mesh(device.type, (ranks,))
    return init_device_mesh(device.type, (ranks // size, size), mesh_dim_names=("copies", "shards"))


def distribute(
    model: ContrastiveModel, copies: list[ContrastiveModel], options: TrainOptions, accelerator: Accelerator
) -> nn.Module:
    """Return the model as the training loop calls it, on its device and distributed over the ranks; distribute its `copies` in
    place in the same way.

    Raises:
        UserError: for unknown towers, or options that do not go together.
    """
    check_placement(model, options)
    check_rows(model, options, accelerator.num_processes)
    recompute_blocks(model, options.recompute)
    for name in options.compile:
        for block in model.tower(name).blocks().values() or [model.towers[name]]:
            block.forward = torch.compile(block.forward)
    sharded = is_sharded(options)
    for module in [model, *copies]:
        if sharded:
            shard(module, options, accelerator.device)
        else:
            module.to(accelerator.device)
    for copy in copies:
        accelerator.prepare_model(copy, evaluation_mode=True)  # it computes in the same precision
    with warnings.catch_warnings():  # accelerate does not know the option's name from torch 2.13 on
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=sharded)
    return prepared


def check_placement(model: ContrastiveModel, options: TrainOptions) -> None:
    """Check the options that say how a model is distributed, recomputed and compiled.

    Raises:
        UserError: for unknown towers, or options that do not go together.
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
    """Check that a rank's samples can be cut into the parts and micro-batches that the options ask for.

    Raises:
        UserError: if they cannot, or a single sample would pass batch norms.
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
    normed = [
        name for name, tower in model.towers.items() if any(tower.get_submodule(norm).training for norm in batch_norms(tower))
    ]
    if smallest == 1 and normed:
        micro = f", in parts of at most {size} (train.micro_batch_size)" if samples > 1 else ""
        raise UserError(
            f"towers.{normed[0]} has batch norms, which need two samples at a time: train.batch_size={options.batch_size} on"
            f" {ranks} processes and train.accumulation_steps={options.accumulation_steps} is {samples} at a time{micro}"
        )


def recompute_blocks(model: ContrastiveModel, towers: Sequence[str]) -> None:
    """Let the blocks of some towers keep only their inputs, and recompute their activations in the backward."""
    for name in towers:
        for block in model.tower(name).blocks().values():
            block.forward = MethodType(_recomputed_forward, block)


def _recomputed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block so that it keeps only its inputs. In the second forward batch norms do not count again, and modules that were
    in evaluation mode are in it again."""
    forward = type(self).forward.__get__(self)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    if (self.training and not batch_norms(self)) or torch.compiler.is_compiling():  # a compiled block recomputes as it is
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    evaluated = [module for module in self.modules() if not module.training]

    @contextmanager
    def second_forward() -> Iterator[None]:
        with evaluating(evaluated), running_statistics_kept(self):
            yield

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), second_forward()

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def batches_counted(model: nn.Module) -> Tensor:
    """Return how many batches each of the model's norms has counted, [norms]; 0 for those that do not count."""
    counts = []
    for norm in with_statistics(model):
        count = _count(norm)
        counts.append((norm.running_var.new_zeros(()) if count is None else count).float())
    return torch.stack(counts) if counts else torch.empty(0)


def _count(norm: nn.Module) -> Tensor | None:
    """Return the tensor in which a batch norm counts its batches. Other norms may have one too, but leave it at 0."""
    return norm.num_batches_tracked if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None


@torch.no_grad()
def same_statistics(model: nn.Module, before: Tensor) -> None:
    """Set batch norms' running statistics to their mean over the ranks that counted in this step: each rank has seen its own
    part of the batch, and nothing of a field that its part lacks.

    Args:
        before: `batches_counted` at the beginning of the step.
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
    message = torch.cat([weights, counted, *(statistic.float() * weights[k] for k, statistic in statistics)])
    dist.all_reduce(message)
    weights, counted, *sums = message.split([len(norms), len(norms), *(len(statistic) for _, statistic in statistics)])
    share = weights.clamp(min=1)
    for (k, statistic), total in zip(statistics, sums, strict=True):
        statistic.copy_(torch.where(weights[k] > 0, total / share[k], statistic))
    for count, number in zip(counts, (before + (counted / share).round()).long(), strict=True):
        if count is not None:
            count.copy_(number)


def in_shards(tensor: Any) -> TypeGuard["DTensor"]:
    """Return whether a tensor is in shards, without importing DTensor, which takes half as long as importing torch."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole. If it is in shards, all ranks must call this."""
    return tensor.full_tensor() if in_shards(tensor) else tensor


def shard_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Return a whole tensor in the example's shards (one of another shape: whole on every rank), without communication."""
    if not in_shards(example) or in_shards(tensor):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = example.placements if tensor.shape == example.shape else [Replicate()] * example.device_mesh.ndim
    return distribute_tensor(tensor.to(example.device), example.device_mesh, placements, src_data_rank=None)


def shard_all_like(tensors: Mapping[str, Tensor], examples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors in the shards of the examples of the same names."""
    return {name: shard_like(tensor, examples[name]) for name, tensor in tensors.items()}
