"""Measures time and peak memory of the stages of an embedding table, hard negatives (exactly and by IVF) and near duplicates,
against the bare product.

    python benchmarks/mining.py --rows 200000
    python benchmarks/mining.py --rows 1000000 --stages ivf
    python benchmarks/mining.py --rows 1000000 --stages exact,ivf               # on 2 cores the exact one takes hours
    python benchmarks/mining.py --rows 10000000 --dim 64 --stages dedup         # 5.5 GB of disk

The table is synthetic: clusters of unit rows, two fields, of which near duplicates read one. Each stage is a process of its
own (Linux). `anon_mb` is the peak of what only that process holds, `peak_mb` also has the pages of the table that it had
mapped. The rate of the product is that of torch on tiles of the same shape; the ideal of mining is all pairs at that rate, that
of near duplicates what k-means and the pairs within its clusters multiply.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from mmcontrast.curation import kmeans

CLUSTER = 500  # rows


def write_table(folder: Path, rows: int, dim: int) -> None:
    """Write a table in parts, so that it is never in memory as a whole."""
    from mmcontrast.evaluation import EmbeddingTable, TableSlice
    from mmcontrast.evaluation.embed import PART_ROWS

    generator = torch.Generator().manual_seed(0)
    clusters = max(1, rows // CLUSTER)
    centres = F.normalize(torch.randn(clusters, dim, generator=generator), dim=1)

    def table(first: int) -> EmbeddingTable:
        n = min(PART_ROWS, rows - first)
        spread = torch.randn(n, dim, generator=generator) / dim**0.5
        image = F.normalize(centres[torch.randint(clusters, (n,), generator=generator)] + spread, dim=1)
        text = F.normalize(image + 0.5 * torch.randn(n, dim, generator=generator) / dim**0.5, dim=1)
        ids, present = torch.arange(first, first + n), torch.ones(n, dtype=torch.bool)
        metadata = [{"key": f"k{row}"} for row in ids.tolist()]
        return EmbeddingTable({"image": image, "text": text}, {"image": present, "text": present.clone()}, ids, ids, metadata)

    table_slice = TableSlice(folder, 1, 1)
    table_slice.write((table(first) for first in range(0, rows, PART_ROWS)), rows, {})
    assert table_slice.complete()


def product_rate(dim: int) -> float:
    """Return the multiply-adds a second of tiles as the exact search has them."""
    from mmcontrast.curation.windows import QUERIES
    from mmcontrast.search.table import BLOCK_ROWS

    queries, candidates = torch.randn(QUERIES, dim), torch.randn(BLOCK_ROWS, dim).T
    queries @ candidates
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        queries @ candidates
        seconds.append(time.perf_counter() - start)
    return QUERIES * BLOCK_ROWS * dim / sorted(seconds)[4]


def kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def run(folder: str, stage: str, threads: int, answers: multiprocessing.Queue) -> None:
    import faiss

    from mmcontrast.curation.mine import MiningOptions, mine
    from mmcontrast.curation.near import drop_near_duplicates

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    anon, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            anon[0] = max(anon[0], kilobytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    table, out = Path(folder) / "table", Path(folder) / f"{stage}.parquet"
    start = time.perf_counter()
    if stage == "dedup":
        summary = drop_near_duplicates(table, out, "image")
        about = {name: summary[name] for name in ("dropped", "largest_cluster")} | {"pairs": comparisons(out)}
    else:
        search: Any = stage
        summary = mine(table, out, MiningOptions("image", "text", 10, relative_margin=0.05, range_max=50, search=search))
        about = {name: summary[name] for name in ("short_queries", "search")}
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    measures = {"seconds": round(seconds, 1), "peak_mb": kilobytes("VmHWM") // 1000, "anon_mb": anon[0] // 1000}
    answers.put(measures | about)


def comparisons(out: Path) -> int:
    """Return the pairs of a row and a centroid, or of two rows, that removing near duplicates has multiplied."""
    sizes = np.bincount(pq.read_table(out, columns=["cluster"])["cluster"].to_numpy())
    sample = min(int(sizes.sum()), max(kmeans.POINTS * len(sizes), kmeans.LEAST))
    return 20 * sample * len(sizes) + int(sizes.sum()) * len(sizes) + int((sizes.astype(np.int64) ** 2).sum()) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--stages", default="exact,ivf,dedup")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = tempfile.mkdtemp(prefix="mining-")
    spawn = multiprocessing.get_context("spawn")
    try:
        write_table(Path(folder) / "table", options.rows, options.dim)
        rate = product_rate(options.dim)
        for stage in options.stages.split(","):
            answers = spawn.Queue()
            process = spawn.Process(target=run, args=(folder, stage, options.threads, answers))
            process.start()
            result = answers.get()
            process.join()
            pairs = result.pop("pairs", options.rows**2)
            result["of_product"] = round(result["seconds"] * rate / (pairs * options.dim), 2)
            print(json.dumps({"rows": options.rows, "dim": options.dim, "stage": stage} | result), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
