"""Measures the peak memory of one forward and backward of each loss above its inputs, as the batch grows.

    python benchmarks/loss_memory.py                              # N = 8,192, 32,768, 131,072; D = 512; fp32, CPU
    python benchmarks/loss_memory.py --checkouts ../GradCache/src --results memory.json --plot docs/loss_memory.png

Each figure is a process of its own (Linux). A loss that grew by the square of N, and would not fit at the next, is not
run there: the table then shows what it would need, with a ~. With --results figures are kept as they come, and not taken
again; a null there skips what would take too long.
"""

import argparse
import json
import multiprocessing
from pathlib import Path

import torch
from losses import (  # type: ignore[import-not-found]  # beside this file
    ON_GPUS,
    OURS,
    PEERS,
    add_checkouts,
    join_group,
    load,
    peak_above_inputs,
    resident,
)


def measure(name: str, n: int, dim: int, checkouts: list[str]) -> int | str:
    add_checkouts(checkouts)
    join_group("cpu")
    loss = OURS[name] if name in OURS else load(name)
    return loss if isinstance(loss, str) else peak_above_inputs(loss, n, dim, torch.float32)


def available() -> int:
    """Return the bytes of memory that are available."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].removesuffix("kB\n")) * 1024 + resident("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[8192, 32_768, 131_072])
    parser.add_argument("--dim", type=int, default=512)
    runs_here = [name for name in PEERS if not name.startswith(ON_GPUS)]
    parser.add_argument("--losses", nargs="+", default=[*OURS, *runs_here], metavar="LOSS")
    parser.add_argument("--checkouts", nargs="*", default=[], help="folders that peers are imported from")
    parser.add_argument("--results", type=Path, help="a JSON file of figures, in bytes")
    parser.add_argument("--plot", help="a PNG of the table")
    options = parser.parse_args()
    print(f"MiB above the inputs, D = {options.dim}, fp32; N = {', '.join(f'{n:,}' for n in options.n)}")
    figures_by_loss = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    table: dict[str, list[tuple[int, float, bool]]] = {}
    for name in options.losses:
        cells: list[tuple[int, float, bool]] = []
        for n in options.n:
            expected = cells[-1][1] * (n / cells[-1][0]) ** 2 if cells else 0.0
            if cells and (not cells[-1][2] or (expected > 0.8 * available() and quadratic(cells))):
                cells.append((n, expected, False))
                continue
            figure = figures_by_loss.get(name, {}).get(str(n), "unknown")
            if figure is None:
                continue
            if figure == "unknown":
                with multiprocessing.get_context("spawn").Pool(1) as process:
                    figure = process.apply(measure, (name, n, options.dim, options.checkouts))
            if isinstance(figure, str):
                print(f"{name}: {figure}", flush=True)
                break
            cells.append((n, float(figure), True))
            figures_by_loss.setdefault(name, {})[str(n)] = figure
            if options.results:
                options.results.write_text(json.dumps(figures_by_loss, indent=1))
        else:
            table[name] = cells
            figures = " | ".join(f"{'' if sure else '~'}{size / 2**20:,.0f}" for _, size, sure in cells)
            print(f"{'ours, ' if name in OURS else ''}{name}: {figures}", flush=True)
    if options.plot:
        plot(table, options.plot)


def quadratic(cells: list[tuple[int, float, bool]]) -> bool:
    """Return whether memory grew faster than N^1.5, which is assumed of a single figure."""
    if len(cells) < 2:
        return True
    (n, size, _), (next_n, next_size, _) = cells[-2:]
    return next_size / size > (next_n / n) ** 1.5


def plot(table: dict[str, list[tuple[int, float, bool]]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, cells in table.items():
        (line,) = axes.plot([], [], "o-" if name in OURS else "s--", label=f"{'ours, ' if name in OURS else ''}{name}")
        for (n, size, _), (next_n, next_size, is_measured) in zip(cells, cells[1:], strict=False):
            style = ("-" if name in OURS else "--") if is_measured else ":"
            axes.plot([n, next_n], [size / 2**30, next_size / 2**30], style, color=line.get_color())
        points = [(n, size / 2**30) for n, size, is_measured in cells if is_measured]
        axes.plot(*zip(*points, strict=True), "o" if name in OURS else "s", color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="batch N", ylabel="GiB above the inputs (dotted: would need)")
    axes.set_xticks([n for n, *_ in next(iter(table.values()))], [f"{n:,}" for n, *_ in next(iter(table.values()))])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
