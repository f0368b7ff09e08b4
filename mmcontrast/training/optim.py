"""The optimizer and its groups, freezing, the moving average of the weights, and the learning rate schedule."""

import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.models import ContrastiveModel, Tower
from mmcontrast.training.options import TrainOptions

TABLES = {"pos", "position", "positions", "positional", "rel", "relative", "distance", "wpe", "bias", "biases"}
TOKENS = {"cls", "class", "token", "tokens"}  # words in the names of parameters


def make_optimizer(model: ContrastiveModel, options: TrainOptions) -> torch.optim.Optimizer:
    """Return the optimizer that the options name. Weight decay leaves alone what `not_decaying` returns. The schedule scales a
    group's `peak_lr`: its tower's, times the tower's layer decay for every layer above (as in BEiT, arXiv:2106.08254).

    Raises:
        UserError: if `tower_lr` or `layer_decay` name no tower of the model, an optimizer is unknown, or lacks an option.
    """
    for option in ("tower_lr", "layer_decay"):
        for name in getattr(options, option).keys() - model.towers.keys():
            raise UserError(f"train.{option}: no tower {name!r}; there is {', '.join(model.towers)}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    heights = {name: layers_above(model.tower(name)) for name in model.towers}
    without_decay = not_decaying(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind, _, rest = name.partition(".")
            tower, _, inner = rest.partition(".") if kind in ("towers", "projections") else ("", "", "")
            lr = options.tower_lr.get(tower, options.lr)
            decay = 0.0 if name in without_decay else options.weight_decay
            if kind == "towers" and tower in options.layer_decay:
                lr *= options.layer_decay[tower] ** heights[tower][inner]
            groups.setdefault((lr, decay), []).append(parameter)
    param_groups: list[dict[str, Any]] = [
        {"params": group, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()
    ]
    if not param_groups:
        raise UserError("train.freeze leaves nothing to learn")
    if options.optimizer == "adamw":
        return torch.optim.AdamW(param_groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
    settings: dict[str, Any] = {"type": options.optimizer} if isinstance(options.optimizer, str) else dict(options.optimizer)
    kind = str(settings.pop("type", "adamw"))
    for name in {"lr", "weight_decay"} & settings.keys():
        raise UserError(f"train.optimizer.{name}: set train.{name}, which all groups of weights take it from")
    if kind == "adamw":
        settings = {"betas": options.betas, "eps": options.eps, **settings}
    import timm.optim

    if kind not in timm.optim.list_optimizers():
        raise UserError(f"train.optimizer: no {kind!r}; {suggestion(kind, map(str, timm.optim.list_optimizers()))}")
    try:
        return timm.optim.create_optimizer_v2(param_groups, opt=kind, lr=options.lr, **settings)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise UserError(f"train.optimizer {kind}: {error}") from error


def not_decaying(model: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay leaves alone: vectors and scalars (biases, norms, layer scales,
    single tokens, the logit scale and bias), tables of positions and of biases, tokens, and what networks name in
    `no_weight_decay()`."""
    excluded: set[str] = set()
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False):
            label = prefix.rpartition(".")[2] if isinstance(module, nn.Embedding) else name
            words = set(re.findall("[a-z]+", label.lower()))
            table = words & TABLES or (words & TOKENS and not isinstance(module, nn.Embedding))  # a vocabulary decays
            if sum(size > 1 for size in parameter.shape) < 2 or table:
                excluded.add(start + name)
        if callable(patterns := getattr(module, "no_weight_decay", None)):
            inner = [name for name, _ in module.named_parameters()]
            excluded |= {start + name for pattern in patterns() for name in inner if fnmatchcase(name, pattern)}
    return excluded


def layers_above(tower: Tower) -> dict[str, int]:
    """Return how many layers are above each parameter: 0 for what follows the last block, most for what precedes the first."""
    names, blocks = [name for name, _ in tower.named_parameters()], list(tower.blocks())
    layer_of = [next((block for block in blocks if name.startswith(f"{block}.")), "") for name in names]
    last = max((k for k, block in enumerate(layer_of) if block), default=-1)
    layers: list[str] = []  # the blocks, and modules between two of them, such as a downsampling
    for k, block in enumerate(layer_of):
        layer = block or (f"before {next(filter(None, layer_of[k:]))}" if layers and k < last else "")
        if layer and layer not in layers:
            layers.append(layer)
        layer_of[k] = layer
    heights = {layer: len(layers) - k for k, layer in enumerate(layers)}
    first = next((k for k, layer in enumerate(layer_of) if layer), len(names))
    return {name: heights.get(layer_of[k], 0 if first < k else len(layers) + 1) for k, name in enumerate(names)}


def freeze(model: ContrastiveModel, patterns: Mapping[str, int | None]) -> dict[str, int]:
    """Lock the weights whose names match a pattern, for good or until a step. Modules that are locked for good stay in
    evaluation mode: no dropout, fixed batch norms (LiT, arXiv:2111.07991). Weights that a model has locked itself, such as
    those under low-rank updates, stay locked.

    Returns:
        the step until which weights are locked, by their names.

    Raises:
        UserError: for a pattern that matches nothing.
    """
    parameters = dict(model.named_parameters())
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    locked_until: dict[str, int] = {}
    for pattern, step in patterns.items():
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(f"train.freeze: no weights match {pattern!r}; {suggestion(pattern, parameters)}")
        for name in trainable.intersection(matching):
            parameters[name].requires_grad_(step is not None)
            if step is not None:
                locked_until[name] = step
    model.locked = [module for module in model.modules() if module is not model and _is_locked(module)]
    model.train(model.training)
    return locked_until


def _is_locked(module: nn.Module) -> bool:
    """Return whether a module has parameters, none of which is trainable."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, momentum: float) -> None:
    """Set averaged ← momentum · averaged + (1 − momentum) · model, and copy running statistics."""
    for module in (*averaged.modules(), *model.modules()):
        if callable(reshard := getattr(module, "reshard", None)):  # in shards
            reshard()  # a forward without a backward leaves whole weights behind
    for average, weight in zip(averaged.parameters(), model.parameters(), strict=True):
        average.lerp_(weight.detach(), 1 - momentum)
    for copied, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
        copied.copy_(buffer)


def schedule(step: int, options: TrainOptions) -> float:
    """Return the share of its peak that a learning rate has at optimizer step `step`, from 0: linear warm-up, then the
    schedule's decay to `final_lr_share` after the last step. "wsd" stays at the peak and falls linearly in the last
    `decay_share` of the steps (warm-up–stable–decay, arXiv:2404.06395)."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.total_steps - options.warmup_steps)
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
        "wsd": min(1.0, (options.total_steps - step) / max(1.0, options.decay_share * options.total_steps)),
    }[options.schedule]
    return options.final_lr_share + (1 - options.final_lr_share) * remaining
