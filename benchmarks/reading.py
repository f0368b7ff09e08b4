"""Compares samples a second from shards to normalised batches: ours and open_clip's `get_wds_dataset`, on the same shards.

    pip install --no-deps --target PEERS 'webdataset<=0.2.86' pandas python-dateutil pytz six
    python benchmarks/reading.py --checkouts PEERS        # without it: ours alone

JPEGs of 640×480 and 256×256 (made on the first run) at 224×224 for training: decoding, random crop, tokens, collation, and
normalisation, which ours leaves to the device. Each measurement is a process of its own; after the first batches, so that
nobody's start counts. Medians of the pairs.
"""

import argparse
import io
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from mmcontrast.cli import keep_freed_memory

BATCH, WARM, TIMED = 64, 6, 24
SIZES = {"640x480": (640, 480), "256x256": (256, 256)}
SHARDS, EACH = 8, 256


def make(folder: Path, width: int, height: int, each: int = EACH) -> None:
    """Write shards of so many samples each: pictures with colours, edges and noise, of about a photograph's bytes."""
    from mmcontrast.data import write_shard

    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in track(range(SHARDS), f"writing {folder}"):
        samples = []
        for number in range(each):
            coarse = Image.fromarray(generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
            pixels += generator.integers(-9, 10, pixels.shape)
            target = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, "JPEG", quality=88)
            samples.append(
                {"__key__": f"{shard:02d}{number:04d}", "jpg": target.getvalue(), "txt": f"picture {number} of many"}
            )
        write_shard(folder / f"{shard:05d}.tar", samples)


def batches(shards: str, workers: int, image: Any) -> Iterator[Any]:
    """Yield decoded batches, without end; their pictures are normalised on the device."""
    from mmcontrast.data import SampleOrder, ShardDataset, training_batches
    from mmcontrast.modalities import TextModality

    dataset = ShardDataset(shards, {"image": image, "text": TextModality()}, {}, training=True)
    order = SampleOrder(tuple(map(len, dataset.shards)), BATCH, 0, 8, 64, 1024)
    yield from training_batches(
        dataset, order, range(10**6), rank=0, world_size=1, num_workers=workers, pin_memory=False
    )  # fmt: skip


def ours(shards: str, workers: int, **options: Any) -> Iterator[torch.Tensor]:
    from mmcontrast.modalities import ImageModality

    image = ImageModality(224, **options)
    for batch in batches(shards, workers, image):
        yield image(batch.values["image"])


def open_clip(shards: str, workers: int) -> Iterator[torch.Tensor]:
    from open_clip import get_tokenizer, image_transform
    from open_clip_train.data import get_wds_dataset

    paths = shards.replace("*", f"{{00000..{SHARDS - 1:05d}}}")
    arguments = SimpleNamespace(
        train_data=paths, train_num_samples=10**6, train_data_upsampling_factors=None, dataset_resampled=True,
        seed=0, batch_size=BATCH, workers=workers, world_size=1,
    )  # fmt: skip
    transform = image_transform(224, is_train=True)
    data = get_wds_dataset(arguments, transform, True, tokenizer=get_tokenizer("ViT-B-32"))
    for images, _ in data.dataloader:
        yield images


SIDES = {
    "ours": ours,
    "ours, scaled decode": lambda shards, workers: ours(shards, workers, scaled_decode=True),
    "open_clip": open_clip,
}


def rate(side: str, shards: str, workers: int, checkouts: list[str]) -> float:
    """Return the samples a second of a side."""
    sys.path[:0] = checkouts
    multiprocessing.set_start_method("fork", force=True)  # of workers; this process was spawned
    torch.set_num_threads(1)
    if side != "open_clip":
        keep_freed_memory()  # as the `mmcontrast` command does
    batches = SIDES[side](shards, workers)
    for _ in range(WARM):
        next(batches)
    start = time.perf_counter()
    for _ in range(TIMED):
        assert next(batches).shape == (BATCH, 3, 224, 224)
    return TIMED * BATCH / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", nargs="*", default=[], help="folders that peers are imported from")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("data/reading"))
    options = parser.parse_args()
    sides = list(SIDES) if options.checkouts else ["ours", "ours, scaled decode"]
    context = multiprocessing.get_context("spawn")
    for name, size in SIZES.items():
        if not (options.folder / name).exists():
            make(options.folder / name, *size)
        for workers in options.workers:
            rates: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(options.pairs):
                for side in sides:
                    with ProcessPoolExecutor(1, mp_context=context) as pool:  # whose processes may have workers of their own
                        task = pool.submit(rate, side, str(options.folder / name / "*.tar"), workers, options.checkouts)
                        rates[side].append(task.result())
            line = [f"{side} {statistics.median(values):,.0f}/s" for side, values in rates.items()]
            for side in sides[:2] if options.checkouts else []:
                ratios = [a / b for a, b in zip(rates[side], rates["open_clip"], strict=True)]
                line.append(f"{side} / open_clip {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
            print(f"{name}, {workers} workers: {'; '.join(line)}", flush=True)


if __name__ == "__main__":
    main()
