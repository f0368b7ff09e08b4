"""Gradient caching: the loss of a large batch, exactly, with the activations of a small one (GradCache, arXiv:2101.06983).

Embed the batch in micro-batches without graph; take the loss's gradient by the embeddings; then embed each micro-batch again,
with its own random numbers, and send its rows of that gradient into the towers. Twice the forward, but once that of towers that
are locked for good, any objective and pairing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmcontrast.models import ContrastiveModel, Embeddings
from mmcontrast.types import Batch

NOT_COUNTING = {"momentum": 0.0, "num_batches_tracked": None}  # of a norm whose statistics stay as they are


def cached_backward(
    model: nn.Module,
    batch: Batch,
    micro_batch_size: int,
    loss_of: Callable[[Embeddings], Tensor],
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
    device: torch.device | str = "cpu",
    synchronise: bool = True,
) -> tuple[Tensor, Embeddings]:
    """Adds the gradient of `loss_of` the whole batch's embeddings to the model's parameters.

    It is that of `loss_of(model(batch)).backward()`, had the model seen the batch in micro-batches.

    Args:
        model: Batch → Embeddings, or DistributedDataParallel of one, whose single all-reduce follows the last micro-batch.
        batch: anywhere; micro-batches are moved to `device` one at a time.
        loss_of: called once. What it does in its backward (other ranks, objectives' memories) happens once.
        backward: of the micro-batches: `accelerator.backward`, where gradients are scaled.
        synchronise: let the last micro-batch reduce over the ranks; False: more is to be added first.

    Returns:
        (loss, detached; the embeddings it was taken of, with their gradients).
    """
    device = torch.device(device)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    parts, states, seen = batch.split(micro_batch_size), [], []
    locked = isinstance(inner, ContrastiveModel) and any(map(inner.is_locked, inner.towers))
    kept: list[dict[str, Any]] = [{"features": {}} if locked else {} for _ in parts]
    with torch.no_grad(), running_statistics_kept(inner):
        for part, features in zip(parts, kept, strict=True):
            states.append(_random_state(device))
            seen.append(inner(part.to(device), **features))
    fields = {field: _leaf(torch.cat([part.fields[field] for part in seen])) for field in seen[0].fields}
    scale, bias, curvature = seen[0].logit_scale, seen[0].logit_bias, seen[0].curvature
    scale = {pair: _leaf(one) for pair, one in scale.items()} if isinstance(scale, dict) else _leaf(scale)
    leaves = Embeddings(fields, scale, None if bias is None else _leaf(bias), None if curvature is None else _leaf(curvature))
    del seen
    loss = loss_of(leaves)
    loss.backward()
    after = _random_state(device)
    start = 0
    for part, state, features in zip(parts, states, kept, strict=True):
        rows = slice(start, start := start + len(part))
        last = start == len(batch)
        _set_random_state(state, device)
        with nullcontext() if last and synchronise else no_sync(model):
            again = model(part.to(device), **features)
            pairs = [(found, _grad(fields[field])[rows]) for field, found in again.fields.items()]
            if last:  # the scale, the bias and the curvature are one for all
                pairs += [(found, _grad(leaf)) for found, leaf in zip(_shared(again), _shared(leaves), strict=True)]
            backward(torch.stack([(found * grad).sum() for found, grad in pairs]).sum())
    _set_random_state(after, device)
    return loss.detach(), leaves


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _shared(embeddings: Embeddings) -> list[Tensor]:
    """What all samples share: scales, the bias, and the curvature."""
    scale, more = embeddings.logit_scale, (embeddings.logit_bias, embeddings.curvature)
    return [*(scale.values() if isinstance(scale, dict) else [scale]), *(one for one in more if one is not None)]


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients stay on their ranks within it; of weights in shards, where they are to be reduced once a step."""
    if getattr(model, "reduced_once", False):
        return _whole_gradients(model)
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


@contextmanager
def _whole_gradients(model: nn.Module) -> Iterator[None]:
    module: Any = model  # torch's FSDPModule
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def batch_norms(model: nn.Module) -> list[str]:
    """Names of the modules whose output depends on who else is in a micro-batch."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def with_statistics(model: nn.Module) -> list[Any]:
    """The modules that learn running statistics of what passes through them in training: batch norms and their kin."""
    return [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor) and hasattr(m, "momentum")]


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """What passes twice is counted by batch norms once: within it they leave their statistics as they are."""
    norms = [module for module in with_statistics(model) if module.training]
    before = [{name: getattr(module, name) for name in NOT_COUNTING if hasattr(module, name)} for module in norms]
    for module, values in zip(norms, before, strict=True):
        for name in values:
            setattr(module, name, NOT_COUNTING[name])
    try:
        yield
    finally:
        for module, values in zip(norms, before, strict=True):
            for name, value in values.items():
                setattr(module, name, value)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
