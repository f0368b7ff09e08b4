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

FIXED_STATISTICS = {"momentum": 0.0, "num_batches_tracked": None}  # attributes of a norm that leaves its statistics unchanged


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
    """Add the gradient of `loss_of` the whole batch's embeddings to the model's parameters.

    It equals that of `loss_of(model(batch)).backward()`, had the model seen the batch in micro-batches.

    Args:
        model: Batch → Embeddings, or DistributedDataParallel of one, whose single all-reduce follows the last micro-batch.
        batch: anywhere; micro-batches are moved to `device` one at a time.
        loss_of: called once, so what its backward does (collectives, updates of an objective's memory) happens once.
        backward: of the micro-batches: `accelerator.backward`, where gradients are scaled.
        synchronise: let the last micro-batch reduce over the ranks; False: more gradients follow first.

    Returns:
        (the loss, detached; the embeddings that it was computed from, with their gradients).
    """
    device = torch.device(device)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    parts = batch.split(micro_batch_size)
    states: list[tuple[Tensor, Tensor | None]] = []
    outputs: list[Embeddings] = []
    locked = isinstance(inner, ContrastiveModel) and any(map(inner.is_locked, inner.towers))
    kept: list[dict[str, Any]] = [{"features": {}} if locked else {} for _ in parts]
    with torch.no_grad(), running_statistics_kept(inner):
        for part, features in zip(parts, kept, strict=True):
            states.append(_random_state(device))
            outputs.append(inner(part.to(device), **features))
    fields = {field: _leaf(torch.cat([output.fields[field] for output in outputs])) for field in outputs[0].fields}
    scale, bias, curvature = outputs[0].logit_scale, outputs[0].logit_bias, outputs[0].curvature
    scale = {pair: _leaf(value) for pair, value in scale.items()} if isinstance(scale, dict) else _leaf(scale)
    leaves = Embeddings(fields, scale, None if bias is None else _leaf(bias), None if curvature is None else _leaf(curvature))
    del outputs
    loss = loss_of(leaves)
    loss.backward()
    after = _random_state(device)
    start = 0
    for part, state, features in zip(parts, states, kept, strict=True):
        rows = slice(start, start := start + len(part))
        last = start == len(batch)
        _set_random_state(state, device)
        with nullcontext() if last and synchronise else no_sync(model):
            output = model(part.to(device), **features)
            pairs = [(tensor, _grad(fields[field])[rows]) for field, tensor in output.fields.items()]
            if last:  # all micro-batches share the scale, the bias and the curvature
                pairs += [(tensor, _grad(leaf)) for tensor, leaf in zip(_shared(output), _shared(leaves), strict=True)]
            backward(torch.stack([(tensor * grad).sum() for tensor, grad in pairs]).sum())
    _set_random_state(after, device)
    return loss.detach(), leaves


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _shared(embeddings: Embeddings) -> list[Tensor]:
    """Return what all samples share: scales, the bias, and the curvature."""
    scale = embeddings.logit_scale
    scales = [*scale.values()] if isinstance(scale, dict) else [scale]
    return scales + [tensor for tensor in (embeddings.logit_bias, embeddings.curvature) if tensor is not None]


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Keep gradients on their ranks within it; those of weights in shards only where they are reduced once a step."""
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
    """Return the names of the batch norms, whose output depends on the other samples of a micro-batch."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def with_statistics(model: nn.Module) -> list[Any]:
    """Return the modules that keep running statistics of their inputs: batch norms and the like."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "running_var", None), Tensor) and hasattr(module, "momentum")
    ]


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Let batch norms leave their running statistics unchanged within it, so that a second forward does not count twice."""
    norms = [module for module in with_statistics(model) if module.training]
    before = [{name: getattr(module, name) for name in FIXED_STATISTICS if hasattr(module, name)} for module in norms]
    for module, values in zip(norms, before, strict=True):
        for name in values:
            setattr(module, name, FIXED_STATISTICS[name])
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
