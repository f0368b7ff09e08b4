"""Measures the cost of checkpoints: a run that writes one every 20 steps, beside the training or in its way, and one without.

    make data && python benchmarks/checkpoints.py --pairs 3

The quickstart's model and data, in turn, each in a process of its own, with the settings that the `mmcontrast` command
makes; wall time from the first logged step to the last, medians, and ratios of pairs.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SIDES = {
    "none": ["train.checkpoint_every=0"],
    "beside": ["train.checkpoint_every=20", "train.async_checkpoints=true"],
    "in the way": ["train.checkpoint_every=20", "train.async_checkpoints=false"],
}


def seconds(side: str, steps: int) -> float:
    from mmcontrast.cli import keep_freed_memory
    from mmcontrast.config import load_config
    from mmcontrast.run_folder import prepare_folder
    from mmcontrast.runs import make_run_context
    from mmcontrast.training.log import StepLog
    from mmcontrast.training.loop import train

    keep_freed_memory()
    log_times: list[float] = []
    write = StepLog.write

    def write_timed(log, values, device):  # the first logged step: data and memory are warm
        log_times.append(time.perf_counter())
        return write(log, values, device)

    StepLog.write = write_timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        options = [f"run.dir={folder}", f"train.steps={steps}", "evaluation.splits={}", "evaluation.zero_shot={}"]
        options += ["data.num_workers=0"]  # which would gain from every pause
        config = load_config("configs/quickstart.yaml", [*options, "train.log_every=10", *SIDES[side]])
        context = make_run_context(config)
        prepare_folder(config, overwrite=False)
        train(context)
    return log_times[-1] - log_times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    if not Path("data/glyphs/manifest.json").exists():
        parser.error("no data/glyphs: run `make data` first")
    os.environ["OMP_WAIT_POLICY"] = (
        "PASSIVE"  # as the command does: a second pool of threads would end the first one's spinning
    )
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.pairs):
        for side in SIDES:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                times[side].append(pool.submit(seconds, side, options.steps).result())
    for side in list(SIDES)[1:]:
        ratios = [a / b for a, b in zip(times[side], times["none"], strict=True)]
        print(
            f"{side}: {statistics.median(times[side]):.1f} s, none {statistics.median(times['none']):.1f} s:"
            f" {statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
