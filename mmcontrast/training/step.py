"""One optimizer step: forward, loss over all ranks, backward, the check that loss and gradients are finite, update."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from mmcontrast.errors import TrainingStopped
from mmcontrast.models import ContrastiveModel, Embeddings
from mmcontrast.objectives import Hyperbolic, Objective, Pairing, contrastive_loss
from mmcontrast.objectives.inputs import NO_GROUP
from mmcontrast.objectives.pairing import term_name
from mmcontrast.training.bridging import bridge_loss
from mmcontrast.training.grad_cache import cached_backward, no_sync
from mmcontrast.training.optim import schedule, update_average
from mmcontrast.training.options import BridgeLossOptions, TrainOptions
from mmcontrast.training.parallel import batches_counted, full_tensor, same_statistics
from mmcontrast.training.progressive import apply_schedules
from mmcontrast.training.queue import MomentumQueue
from mmcontrast.training.teachers import Teacher
from mmcontrast.types import Batch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch by (seed, step, rank), of which dropout is a function then: a resumed run needs no generator's state."""
    value = hash((seed, step, rank)) & (2**63 - 1)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)


@dataclass
class Learner:
    """A run's model (as accelerate prepared it), and all that a step trains it with: objective, optimizer, negatives.

    Attributes:
        negative_of: fields that only provide negatives, and for which field.
        queue: past embeddings as further negatives, or None.
        averaged: the moving average of the model, or None.
        locked_until: the step until which weights are locked, by their names.
        teachers: models to learn from, each of which has a view of every batch.
        own_negatives: those of `negative_of` that are candidates of their own sample's anchors alone.
        score: of a hyperbolic model; its curvature is the model's.
        step: the current one.
    """

    model: nn.Module
    objective: Objective
    pairing: Pairing
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    options: TrainOptions
    negative_of: Mapping[str, str]
    queue: MomentumQueue | None = None
    averaged: ContrastiveModel | None = None
    locked_until: dict[str, int] = dataclasses.field(default_factory=dict)
    teachers: Sequence[Teacher] = ()
    own_negatives: frozenset[str] = frozenset()
    score: Hyperbolic | None = None
    step: int = 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Return the group of all ranks; None: this process is alone."""
        return dist.group.WORLD if self.accelerator.num_processes > 1 else None

    def teacher_embeddings(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Return each teacher's embeddings of a batch, computed in micro-batches and kept."""
        size, device = self.options.micro_batch_size or len(batch), self.accelerator.device
        with self.accelerator.autocast():
            return [teacher.embed(view, size, device) for teacher, view in zip(self.teachers, batch.views, strict=True)]

    def loss(
        self,
        embeddings: Embeddings,
        labels: Batch,
        signals: dict[str, Tensor] | None = None,
        teacher_embeddings: Sequence[dict[str, Tensor]] = (),
    ) -> Tensor:
        """Return the loss of some samples' embeddings, over all ranks.

        Args:
            labels: their batch without values, on the host, where looking at it waits for no device.
            signals: receives the signals of the objective.
            teacher_embeddings: of the same samples, one mapping per teacher.
        """
        extra = self.queue.negatives(self.accelerator.process_index, self.accelerator.num_processes) if self.queue else {}
        own: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for field, target in self.negative_of.items():
            rows, present = embeddings.fields[field], labels.present[field]
            if field in self.own_negatives:
                own.setdefault(target, []).append((rows, present.to(rows.device, non_blocking=True)))
                continue
            row_index = present.nonzero().squeeze(1)  # on the host, where the number of rows waits for no device
            rows = rows[row_index.to(rows.device, non_blocking=True)]
            group_ids = torch.full((len(rows),), NO_GROUP, device=rows.device)
            if target in extra:
                rows, group_ids = torch.cat([extra[target][0], rows]), torch.cat([extra[target][1], group_ids])
            extra[target] = rows, group_ids
        contrasted = {field: rows for field, rows in embeddings.fields.items() if field not in self.negative_of}
        loss = contrastive_loss(
            contrasted,
            objective=self.objective,
            pairing=self.pairing,
            logit_scale=embeddings.logit_scale,
            logit_bias=embeddings.logit_bias,
            ids={field: ids for field, ids in labels.ids.items() if field not in self.negative_of},
            sample_ids=labels.sample_ids,
            extra_negatives=extra,
            own_negatives={field: stack_candidates(candidates) for field, candidates in own.items()},
            sample_weights=labels.weights,
            matryoshka=self.options.matryoshka,
            teacher=teacher_embeddings or None,
            teacher_scale=[teacher.scale for teacher in self.teachers],
            score=None if embeddings.curvature is None else (self.score or Hyperbolic()).at(embeddings.curvature),
            group=self.group,
            communication=self.options.communication,
            signals=signals,
        )
        bridge = self.options.bridge
        if bridge is None or self.step < bridge.start:
            return loss
        return loss + bridge.weight * self.mean_bridge_loss(bridge, embeddings, labels, list(contrasted), signals)

    def mean_bridge_loss(
        self,
        bridge: BridgeLossOptions,
        embeddings: Embeddings,
        labels: Batch,
        fields: list[str],
        signals: dict[str, Tensor] | None,
    ) -> Tensor:
        """Return the mean loss of the pairs of fields that learn through a third one."""

        def rows_of(field: str) -> Tensor:
            """Return the embeddings of the samples that have a field."""
            row_index = labels.present[field].nonzero().squeeze(1)
            rows = embeddings.fields[field]
            return rows if len(row_index) == len(rows) else rows[row_index.to(rows.device, non_blocking=True)]

        bank = rows_of(bridge.through)
        losses: list[Tensor] = []
        for first, second in bridge.pairs_of(fields):
            scale = embeddings.logit_scale
            if isinstance(scale, dict):
                scale = next(value for pair, value in scale.items() if {*pair} == {first, second})
            bank_scale = bridge.scale or float(scale.detach())
            losses.append(
                bridge_loss(
                    rows_of(first), rows_of(second), bank, logit_scale=scale, bank_scale=bank_scale, group=self.group,
                    communication=self.options.communication,
                )
            )  # fmt: skip
            if signals is not None:
                signals[f"{first}-{second}/bridge"] = losses[-1].detach()
        return torch.stack(losses).mean()

    def backward(self, batch: Batch, share: float, last: bool, signals: dict[str, Tensor] | None) -> tuple[Tensor, Embeddings]:
        """Add the gradients of `share` times a part's loss; the `last` part of a step reduces them over the ranks."""
        device, labels, teacher_embeddings = self.accelerator.device, batch.labels(), self.teacher_embeddings(batch)
        batch = dataclasses.replace(batch, views=[])

        def loss_of(embeddings: Embeddings) -> Tensor:
            return self.loss(embeddings, labels, signals, teacher_embeddings) * share

        size, backward = self.options.micro_batch_size, self.accelerator.backward
        if size and size < self.options.batch_size // (self.accelerator.num_processes * self.options.accumulation_steps):
            return cached_backward(self.model, batch, size, loss_of, backward=backward, device=device, synchronise=last)
        with nullcontext() if last else no_sync(self.model):
            embeddings = self.model(batch.to(device))
            loss = loss_of(embeddings)
            self.accelerator.backward(loss)
        return loss.detach(), embeddings


def stack_candidates(candidates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return K times (rows [N, D], present [N]) as rows [N, K, D] and present [N, K]."""
    return torch.stack([rows for rows, _ in candidates], 1), torch.stack([present for _, present in candidates], 1)


def training_step(
    step: int, batch: Batch, learner: Learner, with_signals: bool = False, asked_to_end: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train on one batch.

    Args:
        step: from 0.
        with_signals: return the signals of the objective too.
        asked_to_end: returns whether this rank is asked to end; called after the backward.

    Returns:
        what there is to log; `bad_samples`: how many of the batch, on all ranks, could not be decoded; and, not to be logged,
        `asked_to_end`: whether any rank is asked to end.

    Raises:
        TrainingStopped: on every rank, if the loss or the gradient norm of any is not finite; nothing was updated.
    """
    options, accelerator, optimizer = learner.options, learner.accelerator, learner.optimizer
    seed_step(options.seed, step, accelerator.process_index)
    share = schedule(step, options)
    lr = options.lr * share
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    learner.objective.progress, learner.step = step / options.total_steps, step
    model = accelerator.unwrap_model(learner.model)
    apply_schedules(model, options, step)
    if learner.queue:
        apply_schedules(learner.queue.encoder, options, step)

    signals: dict[str, Tensor] | None = {} if with_signals else None
    loss = torch.zeros((), device=accelerator.device)
    parts, counted = batch.deal(options.accumulation_steps), batches_counted(model)
    for part in parts:
        last = part is parts[-1]
        part_loss, embeddings = learner.backward(part, 1 / len(parts), last, signals if last else None)
        loss += part_loss
    for name in [name for name, end in learner.locked_until.items() if step < end]:
        model.get_parameter(name).grad = None
    norm = full_tensor(accelerator.clip_grad_norm_(learner.model.parameters(), options.clip_grad_norm or math.inf))

    scale = embeddings.logit_scale
    scales = torch.stack([*scale.values()] if isinstance(scale, dict) else [scale]).detach()
    replaced = loss.new_full((), len(batch.replaced))  # filled on the device: a copy would wait
    asked = loss.new_full((), asked_to_end())
    means = accelerator.reduce(torch.stack([loss, replaced, asked, norm, *scales]), "mean").tolist()  # waits for the device
    value, replaced_mean, asked_share, grad_norm, *logit_scales = means
    # with fp16 the scaler handles an overflowing gradient: it skips the step and lowers the scale
    if not math.isfinite(value) or (options.precision != "fp16" and not math.isfinite(grad_norm)):
        error = TrainingStopped(
            f"step {step + 1}: the loss is {value}, the gradient norm {grad_norm}: stopped before the update; lower train.lr"
            " or look at the samples (stopped.json), then continue from the last checkpoint with --resume"
        )
        error.sample_ids = accelerator.gather(batch.sample_ids.to(accelerator.device)).tolist()
        raise error
    optimizer.step()
    optimizer.zero_grad()
    model.clamp_logit_scale()
    same_statistics(model, counted)
    if learner.averaged and options.ema_decay:
        update_average(learner.averaged, model, min(options.ema_decay, (1 + step) / (10 + step)))
    if learner.queue:
        learner.queue.update_encoder(model)
        with accelerator.autocast():
            learner.queue.push(batch, options.micro_batch_size, accelerator.device, learner.group)
    values = {"loss": value, "lr": lr, "logit_scale": sum(logit_scales) / len(logit_scales), "grad_norm": grad_norm}
    values |= {} if embeddings.curvature is None else {"curvature": float(embeddings.curvature.detach())}
    values |= {"bad_samples": round(replaced_mean * accelerator.num_processes), "asked_to_end": asked_share > 0}
    if isinstance(scale, dict):
        values |= {f"logit_scale/{term_name(pair)}": number for pair, number in zip(scale, logit_scales, strict=True)}
    if signals:
        signal_means = accelerator.reduce(torch.stack([signal.float() for signal in signals.values()]), "mean").tolist()
        values |= {f"signals/{name}": mean for name, mean in zip(signals, signal_means, strict=True)}
    return values
