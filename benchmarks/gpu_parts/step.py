"""Measures training steps of ViT-B/32 in bf16: ours by `training_step`, open_clip's by `train_one_epoch`, on equal towers."""

import gc
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from losses import wait
from training import CASES

from gpu_parts.results import Record, Results
from gpu_parts.runner import Context
from gpu_parts.summary import markdown

T = TypeVar("T")
BATCHES = {"cuda": [512, 1024, 2048], "cpu": [4]}
WARM, TIMED = {"cuda": 4, "cpu": 1}, {"cuda": 12, "cpu": 1}
PAIRS = {"cuda": 3, "cpu": 1}
MODEL = {"cuda": "ViT-B-32", "cpu": "measured"}
LR = 1e-4
VOCABULARY = 49_408


def run(context: Context) -> None:
    from open_clip import add_model_config

    if context.device == "cpu":
        file = context.scratch / "measured.json"
        file.write_text(json.dumps(CASES["loss"].model))
        add_model_config(file)
    for batch in BATCHES[context.device]:
        for pair in range(1, PAIRS[context.device] + 1):
            for side in SIDES:
                function = partial(figures, context.device, side, batch)
                context.measure(f"batch {batch}, run {pair}: {side}", function, limit=60, expected=8)


@dataclass
class Run:
    """A run of so many steps on one batch of random pictures and texts, which lies in pinned memory as a loader gives it."""

    device: str
    batch: int

    def __post_init__(self) -> None:
        config = open_clip_config(self.device)
        self.size, self.length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.randint(256, (self.batch, 3, self.size, self.size), dtype=torch.uint8, generator=generator)
        self.texts = torch.randint(1, VOCABULARY - 2, (self.batch, self.length), generator=generator)
        self.texts[:, -1] = VOCABULARY - 1  # the token at whose place open_clip's text towers give a text's features
        self.steps, self.seconds = WARM[self.device] + TIMED[self.device], 0.0

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self.device == "cuda" else tensor

    def timed(self, batch: T) -> Iterator[T]:
        """Yield the batch for every step. The clock runs from the first step after the warm-up to the end of the last."""
        for step in range(self.steps):
            if step == WARM[self.device]:
                wait(self.pictures.new_empty(0, device=self.device))
                start = time.perf_counter()
            yield batch
        wait(self.pictures.new_empty(0, device=self.device))
        self.seconds = time.perf_counter() - start


def open_clip_config(device: str) -> dict[str, Any]:
    import open_clip

    return open_clip.get_model_config(MODEL[device])


def ours(run: Run) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from training import bare_tower

    from mmcontrast.modalities import ImageModality, TextModality
    from mmcontrast.models import ContrastiveModel
    from mmcontrast.objectives import InfoNCE
    from mmcontrast.objectives.names import PAIRINGS
    from mmcontrast.training.optim import make_optimizer
    from mmcontrast.training.options import TrainOptions
    from mmcontrast.training.step import Learner, training_step
    from mmcontrast.types import Batch

    towers = {part: bare_tower(MODEL[run.device], part) for part in ("image", "text")}
    modalities = {"image": ImageModality(run.size), "text": TextModality(context_length=run.length)}
    width = open_clip_config(run.device)["embed_dim"]
    model = ContrastiveModel(modalities, towers, {part: part for part in towers}, width)
    options = TrainOptions(steps=10**6, batch_size=run.batch, lr=LR, precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)  # of a process that this one was forked from
    accelerator = Accelerator(mixed_precision="bf16", cpu=run.device == "cpu")
    learner = Learner(
        accelerator.prepare_model(model), InfoNCE(), PAIRINGS["all_pairs"](),
        accelerator.prepare_optimizer(make_optimizer(model, options)), accelerator, options, {},
    )  # fmt: skip
    values = {"image": run.pinned(run.pictures), "text": run.pinned(run.texts)}
    numbers, present = torch.arange(run.batch), torch.ones(run.batch, dtype=torch.bool)
    batch = Batch(values, dict.fromkeys(values, present), numbers, numbers, [{}] * run.batch)
    learner.model.train()
    for step, samples in enumerate(run.timed(batch)):
        training_step(step, samples, learner)


def open_clip(run: Run) -> None:
    """Train by open_clip's loop. Its loader normalises on the host; weight decay, clipping and bf16 are as in its `main`."""
    from open_clip import create_loss, create_model
    from open_clip_train.train import train_one_epoch

    model = create_model(MODEL[run.device], precision="amp_bf16", device=run.device, output_dict=True)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    not_decayed = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": not_decayed, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    options = Namespace(
        device=run.device, precision="amp_bf16", distill=False, model=MODEL[run.device], siglip=False, local_loss=False,
        gather_with_grad=False, rank=0, local_rank=0, world_size=1, horovod=False, distributed=False, accum_freq=1,
        skip_scheduler=True, grad_clip_norm=1.0, log_every_n_steps=10**6, log_local=False, wandb=False, batch_size=run.batch,
    )  # fmt: skip
    pictures = run.pinned((run.pictures.float() / 255 - 0.45) / 0.27)
    loader = Loader(run.timed((pictures, run.pinned(run.texts))), run.steps, run.steps * run.batch)
    data = {"train": Namespace(dataloader=loader, set_epoch=lambda epoch: None)}
    train_one_epoch(model, data, create_loss(options), 0, optimizer, None, None, None, options)


class Loader:
    """Batches with the two numbers that `train_one_epoch` asks of a loader."""

    def __init__(self, batches: Iterator[Any], num_batches: int, num_samples: int) -> None:
        self.batches, self.num_batches, self.num_samples = batches, num_batches, num_samples

    def __iter__(self) -> Iterator[Any]:
        return self.batches


SIDES: dict[str, Callable[[Run], None]] = {"ours": ours, "open_clip": open_clip}


def figures(device: str, side: str, batch: int) -> dict[str, Any]:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = Run(device, batch)
    SIDES[side](run)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"side": side, "batch": batch, "rate": TIMED[device] * batch / run.seconds, "bytes": peak}


def rates(records: list[Record]) -> dict[tuple[int, str], float]:
    """Return the median samples a second, by batch and side."""
    rates_of: dict[tuple[int, str], list[float]] = {}
    for record in records:
        values = record["values"]
        rates_of.setdefault((values["batch"], values["side"]), []).append(values["rate"])
    return {key: statistics.median(values) for key, values in rates_of.items()}


def table(records: list[Record], results: Results) -> str:
    medians = rates(records)
    rows = []
    for batch in sorted({batch for batch, _ in medians}):
        cells = [f"{batch:,}"]
        for side in SIDES:
            peaks = [r["values"]["bytes"] for r in records if (r["values"]["batch"], r["values"]["side"]) == (batch, side)]
            is_measured = (batch, side) in medians
            cells += [f"{medians[batch, side]:,.0f}", f"{max(peaks) / 2**30:.1f}"] if is_measured else ["–", "–"]
        both = all((batch, side) in medians for side in SIDES)
        rows.append([*cells, f"{medians[batch, 'ours'] / medians[batch, 'open_clip']:.2f}" if both else ""])
    head = ["batch", *(f"{side}, {what}" for side in SIDES for what in ("samples/s", "GiB")), "ours / open_clip"]
    what = f"{MODEL[results.device]}: copy to the device, forward, loss, backward, clipping and AdamW, in bf16."
    return f"{what}\n\n{markdown(head, rows)}"
