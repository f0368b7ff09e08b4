"""Measures faiss on the card: exact search against our `nearest`, and an ivf_pq index learnt there or on the host."""

import shutil
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpu_parts.results import Record, Results
from gpu_parts.runner import Context, Missing, Skip
from gpu_parts.summary import markdown

SIZES = {"cuda": (1_000_000, 10_000, 512), "cpu": (2000, 50, 16)}  # rows, queries, width
TABLE = {"cuda": (300_000, 256), "cpu": (1200, 16)}  # rows and width of what is indexed
AT = 10


def run(context: Context) -> None:
    from faiss import get_num_gpus  # an ImportError ends the part: faiss is missing

    gpus = get_num_gpus() if context.device == "cuda" else 0
    for name in ("ours", "faiss"):
        context.measure(f"exact search: {name}", partial(exact, context, name, gpus), limit=60, expected=6)
    for where in ("card", "host"):
        context.measure(f"ivf_pq learnt on the {where}", partial(index, context, where, gpus), limit=90, expected=15)


def exact(context: Context, name: str, gpus: int) -> dict[str, Any]:
    """Return the seconds of a search, with its rows on the device, and the share of places that are the same as ours."""
    from mmcontrast.evaluation.neighbours import nearest

    rows, number, width = SIZES[context.device]
    generator = torch.Generator(context.device).manual_seed(0)
    table, queries = (
        F.normalize(torch.randn(n, width, generator=generator, device=context.device), dim=1) for n in (rows, number)
    )

    def our_search() -> torch.Tensor:
        return nearest(queries, table, AT)[1].cpu()

    our_places = our_search()
    search = our_search if name == "ours" else faiss_search(context, table, queries, gpus)
    search()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found_places = search()
        times.append(time.perf_counter() - start)
    same = (found_places.sort(1).values == our_places.sort(1).values).double().mean().item()
    return {"seconds": statistics.median(times), "rows": rows, "queries": number, "width": width, "same": same}


def faiss_search(context: Context, table: torch.Tensor, queries: torch.Tensor, gpus: int) -> Any:
    import faiss

    if context.device == "cuda" and not gpus:
        raise Missing("this faiss uses no GPU: faiss-gpu does")
    index = faiss.IndexFlatIP(table.shape[1])
    index = faiss.index_cpu_to_all_gpus(index) if gpus else index
    index.add(table.cpu().numpy())
    query_rows = queries.cpu().numpy()
    return lambda: torch.from_numpy(index.search(query_rows, AT)[1])


def index(context: Context, where: str, gpus: int) -> dict[str, Any]:
    """Return the seconds and the measured recall of `build_index` on random clusters."""
    from mmcontrast.evaluation import EmbeddingTable
    from mmcontrast.search import build_index

    if where == "card" and not gpus:
        raise Skip("this faiss uses no GPU")
    rows, width = TABLE[context.device]
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(64, width, generator=generator)
    nearby = centres[torch.randint(64, (rows,), generator=generator)] + torch.randn(rows, width, generator=generator)
    folder, numbers = context.scratch / "table", torch.arange(rows)
    shutil.rmtree(folder, ignore_errors=True)
    present = {"image": torch.ones(rows, dtype=torch.bool)}
    metadata = [{"key": str(number)} for number in range(rows)]
    table = EmbeddingTable({"image": F.normalize(nearby, dim=1)}, present, numbers, numbers, metadata)
    table.write(folder, {"model": "none", "checkpoint": "none", "shards": "none"})
    start = time.perf_counter()
    description = build_index(folder, kind="ivf_pq", device="cpu" if where == "host" else None, progress=False)
    seconds = time.perf_counter() - start
    recall = description["fields"]["image"]["recall"]["value"]
    return {"where": where, "rows": rows, "width": width, "seconds": seconds, "recall": recall}


def table(records: list[Record], results: Results) -> str:
    searches, indexes = [], []
    for record in records:
        v = record["values"]
        if "same" in v:
            shape = f"{v['queries']:,} in {v['rows']:,} × {v['width']}"
            searches.append([record["key"], shape, f"{v['seconds'] * 1e3:,.1f}", f"{v['same']:.4f}"])
        else:
            indexes.append([record["key"], f"{v['rows']:,} × {v['width']}", f"{v['seconds']:.1f}", f"{v['recall']:.3f}"])
    tables = [markdown(["", "queries in rows", "ms", "same places as ours"], searches)]
    tables.append(markdown(["index", "rows", "s, with its search for the recall", "recall at 10"], indexes))
    return "\n\n".join(text for text in tables if text)
