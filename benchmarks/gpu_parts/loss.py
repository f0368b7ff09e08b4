"""The loss and its peers, as benchmarks/contrastive_loss.py measures them, at every size that fits: the cheapest first."""

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
    here = [name for name in losses.PEERS if peer_is_here(context, name)]
    sizes = itertools.product(SIZES[context.device], WIDTHS[context.device], losses.FORMS)
    for n, width, objective in sorted(sizes, key=lambda size: operations(*size)):
        for name in [OURS, *(name for name in here if losses.PEERS[name][0] == objective)]:
            measure(context, objective, name, n, width)


def rates(device: str) -> dict[str, Any]:
    """Operations a second of products [16384, D] · [D, 16384] with results in the inputs' dtype, by D."""
    widths = [*WIDTHS[device], *([8192] if device == "cuda" else [])]
    return {str(width): losses.product_rate(width, DTYPE[device], device) for width in widths}


def peer_is_here(context: Context, name: str) -> bool:
    """Asked once, not at every size. Of the peers in `losses`, those that compute what ours do."""
    if not name.startswith(("open_clip", *losses.ON_GPUS)):
        return False

    def look() -> dict[str, Any]:
        found = losses.load(name)
        if isinstance(found, str):
            raise Missing(found)
        if context.device == "cpu" and name.startswith(losses.ON_GPUS):
            raise Skip("its kernels run on GPUs alone")
        return {}

    context.measure(name, look)
    return context.values(name) is not None


def operations(n: int, width: int, objective: str) -> int:
    """Return the operations of the products that ours needs: scores twice, and the gradients of both sides."""
    if objective == "matryoshka":
        return sum(8 * n**2 * prefix for prefix in losses.prefixes(width))
    return (6 if objective == "lit" else 8) * n**2 * width


def measure(context: Context, objective: str, name: str, n: int, width: int) -> None:
    """One size of one loss, if what is known of smaller ones says that it fits."""
    smaller = [size for size in SIZES[context.device] if size < n]
    before = [context.results.state("loss", key_of(objective, name, size, width)) for size in smaller]
    measured = [(size, context.values(key_of(objective, name, size, width))) for size in smaller]
    known = [(size, values) for size, values in measured if values is not None]
    ours_now = context.values(key_of(objective, OURS, n, width)) or {"seconds": 0.0}
    seconds, peak = forecast(known, n)

    def measured_values() -> dict[str, Any]:
        for size, state in zip(smaller, before, strict=True):
            if state in STOPPED:
                raise Skip(f"{state} at N = {size:,}")
        if seconds > LONGEST:
            raise Skip(f"a run would take about {seconds:.0f} s")
        needed = peak + n * width * 20  # inputs, and what making them takes
        if needed > 0.92 * free_memory(context.device):
            raise Skip(f"it would take about {needed / 2**30:,.0f} GiB")
        return figures(context.device, objective, name, n, width, first=not known)

    runs = seconds + ours_now["seconds"]
    context.measure(key_of(objective, name, n, width), measured_values, limit=60 + 4 * runs, expected=2 + 3 * runs)


def key_of(objective: str, name: str, n: int, width: int) -> str:
    return f"{objective} D={width} N={n}: {name}"


def forecast(known: list[tuple[int, dict[str, Any]]], n: int) -> tuple[float, float]:
    """(seconds of a run, bytes above the inputs) at N = n: time as N², memory as it grew, or as N² after one size."""
    if not known:
        return 0.0, 0.0
    last, values = known[-1]
    power = 2.0
    if len(known) > 1:
        size, earlier = known[-2]
        power = torch.log(torch.tensor(max(values["bytes"], 1) / max(earlier["bytes"], 1))).item()
        power = min(max(power / torch.log(torch.tensor(last / size)).item(), 1.0), 2.0)
    return values["seconds"] * (n / last) ** 2, values["bytes"] * (n / last) ** power


def free_memory(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def figures(device: str, objective: str, name: str, n: int, width: int, first: bool) -> dict[str, Any]:
    """Median seconds, peak bytes and the value; of a peer also the ratio of pairs with ours."""
    dtype = DTYPE[device]
    mine = losses.FORMS[objective]("triton")
    loss = mine if name == OURS else losses.load(name)
    assert not isinstance(loss, str)
    found: dict[str, Any] = {"objective": objective, "name": name, "n": n, "width": width}
    if first:
        found["errors"] = errors(loss, objective, width, dtype, device, SAMPLE[device])
    found["bytes"] = losses.peak_above_inputs(loss, n, width, dtype, device)  # and a warm-up
    leaves = losses.inputs(n, width, dtype, device)
    with torch.no_grad():
        found["value"] = loss(*leaves).item()
    sides = [mine] if name == OURS else [mine, loss]
    times = [[losses.run(side, leaves) for side in sides]]
    more = min(20, int(ALL_IN[device] / sum(times[0])))
    if more:
        times = [[losses.run(side, leaves) for side in sides] for _ in range(more)]  # the first may have been slower
    found["seconds"] = statistics.median(pair[-1] for pair in times)
    found["runs"] = len(times)
    if name != OURS:
        found["ratio"] = statistics.median(pair[0] / pair[1] for pair in times)
    return found


def table(records: list[Record], results: Results) -> str:
    """Ours first, then its peers, of every size; shares count the same operations for all."""
    rate = results.records.get(("loss", "product rate"), {}).get("values", {})
    found = [record["values"] for record in records if "objective" in record["values"]]
    order = list(losses.FORMS)
    found.sort(key=lambda v: (order.index(v["objective"]), v["width"], v["n"], v["name"] != OURS))
    wrong = {(v["objective"], v["width"], v["name"]): v["errors"] for v in found if "errors" in v}
    values = {(v["objective"], v["width"], v["n"]): v["value"] for v in found if v["name"] == OURS}
    rows = []
    for v in found:
        share = operations(v["n"], v["width"], v["objective"]) / v["seconds"] / rate[str(v["width"])] if rate else float("nan")
        mistakes = wrong.get((v["objective"], v["width"], v["name"]))
        mine = values.get((v["objective"], v["width"], v["n"]))
        apart = f"{abs(v['value'] / mine - 1):.0e}" if v["name"] != OURS and mine else ""
        rows.append(
            [
                v["objective"], str(v["width"]), f"{v['n']:,}", v["name"], f"{v['seconds'] * 1e3:,.2f}", f"{share:.0%}",
                f"{v['bytes'] / 2**20:,.0f}", f"{v['ratio']:.2f}" if "ratio" in v else "",
                f"{mistakes[0]:.0e}, {mistakes[1]:.0e}" if mistakes else "", apart,
            ]
        )  # fmt: skip
    head = ["loss", "D", "N", "", "ms", "of the product rate", "MiB above inputs", "ours / it", "errors", "from ours"]
    speeds = ", ".join(f"{width}: {speed / 1e12:,.1f} TFLOP/s" for width, speed in rate.items())
    says = (
        f"Products of inner width D: {speeds}. Forward and backward; the share counts the products that ours computes (8·N²·D;"
        " with a locked tower 6·N²·D) for every loss. Errors of the loss and of a gradient are relative, against float64, at"
        f" N = {SAMPLE[results.device]:,}; `from ours`: how far the values at N lie apart. memeff has no gradient of the scale."
    )
    return f"{says}\n\n{markdown(head, rows)}"
