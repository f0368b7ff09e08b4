"""Compares runs over seeds: each is trained and embedded with the command line as a user would, then a table and a figure."""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.evaluation.rankings import Pairs, rank

Recalls = dict[str, list[float]]  # of each query, a number for each kind of sample
Results = dict[str, dict[str, Recalls]]  # by arm and seed


def mmcontrast(*arguments: object) -> None:
    command = [sys.executable, "-m", "mmcontrast", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"mmcontrast {' '.join(command[3:])}\n{result.stderr}")


def train(folder: Path, config: str, arms: Mapping[str, Sequence[str]], arm: str, seed: int, *options: str) -> Path:
    """Train the run of an arm and a seed, unless it is there, and return its folder."""
    run = folder / f"{list(arms).index(arm):02d}-{seed}"
    if not (run / "done").exists():
        options = (f"run.dir={run.parent}", f"run.name={run.name}", f"train.seed={seed}", *options, *arms[arm])
        mmcontrast("train", config, "--overwrite", *options)
        (run / "done").touch()
    return run


def table_of(run: Path, shards: str | Path, name: str) -> EmbeddingTable:
    """Return the embeddings of shards by a run, from its folder if they are there."""
    folder = run / name
    if not (folder / "manifest.json").exists():
        mmcontrast("embed", run, shards, folder)
    return EmbeddingTable.read(folder)


def recall_at_1(table: EmbeddingTable, query: str, candidate: str, bridge: Bridge | None = None) -> float:
    """Return recall at 1 among the samples that have both fields; rows of one group belong together."""
    rows = (table.present[query] & table.present[candidate]).nonzero().squeeze(1)
    pairs = Pairs.of_groups(table.group_ids[rows], table.group_ids[rows])
    (ranking, _) = rank(table.fields[query][rows], table.fields[candidate][rows], pairs, both=True, bridge=bridge)
    first = torch.full((len(rows),), 2**62).scatter_reduce(0, ranking.queries, ranking.ranks, "amin")
    return (first == 1).double().mean().item()


def parser_of(description: str | None, arms: Iterable[str], folder: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path(folder), help="of the runs, and of results.json")
    parser.add_argument("--plot", type=Path, help="a PNG of the table")
    return parser


def compare(
    options: argparse.Namespace,
    run: Callable[[str, int], Recalls],
    queries: Sequence[str],
    kinds: Sequence[tuple[str, str]],
    before: Callable[[int], None] = lambda seed: None,
) -> None:
    """Run every arm with every seed that results.json lacks; print the table, draw the figure. kinds: (colour, label) of each
    number of a query. before: prepares a seed."""
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "results.json"
    all_results: Results = json.loads(file.read_text()) if file.exists() else {}
    for seed in options.seeds:
        before(seed)
        for arm in options.arms:
            if str(seed) not in all_results.setdefault(arm, {}):
                all_results[arm][str(seed)] = recalls = run(arm, seed)
                file.write_text(json.dumps(all_results, indent=1, ensure_ascii=False))
                print(f"{arm}, seed {seed}: {recalls}", flush=True)
    results = {arm: {str(seed): all_results[arm][str(seed)] for seed in options.seeds} for arm in options.arms}
    labels = ", ".join(label for _, label in kinds)
    print(f"\n| recall at 1: {labels} | {' | '.join(queries)} |\n|---|{'---|' * len(queries)}")
    for arm, seeds in results.items():
        cells = []
        for query in queries:
            numbers = zip(*(recalls[query] for recalls in seeds.values()), strict=True)
            cells.append(" \\| ".join(f"{statistics.mean(values):.2f} ± {spread(values):.2f}" for values in numbers))
        print(f"| {arm} | {' | '.join(cells)} |")
    if options.plot:
        plot(results, queries, kinds, options.plot)


def compare_bridged(
    description: str | None,
    arms: Iterable[str],
    folder: str,
    recalls: Callable[[Path, str, int], Recalls],
    queries: Sequence[str],
) -> None:
    """Run a script that compares arms by recall at 1, by cosine and through a bridge.

    Args:
        recalls: of a folder of runs, an arm and a seed: per query, by cosine and through the bridge.
    """
    options = parser_of(description, arms, folder).parse_args()
    kinds = [("#777777", "cosine"), ("#2166ac", "through the bridge")]
    compare(options, lambda arm, seed: recalls(options.folder, arm, seed), queries, kinds)


def spread(values: Sequence[float]) -> float:
    """Return half of the distance between the best and the worst seed."""
    return (max(values) - min(values)) / 2


def plot(results: Results, queries: Sequence[str], kinds: Sequence[tuple[str, str]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.32 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(queries), sharey=True, squeeze=False)[0]
    for axis, query in zip(axes, queries, strict=True):
        for number, seeds in enumerate(results.values()):
            for kind, (colour, label) in enumerate(kinds):
                values = [recalls[query][kind] for recalls in seeds.values()]
                y = [number + 0.24 * (kind - (len(kinds) - 1) / 2)] * len(values)
                axis.plot(values, y, "o", color=colour, markersize=4, alpha=0.8, label=label if number == 0 else None)
        axis.set_title(query, fontsize=10)
        axis.set_xlim(0, None)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(results)), list(results), fontsize=8)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=7, loc="lower right")
    figure.supxlabel("recall at 1, one dot a seed", fontsize=9)
    figure.savefig(path, dpi=110)
