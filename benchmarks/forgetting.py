"""Compares ways to fine-tune, on a new domain and on the old one: the gain and the loss of each. Three seeds.

    mmcontrast data build data_pipelines/glyphs/glyphs.yaml
    mmcontrast data build data_pipelines/stamps/stamps.yaml              # its README says how to get the pictures
    python benchmarks/forgetting.py --plot docs/forgetting.png           # an hour; interrupted, it goes on where it was

A model of characters (benchmarks/forgetting.yaml) is fine-tuned on 632 pictures of Tux Paint with `mmcontrast finetune`,
blended with `mmcontrast blend`, and evaluated with `mmcontrast evaluate` on both (eval/stamps/forgetting.yaml).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG, SUITE = "benchmarks/forgetting.yaml", "eval/stamps/forgetting.yaml"
TRAIN, VAL = "data/stamps/train-*.tar", "data/stamps/val-*.tar"
EPOCHS, BATCH = 40, 128
COMMON = ["--val", VAL, "--epochs", str(EPOCHS), f"train.batch_size={BATCH}", "train.checkpoint_every=1000"]
ARMS = {
    "full": ["train.lr=1e-3"],
    "full, lr 3e-4": ["train.lr=3e-4"],
    "full, lr 3e-3": ["train.lr=3e-3"],
    "locked image tower": ["--lock", "image", "train.lr=1e-3"],
    "locked text tower": ["--lock", "text", "train.lr=1e-3"],
    "LoRA, rank 4": ["--lora", "4", "train.lr=3e-3"],
    "LoRA, rank 16": ["--lora", "16", "train.lr=3e-3"],
}
SOUP = ("full", "full, lr 3e-4", "full, lr 3e-3")
METRICS = {
    "characters": ("glyphs", 1),
    "stamps, mirrored": ("stamps_mirrored", 1),
    "stamps, new captions": ("stamps", 5),
}
WayMetrics = dict[str, dict[str, float]]


def mmcontrast(*arguments: str) -> None:
    result = subprocess.run([sys.executable, "-m", "mmcontrast", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"mmcontrast {' '.join(arguments)}\n{result.stderr}")


def results_of(model: Path, out: Path) -> dict[str, float]:
    mmcontrast("evaluate", str(model), "--suite", SUITE, "--out", str(out), "--no-cache")
    results: dict[str, Any] = json.loads((out / "results.json").read_text())["results"]
    return summary({name: entry["value"] for name, entry in results.items()})


def summary(values: dict[str, float]) -> dict[str, float]:
    """Return the mean of both directions of each metric."""
    return {
        name: statistics.mean(values[f"{split}/retrieval/{way}/recall_at_{k}"] for way in ("image_to_text", "text_to_image"))
        for name, (split, k) in METRICS.items()
    }


def run(seed: int, folder: Path) -> WayMetrics:
    """Train, fine-tune in each way, blend: {way: {metric: value}}."""
    seed_folder, seed_options = folder / str(seed), [f"run.dir={folder / str(seed)}", f"train.seed={seed}"]
    start = seed_folder / "start"
    if not (start / "results.json").exists():
        mmcontrast("train", CONFIG, "run.name=start", *seed_options, "--overwrite")
    metrics = {"start": results_of(start, seed_folder / "results" / "start")}
    steps = str(EPOCHS * 632 // BATCH)
    options_alone = [
        "run.name=alone",
        f"data.train={TRAIN}",
        f"train.steps={steps}",
        f"train.batch_size={BATCH}",
        *seed_options,
    ]
    mmcontrast("train", CONFIG, *options_alone, "train.warmup_steps=20", "evaluation.splits.val=" + VAL, "--overwrite")
    metrics["from random weights"] = results_of(seed_folder / "alone", seed_folder / "results" / "alone")
    runs: dict[str, Path] = {}
    for number, (arm, options) in enumerate(ARMS.items()):
        runs[arm] = seed_folder / f"arm-{number}"
        name_options = ["--name", runs[arm].name, "--overwrite"]
        mmcontrast("finetune", str(start), TRAIN, *COMMON, *name_options, *options, *seed_options)
        metrics[arm] = results_of(runs[arm], seed_folder / "results" / runs[arm].name)
    mmcontrast("blend", *(str(runs[arm]) for arm in SOUP), str(seed_folder / "soup"), "--soup", "uniform", "--overwrite")
    metrics["soup of three rates"] = results_of(seed_folder / "soup", seed_folder / "results" / "soup")
    mmcontrast(
        "blend", str(start), str(runs["full"]), "--suite", SUITE, "--curve", "--out", str(seed_folder / "curve"), "--no-cache"
    )
    curve: dict[str, Any] = json.loads((seed_folder / "curve" / "curve.json").read_text())
    for number, alpha in enumerate(curve["alphas"]):
        metrics[f"WiSE-FT, α = {alpha:g}"] = summary({name: row[number]["value"] for name, row in curve["results"].items()})
    return metrics


def write_table(results: dict[str, WayMetrics]) -> None:
    print(f"\n| | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
    for arm in next(iter(results.values())):
        cells = []
        for metric in METRICS:
            values = [metrics[arm][metric] for metrics in results.values()]
            cells.append(f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}")
        print(f"| {arm} | {' | '.join(cells)} |")


def plot(results: dict[str, WayMetrics], path: Path) -> None:
    """Draw the new domain against the old one: a marker a way, a line for the blends, bars from seed to seed."""
    from matplotlib.figure import Figure

    old, *new = METRICS
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(new)), new, strict=True):

        def points_of(arm: str, metric: str = metric) -> list[tuple[float, float, float]]:
            """Return (mean, distance to the least, distance to the largest) of the old and of the new metric."""
            points = []
            for name in (old, metric):
                values = [metrics[arm][name] for metrics in results.values()]
                mean = statistics.mean(values)
                points.append((mean, mean - min(values), max(values) - mean))
            return points

        arms = list(next(iter(results.values())))
        line = [points_of(arm) for arm in arms if arm.startswith("WiSE")]
        axis.plot(*zip(*((x[0], y[0]) for x, y in line), strict=True), "-o", color="#888888", markersize=3, label="WiSE-FT")
        for number, arm in enumerate(arm for arm in arms if not arm.startswith("WiSE")):
            x, y = points_of(arm)
            bars = {"xerr": [[x[1]], [x[2]]], "yerr": [[y[1]], [y[2]]]}
            axis.errorbar(x[0], y[0], **bars, fmt="osD^v<>Pp*"[number % 10], color=f"C{number}", label=arm, elinewidth=0.8)
        k = METRICS[metric][1]
        axis.set(xlabel=f"{old}: recall at 1 (kept)", ylabel=f"{metric}: recall at {k} (gained)")
        axis.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/forgetting"), help="of the runs, and of results.json")
    parser.add_argument("--plot", type=Path, help="a PNG of the table")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "results.json"
    all_results: dict[str, WayMetrics] = json.loads(file.read_text()) if file.exists() else {}
    for seed in options.seeds:
        if str(seed) not in all_results:
            all_results[str(seed)] = run(seed, options.folder)
            file.write_text(json.dumps(all_results, indent=1) + "\n")
        print(f"seed {seed}: {all_results[str(seed)]}", flush=True)
    results = {seed: all_results[seed] for seed in map(str, options.seeds)}
    write_table(results)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
