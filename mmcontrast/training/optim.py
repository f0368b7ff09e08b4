"""AdamW with the usual groups, and the learning rate as a function of the step."""

import math

import torch

from mmcontrast.errors import UserError
from mmcontrast.model import ContrastiveModel
from mmcontrast.training.options import TrainOptions


def make_optimizer(model: ContrastiveModel, options: TrainOptions) -> torch.optim.AdamW:
    """Matrices decay; vectors and scalars (biases, norms, the logit scale and bias) do not. A group's `peak_lr` is what
    the schedule scales.

    Raises:
        UserError: if `tower_lr` names no tower of the model.
    """
    for name in options.tower_lr.keys() - model.towers.keys():
        raise UserError(f"train.tower_lr: no tower {name!r}; there is {', '.join(model.towers)}")
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = name.split(".")[1] if name.startswith(("towers.", "projections.")) else ""
            decay = options.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((options.tower_lr.get(tower, options.lr), decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()],
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )


def schedule(step: int, options: TrainOptions) -> float:
    """The share of its peak that a learning rate has at optimizer step number `step`, from 0: linear warm-up, then a
    cosine that reaches 0 after the last step."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
