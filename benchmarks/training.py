"""Compares samples a second of whole training steps: ours, and open_clip's trainer (`open_clip_train`), on the same shards.

    pip install --no-deps --target PEERS 'webdataset<=0.2.86' pandas python-dateutil pytz six
    python benchmarks/training.py --checkouts PEERS --pairs 5       # nothing else may run

Both train the same modules of open_clip in fp32 with AdamW, gradients clipped at norm 1, the same batch, workers and threads of
torch, and neither evaluates nor saves. Ours is `mmcontrast train` as the command starts it. open_clip projects within its
towers, ours after them: that of the towers is taken out, so that each side has one matrix a tower.

Each measurement is a process of its own, that stops in the middle of a run: the time between the optimizer's steps (one hook of
torch's, the same for both), after the first ones. A line for each case, with medians and range of the pairs:

    towers   the towers take most of a step: what the loop around them costs
    loader   tiny towers, JPEGs of 640×480: decoding takes most
    loss     tiny towers and pictures, a batch of 8,192: the loss takes most
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
FOREVER = 10**6  # steps of a run that is stopped


@dataclass(frozen=True)
class Case:
    """Steps before and while it is timed; pictures; a model in open_clip's terms."""

    batch: int
    warm: int
    timed: int
    picture: tuple[int, int]
    each: int  # samples of a shard
    embed_dim: int
    vision: dict[str, int]
    text: dict[str, int]

    @property
    def model(self) -> dict[str, Any]:
        return {"embed_dim": self.embed_dim, "vision_cfg": self.vision, "text_cfg": self.text}


TINY_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
CASES = {
    "towers": Case(
        batch=64, warm=8, timed=20, picture=(224, 224), each=256, embed_dim=256,
        vision={"image_size": 224, "patch_size": 32, "width": 384, "head_width": 64, "layers": 6},
        text={"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
    ),
    "loader": Case(
        batch=64, warm=12, timed=40, picture=(640, 480), each=256, embed_dim=64,
        vision={"image_size": 224, "patch_size": 112, "width": 64, "head_width": 32, "layers": 1}, text=TINY_TEXT,
    ),
    "loss": Case(
        batch=8192, warm=3, timed=6, picture=(32, 32), each=2048, embed_dim=1024,
        vision={"image_size": 32, "patch_size": 32, "width": 64, "head_width": 32, "layers": 1}, text=TINY_TEXT,
    ),
}  # fmt: skip


class Enough(BaseException):
    """All steps are timed: the run is stopped."""


def clock(warm: int, timed: int) -> list[float]:
    """Return the list of times at which steps of any optimizer end; after the last one the run is stopped."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times: list[float] = []

    def record(*_: object) -> None:
        times.append(time.perf_counter())
        if len(times) > warm + timed:
            raise Enough

    register_optimizer_step_post_hook(record)
    return times


def bare_tower(model: str, part: str) -> Any:
    """Return a tower of open_clip without its projection."""
    from mmcontrast.models.open_clip import OpenClipTower

    tower = OpenClipTower(model, part)  # type: ignore[arg-type]
    if part == "image":
        tower.width, tower.network.proj = tower.network.proj.shape[0], None
    else:
        tower.width, tower.network.text_projection = tower.network.text_projection.shape[0], None
    return tower


def ours(case: Case, shards: Path, folder: Path, workers: int, threads: int) -> None:
    from mmcontrast.cli import main

    towers = {part: {"type": f"{__name__}:bare_tower", "model": "measured", "part": part} for part in ("image", "text")}
    text = {"type": "text", "context_length": case.text["context_length"]}
    modalities = {"image": {"type": "image", "size": case.vision["image_size"]}, "text": text}
    config = {
        "run": {"name": "ours", "dir": str(folder)},
        "fields": {field: {"modality": modality, "tower": field} for field, modality in modalities.items()},
        "towers": towers,
        "model": {"embed_dim": case.embed_dim},
        "data": {"train": str(shards / "*.tar"), "num_workers": workers},
        "train": {"steps": FOREVER, "batch_size": case.batch, "lr": 1e-4, "clip_grad_norm": 1.0, "threads": threads},
    }
    (folder / "ours.yaml").write_text(json.dumps(config))
    sys.argv = ["mmcontrast", "train", str(folder / "ours.yaml")]
    main()


def open_clip(case: Case, shards: Path, folder: Path, workers: int, threads: int) -> None:
    import torch
    from open_clip_train.main import main

    torch.set_num_threads(threads)
    last = max(int(shard.stem) for shard in shards.glob("*.tar"))
    options = {
        "train-data": shards / f"{{00000..{last:05d}}}.tar", "train-num-samples": FOREVER * case.batch,
        "dataset-type": "webdataset", "batch-size": case.batch, "workers": workers, "epochs": 1, "model": "measured",
        "precision": "fp32", "device": "cpu", "lr": 1e-4, "wd": 0.1, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "warmup": 0,
        "grad-clip-norm": 1.0, "log-every-n-steps": 10, "logs": folder, "name": "open_clip",
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    main([*arguments, "--dataset-resampled", "--force-custom-text"])


SIDES = {"ours": ours, "open_clip": open_clip}


def rate(side: str, case: Case, shards: Path, workers: int, threads: int, checkouts: list[str]) -> float:
    """Return the samples a second of a side, in a process of its own."""
    sys.path[:0] = checkouts if side == "open_clip" else []
    multiprocessing.set_start_method("fork", force=True)  # of workers; this process was spawned
    if side == "ours":
        import mmcontrast.cli  # noqa: F401  # then the setting: in the order of the command, torch loaded before or after

        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    times = clock(case.warm, case.timed)
    with tempfile.TemporaryDirectory() as folder:
        import open_clip

        Path(folder, "measured.json").write_text(json.dumps(case.model))
        open_clip.add_model_config(Path(folder, "measured.json"))
        with suppress(Enough):  # with what the run holds, its workers end
            SIDES[side](case, shards, Path(folder), workers, threads)
    assert len(times) == 1 + case.warm + case.timed, f"{side} ended after {len(times)} steps"
    return case.timed * case.batch / (times[-1] - times[case.warm])


def main() -> None:
    from reading import make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", nargs="+", required=True, help="folders that open_clip's loader is imported from")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--steps", type=int, help="that are timed; default: the case's own")
    parser.add_argument("--folder", type=Path, default=Path("data/reading"))
    options = parser.parse_args()
    for name in options.cases:
        case = CASES[name]
        case = replace(case, timed=options.steps or case.timed)
        shards = options.folder / f"{case.picture[0]}x{case.picture[1]}"
        if not shards.exists():
            make(shards, *case.picture, case.each)
        arguments = case, shards.absolute(), options.workers, options.threads, options.checkouts
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(options.pairs):
            for side in SIDES:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    rates[side].append(pool.submit(rate, side, *arguments).result())
                print(f"{name}: {side} {rates[side][-1]:,.1f} samples/s", file=sys.stderr, flush=True)
        ratios = [a / b for a, b in zip(rates["ours"], rates["open_clip"], strict=True)]
        medians = ", ".join(f"{side} {statistics.median(values):,.1f} samples/s" for side, values in rates.items())
        pairs = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(
            f"{name}, batch {case.batch}: {medians}; ours / open_clip {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f}–{max(ratios):.2f}; pairs {pairs})",
            flush=True,
        )


if __name__ == "__main__":
    main()
