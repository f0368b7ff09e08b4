"""Measures the loss and its peers, as benchmarks/contrastive_loss.py does, at every size that fits: the cheapest first."""

import itertools
import os
import statistics
from typing import Any

import losses
import torch
from contrastive_loss import errors

from gpu_parts.results import Record, Results
from gpu_parts.runner import Context, Missing, Skip
from gpu_parts.summary import markdown

SIZES = {"cuda": [8192, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576], "cpu": [48]}
WIDTHS = {"cuda": [512, 768, 1152], "cpu": [16]}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}  # the interpreter has no bf16
SAMPLE = {"cuda": 4096, "cpu": 48}  # rows at which errors are found
LONGEST = 40  # seconds of one run
ALL_IN = {"cuda": 1.5, "cpu": 0}  # seconds that the runs of one measurement take together, if one run does not take longer
OURS = "ours"
STOPPED = ("failed", "out of memory", "died", "timed out", "skipped")


def run(context: Context) -> None:
    context.measure("product rate", lambda: rates(context.device))
    peers = [name for name in losses.PEERS if peer_is_here(context, name)]
    sizes = itertools.product(SIZES[context.device], WIDTHS[context.device], losses.FORMS)
    for n, width, objective in sorted(sizes, key=lambda size: operations(*size)):
        for name in [OURS, *(name for name in peers if losses.PEERS[name][0] == objective)]:
            measure(context, objective, name, n, width)


def rates(device: str) -> dict[str, Any]:
    """Return the operations a second of products [16384, D] · [D, 16384] with results in the inputs' dtype, by D."""
    widths = [*WIDTHS[device], *([8192] if device == "cuda" else [])]
    return {str(width): losses.product_rate(width, DTYPE[device], device) for width in widths}


def peer_is_here(context: Context, name: str) -> bool:
    """Return whether a peer is installed and computes what ours does; it is checked once, not at every size."""
    if not name.startswith(("open_clip", *losses.ON_GPUS)):
        return False

    def check_peer() -> dict[str, Any]:
        loss = losses.load(name)
        if isinstance(loss, str):
            raise Missing(loss)
        if context.device == "cpu" and name.startswith(losses.ON_GPUS):
            raise Skip("its kernels run on GPUs alone")
        return {}

    context.measure(name, check_peer)
    return context.values(name) is not None


def operations(n: int, width: int, objective: str) -> int:
    """Return the operations of the products that ours needs: scores twice, and the gradients of both sides."""
    if objective == "matryoshka":
        return sum(8 * n**2 * prefix for prefix in losses.prefixes(width))
    return (6 if objective == "lit" else 8) * n**2 * width


def measure(context: Context, objective: str, name: str, n: int, width: int) -> None:
    """Measure one size of one loss, if by the measurements of smaller ones it fits."""
    smaller = [size for size in SIZES[context.device] if size < n]
    states = [context.results.state("loss", key_of(objective, name, size, width)) for size in smaller]
    values_of_sizes = [(size, context.values(key_of(objective, name, size, width))) for size in smaller]
    smaller_figures = [(size, values) for size, values in values_of_sizes if values is not None]
    ours_now = context.values(key_of(objective, OURS, n, width)) or {"seconds": 0.0}
    seconds, peak = forecast(smaller_figures, n)

    def measured_values() -> dict[str, Any]:
        for size, state in zip(smaller, states, strict=True):
            if state in STOPPED:
                raise Skip(f"{state} at N = {size:,}")
        if seconds > LONGEST:
            raise Skip(f"a run would take about {seconds:.0f} s")
        needed = peak + n * width * 20  # inputs, and what making them takes
        if needed > 0.92 * free_memory(context.device):
            raise Skip(f"it would take about {needed / 2**30:,.0f} GiB")
        return figures(context.device, objective, name, n, width, first=not smaller_figures)

    runs = seconds + ours_now["seconds"]
    context.measure(key_of(objective, name, n, width), measured_values, limit=60 + 4 * runs, expected=2 + 3 * runs)


def key_of(objective: str, name: str, n: int, width: int) -> str:
    return f"{objective} D={width} N={n}: {name}"


def forecast(smaller_figures: list[tuple[int, dict[str, Any]]], n: int) -> tuple[float, float]:
    """Predict (seconds of a run, bytes above the inputs) at N = n: time as N², memory as it grew, or as N² after one size."""
    if not smaller_figures:
        return 0.0, 0.0
    last, values = smaller_figures[-1]
    power = 2.0
    if len(smaller_figures) > 1:
        size, earlier = smaller_figures[-2]
        power = torch.log(torch.tensor(max(values["bytes"], 1) / max(earlier["bytes"], 1))).item()
        power = min(max(power / torch.log(torch.tensor(last / size)).item(), 1.0), 2.0)
    return values["seconds"] * (n / last) ** 2, values["bytes"] * (n / last) ** power


def free_memory(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def figures(device: str, objective: str, name: str, n: int, width: int, first: bool) -> dict[str, Any]:
    """Return median seconds, peak bytes and the value; of a peer also the ratio of pairs with ours."""
    dtype = DTYPE[device]
    our_loss = losses.FORMS[objective]("triton")
    loss = our_loss if name == OURS else losses.load(name)
    assert not isinstance(loss, str)
    result: dict[str, Any] = {"objective": objective, "name": name, "n": n, "width": width}
    if first:
        result["errors"] = errors(loss, objective, width, dtype, device, SAMPLE[device])
    result["bytes"] = losses.peak_above_inputs(loss, n, width, dtype, device)  # and a warm-up
    leaves = losses.inputs(n, width, dtype, device)
    with torch.no_grad():
        result["value"] = loss(*leaves).item()
    sides = [our_loss] if name == OURS else [our_loss, loss]
    times = [[losses.run(side, leaves) for side in sides]]
    runs = min(20, int(ALL_IN[device] / sum(times[0])))
    if runs:
        times = [[losses.run(side, leaves) for side in sides] for _ in range(runs)]  # the first may have been slower
    result["seconds"] = statistics.median(pair[-1] for pair in times)
    result["runs"] = len(times)
    if name != OURS:
        result["ratio"] = statistics.median(pair[0] / pair[1] for pair in times)
    return result


def table(records: list[Record], results: Results) -> str:
    """Return the table of every size, ours first, then its peers; shares count the same operations for all."""
    rate = results.records.get(("loss", "product rate"), {}).get("values", {})
    figures_of_all = [record["values"] for record in records if "objective" in record["values"]]
    order = list(losses.FORMS)
    figures_of_all.sort(key=lambda v: (order.index(v["objective"]), v["width"], v["n"], v["name"] != OURS))
    errors_of = {(v["objective"], v["width"], v["name"]): v["errors"] for v in figures_of_all if "errors" in v}
    values = {(v["objective"], v["width"], v["n"]): v["value"] for v in figures_of_all if v["name"] == OURS}
    rows = []
    for v in figures_of_all:
        share = operations(v["n"], v["width"], v["objective"]) / v["seconds"] / rate[str(v["width"])] if rate else float("nan")
        mistakes = errors_of.get((v["objective"], v["width"], v["name"]))
        our_value = values.get((v["objective"], v["width"], v["n"]))
        difference = f"{abs(v['value'] / our_value - 1):.0e}" if v["name"] != OURS and our_value else ""
        rows.append(
            [
                v["objective"], str(v["width"]), f"{v['n']:,}", v["name"], f"{v['seconds'] * 1e3:,.2f}", f"{share:.0%}",
                f"{v['bytes'] / 2**20:,.0f}", f"{v['ratio']:.2f}" if "ratio" in v else "",
                f"{mistakes[0]:.0e}, {mistakes[1]:.0e}" if mistakes else "", difference,
            ]
        )  # fmt: skip
    head = ["loss", "D", "N", "", "ms", "of the product rate", "MiB above inputs", "ours / it", "errors", "from ours"]
    speeds = ", ".join(f"{width}: {speed / 1e12:,.1f} TFLOP/s" for width, speed in rate.items())
    description = (
        f"Products of inner width D: {speeds}. Forward and backward; the share counts the products that ours computes (8·N²·D;"
        " with a locked tower 6·N²·D) for every loss. Errors of the loss and of a gradient are relative, against float64, at"
        f" N = {SAMPLE[results.device]:,}; `from ours`: how far the values at N lie apart. memeff has no gradient of the scale."
    )
    return f"{description}\n\n{markdown(head, rows)}"
