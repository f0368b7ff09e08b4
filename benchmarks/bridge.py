"""Compares pictures and sounds that were never paired in training, by cosine and through a bridge of captions.

    make data
    for s in 0 1 2; do mmcontrast train configs/quickstart.yaml run.name=quick-$s train.seed=$s; done
    python benchmarks/bridge.py runs/quick-0 runs/quick-1 runs/quick-2 --plot docs/bridge.png
    python benchmarks/bridge.py runs/quick-0 --pair runs/image-text runs/audio-text     # two models that share only texts
    python benchmarks/bridge.py --cost 20000 --bank 2000                                # time and memory beside cosine
    python benchmarks/bridge.py --cost 200000 --candidates 1000 --bank 10000            # a 200th of 200,000 × 200,000

Recall at 1 and 5 of image → audio and back on two splits of the quickstart: characters of the training set in a font and voices
that were not trained on (val), and characters that neither the training set nor the bank has (val_unseen). The bank is the
training set's captions, each once; fewer of them; 100,000 texts, of which the others are lines of code; a mean row a character
of the training samples' captions; and lines of code alone, on purpose. Means and half-spreads over the runs.
"""

import argparse
import inspect
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from arms import spread  # type: ignore[import-not-found]  # beside this file

from mmcontrast import load
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.banks import read_bank
from mmcontrast.evaluation.bridge import Bridge, mean_rows
from mmcontrast.evaluation.rankings import Pairs, rank

DATA, SPLITS = "data/glyphs", ("val", "val_unseen")
SIZES, WITH_OTHERS = (100, 1000), 100_000  # of smaller banks, and of one that has other texts too
AT = (1, 5)
Comparison = dict[str, dict[str, list[float]]]  # by way of comparison and by split and direction, a number a run


def table_of(run: Path, split: str) -> EmbeddingTable:
    folder = run / f"bridge-{split}"
    if not (folder / "manifest.json").exists():
        command = [sys.executable, "-m", "mmcontrast", "embed", str(run), f"{DATA}/{split}-*.tar", str(folder)]
        subprocess.run(command, check=True)
    return EmbeddingTable.read(folder)


def recalls(images: EmbeddingTable, sounds: EmbeddingTable, **options: object) -> dict[str, list[float]]:
    """Return recall at 1 and 5, image → audio and back; rows of one group belong together."""
    pairs = Pairs.of_groups(images.group_ids, sounds.group_ids)
    bridge: Bridge | None = options.pop("expected", None)  # type: ignore[assignment]
    x, y = images.fields["image"], sounds.fields["audio"]
    if bridge is not None:
        x, y = bridge.expected(x), bridge.expected(y, candidates=True)
    values = {}
    for name, ranking in zip(("image → audio", "audio → image"), rank(x, y, pairs, both=True, **options), strict=True):  # type: ignore[arg-type]
        best_ranks = torch.full((int(ranking.queries.max()) + 1,), 2**62).scatter_reduce(
            0, ranking.queries, ranking.ranks, "amin"
        )
        values[name] = [(best_ranks[best_ranks < 2**62] <= k).double().mean().item() for k in AT]
    return values


def lines_of_code(number: int) -> list[str]:
    """Return lines of Python's own library: texts that have nothing to do with characters."""
    lines: dict[str, None] = {}
    for file in sorted(Path(inspect.__file__).parent.glob("**/*.py")):
        if "site-packages" not in file.parts:
            lines |= dict.fromkeys(line.strip() for line in file.read_text("utf-8", "ignore").splitlines() if len(line) > 10)
        if len(lines) >= number:
            break
    return list(lines)[:number]


def compare_ways(run: Path, other: Path | None = None) -> Comparison:
    """Return the recalls of every way of comparing, on every split; `other`: the model of the sounds."""
    sound_run = other or run
    models = [load(run, device="cpu"), load(sound_run, device="cpu")]
    banks = [read_bank(model.model, f"{DATA}/train-*.tar", None, None, model.device, {}).rows for model in models]
    scales = [model.scale_of_texts() for model in models]
    generator, ways = torch.Generator().manual_seed(0), {}
    if other is None:
        ways["cosine"] = {}
    ways[f"{len(banks[0]):,} captions, κ as learnt"] = {"bridge": Bridge(*banks, *scales)}
    for scale in (10.0, 20.0, 100.0, 200.0):
        ways[f"{len(banks[0]):,} captions, κ = {scale:g}"] = {"bridge": Bridge(*banks, scale, scale)}
    ways["expected captions, κ as learnt"] = {"expected": Bridge(*banks, *scales)}
    for size in SIZES:
        chosen = torch.randperm(len(banks[0]), generator=generator)[:size]
        ways[f"{size:,} of the captions, κ as learnt"] = {"bridge": Bridge(banks[0][chosen], banks[1][chosen], *scales)}
    tables = [table_of(run, "train"), table_of(sound_run, "train")]
    means = [mean_rows(table.fields["text"], table.group_ids) for table in tables]
    ways[f"{len(means[0]):,} mean rows of characters, κ as learnt"] = {"bridge": Bridge(*means, *scales)}
    lines = lines_of_code(WITH_OTHERS - len(banks[0]))
    code = [model.embed(texts=lines, progress=False) for model in models]
    mixed = [torch.cat([bank, rows]) for bank, rows in zip(banks, code, strict=True)]
    ways[f"the captions among {len(mixed[0]):,} texts, the others code, κ as learnt"] = {"bridge": Bridge(*mixed, *scales)}
    ways["2,000 lines of code, κ as learnt"] = {"bridge": Bridge(code[0][:2000], code[1][:2000], *scales)}
    comparison: Comparison = {}
    for way, options in ways.items():
        comparison[way] = {}
        for split in SPLITS:
            for direction, values in recalls(table_of(run, split), table_of(sound_run, split), **dict(options)).items():
                comparison[way][f"{split}, {direction}"] = values
    return comparison


def show(results: list[Comparison], plot: Path | None) -> None:
    columns = list(next(iter(results[0].values())))
    print(f"\n| recall at 1 / at 5 | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for way in results[0]:
        cells = []
        for column in columns:
            at = [[comparison[way][column][k] for comparison in results] for k in range(len(AT))]
            cells.append(" / ".join(f"{statistics.mean(v):.3f}" + (f" ± {spread(v):.3f}" if len(v) > 1 else "") for v in at))
        print(f"| {way} | {' | '.join(cells)} |")
    if plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 0.32 * len(results[0]) + 1.2), layout="constrained")
        axes = figure.subplots(1, len(columns), sharey=True)
        for axis, column in zip(axes, columns, strict=True):
            for number, way in enumerate(results[0]):
                axis.plot(
                    [comparison[way][column][0] for comparison in results],
                    [number] * len(results),
                    "o",
                    color="#2166ac",
                    markersize=4,
                )
            axis.set_title(column, fontsize=10)
            axis.set_xlim(0, None)
            axis.grid(alpha=0.3)
        axes[0].set_yticks(range(len(results[0])), list(results[0]), fontsize=8)
        axes[0].invert_yaxis()
        figure.supxlabel("recall at 1, one dot a run", fontsize=9)
        figure.savefig(plot, dpi=110)


def cost(n: int, m: int, entries: int, bridged: bool, dim: int = 192) -> tuple[float, int]:
    """Return (seconds, peak bytes of the process) of exact ranks of n × m."""
    import resource

    generator = torch.Generator().manual_seed(0)
    x, y, bank = (F.normalize(torch.randn(rows, dim, generator=generator), dim=1) for rows in (n, m, entries))
    pairs = Pairs.of_groups(torch.arange(n) % m, torch.arange(m))
    start = time.perf_counter()
    rank(x, y, pairs, both=True, bridge=Bridge(bank, bank, 50.0, 50.0) if bridged else None)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_in_process(function: Callable[..., tuple[float, int]], *arguments: object) -> tuple[float, int]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="of configs/quickstart.yaml")
    parser.add_argument("--pair", type=Path, nargs=2, metavar=("IMAGE-TEXT", "AUDIO-TEXT"), help="two runs trained apart")
    parser.add_argument("--plot", type=Path, help="a PNG of the table")
    parser.add_argument("--cost", type=int, metavar="N", help="time ranks of N × N instead")
    parser.add_argument("--candidates", type=int, metavar="M", help="… of N × M")
    parser.add_argument("--bank", type=int, default=2000, help="entries of --cost's bank")
    options = parser.parse_args()
    if options.cost:
        size = options.cost, options.candidates or options.cost, options.bank
        plain, bridged = (run_in_process(cost, *size, through) for through in (False, True))
        for name, (seconds, peak) in (("cosine", plain), ("bridge", bridged)):
            print(f"{name}: {seconds:.1f} s, peak {peak / 2**30:.2f} GiB")
        print(f"bridge / cosine: {bridged[0] / plain[0]:.1f} times the time; {options.bank} entries of 192 numbers")
    if options.runs:
        show([compare_ways(run) for run in options.runs], options.plot)
    if options.pair:
        show([compare_ways(*options.pair)], None)


if __name__ == "__main__":
    main()
