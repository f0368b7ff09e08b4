"""Times launches of the kernels, each relative_error against the torch backend, and writes the fastest as a patch."""

import dataclasses
import difflib
import itertools
import math
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import losses
import torch

from gpu_parts.results import Record, Results
from gpu_parts.runner import Context
from gpu_parts.summary import markdown
from mmcontrast import contrastive_loss
from mmcontrast.score.backends import triton_tiled
from mmcontrast.score.backends.triton_tiled import Launch

SOURCE = "mmcontrast/score/backends/triton_tiled.py"
KERNELS = ("reduce_tiles", "weigh_tiles")
SMALLEST_SHARED = 99 * 1024  # bytes of a block on the smallest cards that the kernels are for (8.6, 8.9)
LARGEST_SHARED = 227 * 1024
FINALISTS = 3  # of a product, that are measured with siglip too
PREPARING = 40  # seconds at most in which all launches are compiled side by side
DTYPES = {"half": {"cuda": torch.bfloat16, "cpu": torch.float16}}  # else fp32
ROWS = {"cuda": {"half": 32_768, "tf32": 16_384, "ieee": 8192}, "cpu": {"half": 48, "tf32": 48, "ieee": 48}}
WIDTHS = {"cuda": (512, 768, 1152), "cpu": (16,)}
CHECKED = {"cuda": 1040, "cpu": 48}  # rows: of 16 a multiple, so that what is timed is what is relative_error; of no tile
BYTES = {"half": 2, "tf32": 4, "ieee": 4}
BLOCKS = {"cuda": ([8192, 32_768, 131_072], [None, 2048, 4096, 8192, 16_384]), "cpu": ([48], [32])}
HEAD_START = 1_000_000  # cycles, in which the host gets a kernel and its events into the queue: only the device is timed


def candidates(product: str, device: str) -> list[Launch]:
    """Return the launches to try, the one of LAUNCHES first."""
    tiles, steps = {
        "half": (
            [(128, 128, 8), (128, 256, 8), (128, 128, 4), (256, 128, 8), (128, 64, 4), (64, 128, 4), (64, 256, 4), (64, 64, 4)],
            [(64, 3), (64, 4), (64, 2), (128, 2), (32, 4)],
        ),
        "tf32": ([(128, 128, 8), (128, 64, 4), (64, 128, 4), (128, 256, 8), (64, 64, 4)], [(32, 3), (32, 4), (32, 2), (64, 2)]),
        "ieee": ([(64, 64, 8), (64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8)], [(16, 2), (32, 2), (16, 3)]),
    }[product]
    if device == "cpu":
        tiles, steps = [(32, 64, 1)] * (product == "half"), [(16, 1)]
    launches = [Launch(m, n, k, warps, stages) for (k, stages), (m, n, warps) in itertools.product(steps, tiles)]
    fitting = [
        launch for launch in launches if (launch.BM + launch.BN) * launch.BK * BYTES[product] * launch.stages <= LARGEST_SHARED
    ]
    return list(dict.fromkeys([triton_tiled.LAUNCHES[product], *fitting]))


def run(context: Context) -> None:
    every = [(product, launch) for product in triton_tiled.LAUNCHES for launch in candidates(product, context.device)]
    if context.device == "cuda" and not context.results.of("launches"):
        compile_side_by_side(every, min(PREPARING, context.left / 2))
    try:
        for product in triton_tiled.LAUNCHES:
            tune(context, product)
    finally:
        write_patch(context)
    sizes, blocks = BLOCKS[context.device]
    for n, block in itertools.product(sizes, blocks):
        if block is None or block <= n:
            function = partial(block_figures, n, block, context.device)
            context.measure(f"N = {n}, blocks of weights {block or 'as they are'}", function)


def tune(context: Context, product: str) -> None:
    """Measure all launches with infonce; with siglip too the pinned one, the fastest, and the fastest that a patch may take."""
    launches = candidates(product, context.device)
    for launch in launches:
        measure(context, product, "infonce", launch)
    ranked = sorted(ranking(product, context.results.of("launches")), key=lambda v: v["infonce"])
    finalists = [*ranked[:FINALISTS], *[v for v in ranked if fits_every_card(v)][:FINALISTS]]
    for launch in dict.fromkeys([launches[0], *(Launch(*v["launch"]) for v in finalists)]):
        measure(context, product, "siglip", launch)


def block_figures(n: int, block: int | None, device: str) -> dict[str, Any]:
    """Return the seconds and peak bytes of infonce whose backward writes the weights of so many rows and columns at a time."""
    width = WIDTHS[device][0]

    def loss(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return contrastive_loss({"image": x, "text": y}, logit_scale=scale, backend="triton", tile_size=block)

    peak = losses.peak_above_inputs(loss, n, width, dtype_of("half", device), device)
    leaves = losses.inputs(n, width, dtype_of("half", device), device)
    times = [losses.run(loss, leaves) for _ in range(5 if device == "cuda" else 1)]
    return {"n": n, "block": block, "width": width, "seconds": statistics.median(times), "bytes": peak}


def measure(context: Context, product: str, objective: str, launch: Launch) -> None:
    name = ", ".join(map(str, dataclasses.astuple(launch)))
    context.measure(f"{product} {objective} ({name})", lambda: figures(product, objective, launch, context.device), limit=45)


@contextmanager
def launched(product: str, launch: Launch) -> Iterator[dict[str, list[Any]]]:
    """Put this launch into LAUNCHES; yield a list that gets (before, after, compiled kernel) of every start of a kernel."""
    from mmcontrast.score.backends import triton_kernels

    kernels = {name: getattr(triton_kernels, name) for name in KERNELS}
    pinned, precision = triton_tiled.LAUNCHES[product], torch.get_float32_matmul_precision()
    starts: dict[str, list[Any]] = {name: [] for name in KERNELS}
    triton_tiled.LAUNCHES[product] = launch
    torch.set_float32_matmul_precision("high" if product == "tf32" else "highest")
    for name, kernel in kernels.items():
        setattr(triton_kernels, name, Timed(kernel, starts[name]))
    try:
        yield starts
    finally:
        triton_tiled.LAUNCHES[product] = pinned
        torch.set_float32_matmul_precision(precision)
        for name, kernel in kernels.items():
            setattr(triton_kernels, name, kernel)


class Timed:
    """Stands in for a kernel, and starts it between two events of the device."""

    def __init__(self, kernel: Any, starts: list[Any]) -> None:
        self.kernel, self.starts = kernel, starts

    def __getitem__(self, grid: Any) -> Any:
        def start(*arguments: Any, **constants: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda._sleep(HEAD_START)
            before = moment()
            built = self.kernel[grid](*arguments, **constants)
            self.starts.append((before, moment(), built))

        return start


def moment() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(before: Any, after: Any) -> float:
    return (after - before) * 1e3 if isinstance(before, float) else before.elapsed_time(after)


def figures(product: str, objective: str, launch: Launch, device: str) -> dict[str, Any]:
    """Return the milliseconds of each kernel in one forward and backward, by width, and its use of a multiprocessor."""
    error, allowed = relative_error(product, objective, launch, device)
    if not error <= allowed:
        raise ValueError(f"wrong: a relative error of {error:.1e} where {allowed:.1e} is allowed")
    result: dict[str, Any] = {"product": product, "objective": objective, "launch": dataclasses.astuple(launch), "error": error}
    medians: dict[str, dict[str, float]] = {name: {} for name in KERNELS}
    loss = losses.FORMS[objective]("triton")
    for width in WIDTHS[device]:
        leaves = losses.inputs(ROWS[device][product], width, dtype_of(product, device), device)
        with launched(product, launch) as starts:
            sums = []
            for _ in range(6 if device == "cuda" else 1):
                for times in starts.values():
                    times.clear()
                losses.run(loss, leaves)
                sums.append([sum(milliseconds(*times[:2]) for times in starts[name]) for name in KERNELS])
            for name, column in zip(KERNELS, zip(*(sums[1:] or sums), strict=True), strict=True):
                medians[name][str(width)] = statistics.median(column)
            built = {name: starts[name][-1][2] for name in KERNELS}
    result["ms"] = medians
    result["shared_bytes"] = max((b.metadata.shared for b in built.values() if b is not None), default=0)
    for what, attribute in (("registers", "n_regs"), ("spills", "n_spills")):
        result[what] = max((getattr(b, attribute, None) or 0 for b in built.values()), default=0)
    return result


def dtype_of(product: str, device: str) -> torch.dtype:
    return DTYPES.get(product, {}).get(device, torch.float32)


def relative_error(product: str, objective: str, launch: Launch, device: str) -> tuple[float, float]:
    """Return the largest relative error of the value and the gradients, against the torch backend in float64; and the
    allowed one: twice that of the torch backend in the inputs' dtype, and a quarter of a rounding step."""
    dtype, width = dtype_of(product, device), WIDTHS[device][0]
    leaves = losses.inputs(CHECKED[device], width, dtype, device)
    exact = values(losses.FORMS[objective]("torch"), [leaf.detach().double() for leaf in leaves])
    with launched(product, launch):  # with tf32 where it has that
        reference = values(losses.FORMS[objective]("torch"), leaves)
        kernel_values = values(losses.FORMS[objective]("triton"), leaves)

    def error(computed: list[torch.Tensor]) -> float:
        pairs = zip(computed, exact, strict=True)
        return max(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).nan_to_num(math.inf).item() for a, b in pairs)

    step = max(torch.finfo(dtype).eps / 4, 1e-2 if product == "tf32" else 1e-5)  # the scale's gradient cancels
    return error(kernel_values), 2 * error(reference) + step


def values(loss: losses.Loss, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the loss, and its gradients by both sides and the scale."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves[:3])]


def compile_side_by_side(every: list[tuple[str, Launch]], seconds: float) -> None:
    """Put compiled kernels into Triton's cache, by a process for each core. This process has not started CUDA yet."""
    assert not torch.cuda.is_initialized()
    number = min(8, len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=compile_some, args=(every[first::number],)) for first in range(number)]
    end = time.monotonic() + seconds
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def compile_some(launches: list[tuple[str, Launch]]) -> None:
    for product, launch in launches:
        try:
            relative_error(product, "infonce", launch, "cuda")
        except Exception as error:  # it is measured, and recorded, in its turn
            print(f"{product} {launch}: {type(error).__name__}", flush=True)


def ranking(product: str, records: list[Record]) -> list[dict[str, Any]]:
    """Return the measurements of a product, fastest first: by the mean, over objectives, kernels and widths, of the ratio of
    the time to the pinned launch's. A launch that was measured with siglip too comes before those that were not."""
    done = [r["values"] for r in records if r["state"] == "done" and r["values"].get("product") == product]
    pinned = {v["objective"]: v for v in done if v["launch"] == list(dataclasses.astuple(triton_tiled.LAUNCHES[product]))}
    by_launch: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for v in done:
        if v["objective"] in pinned:
            by_launch.setdefault(tuple(v["launch"]), []).append(v)
    scored = []
    for group in by_launch.values():  # begins with infonce
        both, alone = score(group, pinned), score(group[:1], pinned)
        scored.append({**group[0], "objectives": len(group), "score": both, "infonce": alone})
    return sorted(scored, key=lambda v: (-v["objectives"], v["score"]))


def score(group: list[dict[str, Any]], pinned: dict[str, dict[str, Any]]) -> float:
    """Return the mean ratio of times to the pinned launch's: below 1 it is faster."""
    ratios = []
    for v in group:
        base = pinned[v["objective"]]["ms"]
        ratios += [ms / base[kernel][width] for kernel, widths in v["ms"].items() for width, ms in widths.items()]
    return statistics.geometric_mean(ratios)


def fits_every_card(values: dict[str, Any]) -> bool:
    """Return whether a launch fits every card that the kernels are for, as a test asks of the pinned ones."""
    return values["shared_bytes"] <= SMALLEST_SHARED


def chosen(records: list[Record]) -> dict[str, Launch]:
    """Return for each product the fastest launch that a patch may take."""
    best = {}
    for product in triton_tiled.LAUNCHES:
        fitting = [values for values in ranking(product, records) if fits_every_card(values)]
        if fitting:
            best[product] = Launch(*fitting[0]["launch"])
    return best


def patch(best: dict[str, Launch], where: str) -> str:
    """Return a diff for `git apply`; empty if the pinned launches are the best."""
    old = (Path(__file__).resolve().parents[2] / SOURCE).read_text()
    new = old
    for product, launch in best.items():
        if launch != triton_tiled.LAUNCHES[product]:
            numbers = ", ".join(map(str, dataclasses.astuple(launch)))
            new, count = re.subn(rf'^(    "{product}": Launch)\([^)]*\)', rf"\g<1>({numbers})", new, flags=re.MULTILINE)
            assert count == 1, f"{SOURCE} has no line for {product}"
    if new == old:
        return ""
    new = re.sub(r"the fastest on .*", f"the fastest on {where}", new)
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{SOURCE}", f"b/{SOURCE}")
    return "".join(lines)


def write_patch(context: Context) -> None:
    if context.device == "cuda":
        card = context.results.records["machine", "machine"]["values"]["card"]
        text = patch(chosen(context.results.of("launches")), card)
        (context.out / "launches.patch").write_text(text)


def table(records: list[Record], results: Results) -> str:
    rows = []
    for product in triton_tiled.LAUNCHES:
        for v in ranking(product, records):
            launch = ", ".join(map(str, v["launch"]))
            times = [" / ".join(f"{ms:.3g}" for ms in v["ms"][kernel].values()) for kernel in KERNELS]
            resources = [f"{v['shared_bytes'] / 1024:.0f} KiB", str(v["registers"]), str(v["spills"])]
            rows.append([product, launch, f"{v['score']:.3f}", *times, *resources, f"{v['error']:.0e}"])
    head = ["product", "BM, BN, BK, warps, stages", "time / pinned", *(f"{kernel}, ms" for kernel in KERNELS)]
    head += ["shared", "registers", "spills", "error"]
    best = chosen(records)
    rows_of = ", ".join(f"{n:,} ({product})" for product, n in ROWS[results.device].items())
    lines = [
        f"N = {rows_of}, D = {' / '.join(map(str, WIDTHS[results.device]))}; the kernels' own time in one forward and backward"
        " of infonce. The score is the mean over kernels, widths and, for the fastest, siglip too."
    ]
    for product, launch in best.items():
        now = triton_tiled.LAUNCHES[product]
        verdict = "stays" if launch == now else f"becomes `{launch}`"
        fastest = ranking(product, records)[0]
        lines.append(f"- `{product}`: `{now}` {verdict}")
        if tuple(fastest["launch"]) != dataclasses.astuple(launch):
            lines[-1] += f"; {fastest['launch']} is faster here, but does not fit every card"
        for kernel in KERNELS:
            alone = min(ranking(product, records), key=lambda v: sum(v["ms"][kernel].values()))
            if tuple(alone["launch"]) != dataclasses.astuple(launch):
                lines[-1] += f"; fastest for {kernel} alone: {alone['launch']}"
    blocks = [r["values"] for r in records if "block" in r["values"]]
    cells = [
        [f"{v['n']:,}", str(v["block"] or "as they are"), f"{v['seconds'] * 1e3:,.2f}", f"{v['bytes'] / 2**20:,.0f}"]
        for v in blocks
    ]
    block_table = markdown(["N", "rows and columns whose weights are written at a time", "ms", "MiB above inputs"], cells)
    return "\n\n".join([lines[0], "\n".join(lines[1:]), markdown(head, rows), block_table])
