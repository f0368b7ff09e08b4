"""One optimizer step: forward, loss over all ranks, backward, the check that all is finite, update."""

import math
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from mmcontrast.errors import UserError
from mmcontrast.objectives import Objective, Pairing, contrastive_loss
from mmcontrast.objectives.pairing import term_name
from mmcontrast.training.optim import schedule
from mmcontrast.training.options import TrainOptions
from mmcontrast.types import Batch


class TrainingStopped(UserError):
    """Training cannot go on: the loss or the gradients are not finite. Raised before the weights change."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout and the like are a function of (seed, step, rank), so a resumed run needs no generator's state."""
    value = hash((seed, step, rank)) & (2**63 - 1)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)


def training_step(
    step: int,
    batch: Batch,
    model: nn.Module,
    objective: Objective,
    pairing: Pairing,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    options: TrainOptions,
    watch: bool = False,
) -> dict[str, Any]:
    """Trains on one batch and returns what there is to log; with `watch` also the signals of the objective.

    Raises:
        TrainingStopped: on every rank, if the loss or the gradient norm of any is not finite; nothing was updated.
    """
    seed_step(options.seed, step, accelerator.process_index)
    share = schedule(step, options)
    lr = options.lr * share
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share

    signals: dict[str, torch.Tensor] = {}
    embeddings = model(batch)
    loss = contrastive_loss(
        embeddings.fields,
        objective=objective,
        pairing=pairing,
        logit_scale=embeddings.logit_scale,
        logit_bias=embeddings.logit_bias,
        ids=batch.ids,
        sample_ids=batch.sample_ids,
        group=dist.group.WORLD if accelerator.num_processes > 1 else None,
        signals=signals if watch else None,
    )
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), options.clip_grad_norm or math.inf)

    value = float(accelerator.reduce(loss.detach(), "mean"))
    # with fp16 an overflowing gradient is the scaler's business: it skips the step and lowers the scale
    if not math.isfinite(value) or (options.precision != "fp16" and not math.isfinite(float(norm))):
        raise TrainingStopped(
            f"step {step + 1}: the loss is {value}, the gradient norm {float(norm)}: stopped before the update. Samples of"
            f" rank {accelerator.process_index}: {batch.sample_ids.tolist()[:8]}…; lower train.lr or look at the samples,"
            " then continue from the last checkpoint with --resume"
        )
    optimizer.step()
    optimizer.zero_grad()
    accelerator.unwrap_model(model).clamp_logit_scale()
    scale = embeddings.logit_scale
    per_pair = scale if isinstance(scale, dict) else {}
    scales = torch.stack([*per_pair.values()] or [scale]).detach()
    values = {"loss": value, "lr": lr, "logit_scale": float(scales.mean()), "grad_norm": float(norm)}
    values |= {f"logit_scale/{term_name(pair)}": s for pair, s in zip(per_pair, scales.tolist(), strict=False)}
    if signals:
        seen = accelerator.reduce(torch.stack([s.float() for s in signals.values()]), "mean")
        values |= {f"signals/{name}": number for name, number in zip(signals, seen.tolist(), strict=True)}
    return values
