"""Measures exact retrieval metrics in both directions on the card: ours and the dense versions of benchmarks/retrieval.py."""

import statistics
import time
from functools import partial
from typing import Any

import retrieval
import torch
from losses import wait

from gpu_parts.results import Record, Results
from gpu_parts.runner import Context
from gpu_parts.summary import markdown

SIZES = {"cuda": [50_000, 200_000, 1_000_000], "cpu": [300]}
WIDTH = {"cuda": 256, "cpu": 16}
CONTENDERS = ("ours", "counting", "topk")


def run(context: Context) -> None:
    for n in SIZES[context.device]:
        for contender in CONTENDERS:
            smaller = [context.values(f"{contender} {size}") for size in SIZES[context.device] if size < n]
            last = smaller[-1] if smaller else None
            expected = last["seconds"] * (n / last["n"]) ** 2 if last else 1.0
            figure = partial(figures, context, contender, n, expected)
            context.measure(f"{contender} {n}", figure, limit=60 + 3 * expected, expected=2 + 1.5 * expected)


def figures(context: Context, contender: str, n: int, expected: float) -> dict[str, Any]:
    function = getattr(retrieval, contender)
    first, second = (rows.to(context.device) for rows in retrieval.inputs(n, WIDTH[context.device]))
    function(first[:64], second[:64])  # imports, and the libraries' first use
    if context.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if context.device == "cuda" else 0
    times = []
    for _ in range(3 if expected < 3 else 1):
        wait(first)
        start = time.perf_counter()
        recalls = function(first, second)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before if context.device == "cuda" else 0
    ours = context.values(f"ours {n}")
    if ours:  # near ties may fall either way where products are rounded otherwise
        for way, values in recalls.items():
            difference = max(abs(a - b) for a, b in zip(values, ours["recalls"][way], strict=True))
            if difference > max(3 / n, 5e-4):
                raise ValueError(f"recall {values}, where ours is {ours['recalls'][way]}")
    return {"n": n, "name": contender, "seconds": statistics.median(times), "bytes": peak, "recalls": recalls}


def table(records: list[Record], results: Results) -> str:
    figures_of_all = [record["values"] for record in records]
    ours = {v["n"]: v["seconds"] for v in figures_of_all if v["name"] == "ours"}
    rows = []
    for v in figures_of_all:
        ratio = f"{ours[v['n']] / v['seconds']:.2f}" if v["n"] in ours and v["name"] != "ours" else ""
        recall = ", ".join(f"{value:.4f}" for value in v["recalls"]["there"])
        rows.append([f"{v['n']:,}", v["name"], f"{v['seconds']:.3f}", f"{v['bytes'] / 2**20:,.0f}", ratio, recall])
    head = ["N × N", "", "s", "MiB above the embeddings", "ours / it", "recall at 1, 5, 10"]
    return f"Width {WIDTH[results.device]}, fp32; all must give the same recall.\n\n{markdown(head, rows)}"
