"""Measures the samples a second that this machine's cores decode, against those that a training step takes."""

import itertools
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_parts import step
from gpu_parts.results import Record, Results
from gpu_parts.runner import Context
from gpu_parts.summary import markdown

PICTURES = {"cuda": ((640, 480), 32), "cpu": ((64, 48), 8)}  # width and height, and samples of a shard
SIDE = {"cuda": 224, "cpu": 32}
TIMED = {"cuda": 40, "cpu": 4}  # batches


def run(context: Context) -> None:
    cores = len(os.sched_getaffinity(0)) if context.device == "cuda" else 1
    for workers, scaled in itertools.product(dict.fromkeys([cores, max(1, cores // 2), 1]), (False, True)):
        key = f"{workers} workers{', scaled decode' if scaled else ''}"
        context.measure(key, partial(figures, context, workers, scaled), limit=60, expected=8)


def figures(context: Context, workers: int, scaled: bool) -> dict[str, Any]:
    from reading import BATCH, batches

    from mmcontrast.cli import keep_freed_memory
    from mmcontrast.modalities import ImageModality

    keep_freed_memory()  # as the `mmcontrast` command does
    torch.set_num_threads(1)
    image = ImageModality(SIDE[context.device], scaled_decode=scaled)
    stream = batches(str(shards(context) / "*.tar"), workers, image)
    for _ in range(6 + 2 * workers):  # what workers have prepared meanwhile does not count
        next(stream)
    timed = max(TIMED[context.device], (6 if context.device == "cuda" else 1) * workers)
    start = time.perf_counter()
    for _ in range(timed):
        next(stream)
    return {"workers": workers, "scaled": scaled, "rate": timed * BATCH / (time.perf_counter() - start)}


def shards(context: Context) -> Path:
    from reading import make

    (width, height), samples = PICTURES[context.device]
    folder, complete_mark = context.scratch / "shards", context.scratch / "shards" / "whole"
    if not complete_mark.exists():
        make(folder, width, height, samples)
        complete_mark.touch()
    return folder


def table(records: list[Record], results: Results) -> str:
    rows = []
    steps = step.rates([record for record in results.of("step") if record["state"] == "done"])
    fastest = max((rate for (_, side), rate in steps.items() if side == "ours"), default=None)
    for values in (record["values"] for record in records):
        share = f"{values['rate'] / fastest:.2f}" if fastest else ""
        size = "scaled" if values["scaled"] else "whole"
        rows.append([str(values["workers"]), size, f"{values['rate']:,.0f}", share])
    head = ["workers", "decoding", "samples/s", "of what our fastest step of ViT-B/32 takes"]
    (width, height), _ = PICTURES[results.device]
    description = f"JPEGs of {width}×{height} to training crops, and captions to tokens; normalised later, on the card."
    return f"{description}\n\n{markdown(head, rows)}"
