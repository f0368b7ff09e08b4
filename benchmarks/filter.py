"""Measures the samples a second of a filter: `mmcontrast data filter`, and webdataset with Python over the json, in turn.

    python benchmarks/filter.py                     # --pairs 5 --samples 40000

img2dataset-style tars (made on the first run): .jpg of about 30 kB, .txt, .json. The rules are a caption of at least 3 words
and 6 characters, a smaller side of at least 200, an aspect of at most 3, and a similarity of at least 0.28; sides by the json,
or by the pictures' headers (PIL's lazy open, in both). Each measurement is one process, which writes what is kept: ours a
selection with its page, its index of the tars made anew ("first") or there already ("again"); the other a Parquet file of keys.
Both keep the same.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image
from rich.progress import track

EACH = 2000  # samples of a shard
WORDS = ["a", "red", "fox", "in", "the", "snow", "beside", "an", "old", "wooden", "bridge", "photograph", "2019", "stock"]
RULES = [
    {"type": "words", "min": 3}, {"type": "characters", "min": 6}, {"type": "pixels", "min": 200}, {"type": "aspect", "max": 3},
    {"column": "json:similarity", "min": 0.28},
]  # fmt: skip


def make(folder: Path, samples: int) -> None:
    """Write tars of pictures of sixteen sizes, whose captions and scores differ."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    pictures = []
    for _ in range(16):
        width, height = (int(side) for side in random.integers(120, 640, 2))
        pixels = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        target = io.BytesIO()
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).save(target, "JPEG", quality=85)
        pictures.append((target.getvalue(), width, height))
    for shard in track(range(samples // EACH), f"writing {folder}"):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for row in range(EACH):
                data, width, height = pictures[int(random.integers(16))]
                caption = " ".join(random.choice(WORDS, int(random.integers(1, 12))))
                key = f"{shard:05d}{row:04d}"
                metadata = {"url": f"https://example.com/{key}.jpg", "caption": caption, "key": key, "status": "success"}
                metadata |= {"width": width, "height": height, "similarity": round(float(random.normal(0.3, 0.05)), 4)}
                metadata |= {"error_message": None, "exif": "{}", "sha256": f"{shard * EACH + row:064x}"}
                writer.write({"__key__": key, "jpg": data, "txt": caption, "json": json.dumps(metadata).encode()})


def ours(folder: Path, headers: bool, cache: str) -> tuple[float, list[str]]:
    """Run `mmcontrast data filter`; return (seconds, keys that are kept)."""
    os.environ["MMCONTRAST_CACHE"] = cache
    from mmcontrast.curation.filter import Filter
    from mmcontrast.curation.rules import parse_rules
    from mmcontrast.curation.run_stage import run_stage

    sides = {} if headers else {"width": "json:width", "height": "json:height"}
    rules = [{**rule, **(sides if rule.get("type") in ("pixels", "aspect") else {})} for rule in RULES]
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        run_stage(Filter(parse_rules({"rules": rules}, "rules")), str(folder / "*.tar"), Path(out) / "selection", workers=1)
        seconds = time.perf_counter() - start
        tables = [pq.read_table(part) for part in sorted((Path(out) / "selection" / "parts").iterdir())]
    return seconds, [key for table in tables for key in table.filter(table["keep"])["key"].to_pylist()]


def baseline(folder: Path, headers: bool, cache: str) -> tuple[float, list[str]]:
    """Run the obvious loop; return (seconds, keys that are kept)."""
    kept = []
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        for sample in webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False):
            metadata = json.loads(sample["json"])
            caption = sample["txt"].decode().strip()
            if headers:
                with Image.open(io.BytesIO(sample["jpg"])) as image:
                    width, height = image.size
            else:
                width, height = metadata["width"], metadata["height"]
            if (
                len(caption.split()) >= 3
                and len(caption) >= 6
                and min(width, height) >= 200
                and max(width, height) / min(width, height) <= 3
                and metadata["similarity"] >= 0.28
            ):
                kept.append(metadata["key"])
        pq.write_table(pa.table({"key": kept}), Path(out) / "kept.parquet")
        return time.perf_counter() - start, kept


def run_in_process(function: object, *arguments: object) -> tuple[float, list[str]]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--data", type=Path, default=Path("data/benchmark_filter"))
    options = parser.parse_args()
    samples = max(1, options.samples // EACH) * EACH
    folder = options.data / str(samples)
    if not folder.exists():
        make(folder, samples)
    for headers in (False, True):
        rates: dict[str, list[float]] = {"first": [], "again": [], "webdataset": []}
        for _ in range(options.pairs):
            with tempfile.TemporaryDirectory() as cache:
                results = {"webdataset": run_in_process(baseline, folder, headers, cache)}
                results["first"] = run_in_process(ours, folder, headers, cache)
                results["again"] = run_in_process(ours, folder, headers, cache)
            assert results["first"][1] == results["again"][1] == results["webdataset"][1], "they keep others"
            for name, (seconds, _kept) in results.items():
                rates[name].append(samples / seconds)
        print(f"sides by {'headers' if headers else 'the json'}: {len(results['first'][1])} of {samples} are kept")
        for name, values in rates.items():
            ratios = [rate / baseline_rate for rate, baseline_rate in zip(values, rates["webdataset"], strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            print(f"  {name:12} {statistics.median(values):8.0f} samples/s, of webdataset's {spread}")


if __name__ == "__main__":
    main()
