"""AdamW with the usual groups, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from mmcontrast.training.options import TrainOptions


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """Matrices decay; vectors and scalars (biases, norms, the logit scale and bias) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def learning_rate(step: int, options: TrainOptions) -> float:
    """At the optimizer step number `step`, from 0: linear warm-up, then a cosine that reaches 0 after the last step."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))
