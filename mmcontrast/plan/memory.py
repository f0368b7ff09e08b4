"""Measure a step's memory and FLOPs on tensors without data: weights, optimizer state, activations and the loss."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.models import ContrastiveModel
from mmcontrast.plan.result import GIB
from mmcontrast.score.traffic import Scheme, gathered_bytes
from mmcontrast.training.cost import Bytes, Flops, count_bytes, count_flops, make_values
from mmcontrast.training.optim import make_optimizer
from mmcontrast.training.options import TrainOptions

DEFAULT_MEMORY = 80 * GIB
RESERVED, RESERVED_SHARE = GIB, 0.05  # assumed: CUDA's context and libraries; what the allocator cannot use
LOSS_TILES = 48 * 2**20  # measured beside the gradients of a loss: docs/benchmarks.md
LOSS = "embeddings and loss"  # a row of the table
SMALLEST, PROBES = 2, (8, 16)  # batch norms refuse one sample


def device_memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else DEFAULT_MEMORY


class CannotBePlanned(UserError):
    """The model's computation does not follow from shapes alone, so it cannot be counted."""


def flops_of(model: ContrastiveModel) -> Flops:
    """Count a model's FLOPs for one sample; its parameters keep the gradients.

    Raises:
        CannotBePlanned: if the contents of a batch decide how the model computes, or a tower refuses its inputs.
    """
    try:
        return count_flops(model, make_values(model, SMALLEST), keep_gradients=True)
    except (NotImplementedError, RuntimeError, ValueError, AssertionError) as error:  # timm asserts
        reason = " ".join([" ".join(str(error).split())[:200], *getattr(error, "__notes__", [])])
        raise CannotBePlanned(f"this model cannot be planned: {reason}") from error


def part_memory(model: ContrastiveModel, samples: int, options: TrainOptions, several: bool) -> Bytes:
    """Count the bytes of one part of a step; `several`: earlier parts have left their gradients, as `flops_of` does."""
    if not several:
        model.zero_grad()
    return count_bytes(model, make_values(model, samples), options.precision)


def optimizer_state(model: nn.Module, options: TrainOptions) -> tuple[int, list[str]]:
    """Return the bytes of the optimizer's state, after a step with the current gradients; and notes on what is assumed."""
    optimizer = make_optimizer(model, options)  # type: ignore[arg-type]
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        assumed = 2 * size(p for p in model.parameters() if p.requires_grad)
        reason = str(error).splitlines()[0][:80]
        return assumed, [f"train.optimizer: its state is assumed to be AdamW's, two fp32 numbers a weight ({reason})"]
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return size(tensors), []


def resident_memory(model: ContrastiveModel, options: TrainOptions, devices: int, optimizer_bytes: int) -> dict[str, int]:
    """Return the bytes that stay allocated from the first step to the last: weights, their copies and the optimizer's state.
    fsdp shards them over the devices, or over those that share a copy, and fetches one block and the next, with what is in no
    block (all, if `reshard_after_forward` is false)."""
    sharded = options.parallel == "fsdp" and devices > 1
    weights = size([*model.parameters(), *model.buffers()])
    parts = min(options.shard_ranks or devices, devices) if sharded else 1
    share = math.ceil(weights / parts)
    memory = {"weights": share, "optimizer state": math.ceil(optimizer_bytes / parts)}
    if sharded:
        blocks = [size(block.parameters()) for tower in map(model.tower, model.towers) for block in tower.blocks().values()]
        at_once = sorted(blocks)[-2:] if options.reshard_after_forward else blocks
        memory["weights that are fetched"] = weights - sum(blocks) + sum(at_once)
    elif devices > 1:  # DistributedDataParallel's, beside the gradients
        memory["buckets for the gradients' reduction"] = size(p for p in model.parameters() if p.requires_grad)
    if options.ema_decay:
        memory["averaged weights"] = share
    if options.queue_size:
        rows = options.queue_size * len(model.modalities) * (4 * model.embed_dim + 8)
        memory["queue and its encoder"] = share + rows
    return memory


def loss_memory(model: ContrastiveModel, samples: int, shape: tuple[int, int], scheme: Scheme, fields: int) -> int:
    """Return the bytes of the embeddings with their gradients and of the loss: the two gradients of a term, the columns from
    other devices (`gathered_bytes`), and one tile; for hyperbolic scores also the points of a term, as made and as multiplied,
    with gradients. All O(N·D).

    Args:
        samples: of one device in one loss. shape: (nodes, devices of a node). fields: of the largest term.
    """
    rows = 4 * model.embed_dim * samples
    points = 0 if model.hyperbolic is None else 3 * fields
    gathered = gathered_bytes(scheme, *shape, samples, model.embed_dim) if math.prod(shape) > 1 else 0
    return rows * (2 * len(model.modalities) + fields + points) + gathered + LOSS_TILES


def step_memory(fixed: dict[str, int], model: ContrastiveModel, samples: int, step: Bytes) -> dict[str, int]:
    """Return the bytes of a step by use: the fixed ones, and those of a part of `samples` samples."""
    values = size(make_values(model, samples).values())
    memory = fixed | {"gradients and activations, at their peak": step.peak, "inputs": values}
    return memory | {"reserved (assumed)": round(RESERVED + RESERVED_SHARE * sum(memory.values()))}


def largest_that_fits(
    model: ContrastiveModel, options: TrainOptions, per_loss: int, fixed: dict[str, int], available: int
) -> int | None:
    """Return the largest power of two for train.micro_batch_size that fits, at most `per_loss`; None if none does. Bytes grow
    linearly with the samples: the line through two probes gives a first guess, and measuring there decides."""

    def total(samples: int) -> int:
        return sum(step_memory(fixed, model, samples, part_memory(model, samples, options, several=True)).values())

    if total(SMALLEST) > available:
        return None
    low, high = (total(samples) for samples in PROBES)
    slope = max(1.0, (high - low) / (PROBES[1] - PROBES[0]))
    guess = min(per_loss, max(SMALLEST, int(PROBES[0] + (available - low) / slope)))
    samples = 2 ** math.floor(math.log2(guess))
    while samples > SMALLEST and total(samples) > available:
        samples //= 2
    return samples


def largest_batch_that_fits(
    model: ContrastiveModel, micro_batch: int, step: Bytes, fixed: dict[str, int], per_loss: int, available: int
) -> int:
    """Return the most samples of one device in one loss that fit with gradient caching.

    Args:
        step: of one micro-batch, which finds the gradients of those before it.
        fixed: with the loss of `per_loss` samples, whose bytes grow linearly with them.
    """
    per_sample = (fixed[LOSS] - LOSS_TILES) / per_loss * (1 + RESERVED_SHARE)
    memory = step_memory(fixed | {LOSS: LOSS_TILES}, model, micro_batch, step)
    return int((available - sum(memory.values())) / per_sample) // micro_batch * micro_batch


def count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def size(tensors: Iterable[Tensor] | Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
