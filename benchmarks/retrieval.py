"""Measures time and memory of retrieval metrics both ways: ours, dense ones by chunks of queries, and CLIP_benchmark's.

    python benchmarks/retrieval.py                                  # 50,000 × 50,000, width 256, three pairs of runs
    python benchmarks/retrieval.py --n 200000 --pairs 1
    python benchmarks/retrieval.py --n 20000 --pairs 1 --clip-benchmark

Every run is a process of its own (Linux), one after the other on the same inputs; its peak is all that the process held, torch
and the embeddings included. The dense versions take one direction after the other, 1,024 queries at a time: `counting`
compares a chunk's scores with each query's own (all of the metrics, the least work), `topk` takes the ten best (recall at 1,
5 and 10 alone). All must give the same recall.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AT = (1, 5, 10)
Recalls = dict[str, list[float]]


def inputs(n: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return unit rows [n, dim] of two fields, such that about a third of the samples are found first."""
    generator = torch.Generator().manual_seed(0)
    first = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    return first, F.normalize(first + 0.19 * torch.randn(n, dim, generator=generator), dim=1)


def ours(first: Tensor, second: Tensor) -> Recalls:
    from mmcontrast.evaluation.rankings import Pairs, rank
    from mmcontrast.evaluation.retrieval import retrieval_metrics

    groups = torch.arange(len(first))
    rankings = rank(first, second, Pairs.of_groups(groups, groups), both=True)
    metrics = [retrieval_metrics(ranking, AT) for ranking in rankings]
    return {way: [values[f"recall_at_{k}"] for k in AT] for way, values in zip(("there", "back"), metrics, strict=True)}


def counting(first: Tensor, second: Tensor) -> Recalls:
    def recalls(queries: Tensor, candidates: Tensor) -> list[float]:
        ranks = []
        for rows in torch.arange(len(queries), device=queries.device).split(1024):
            scores = queries[rows] @ candidates.T
            ranks.append((scores >= scores[torch.arange(len(rows), device=rows.device), rows, None]).sum(1))
        return [(torch.cat(ranks) <= k).double().mean().item() for k in AT]

    return {"there": recalls(first, second), "back": recalls(second, first)}


def topk(first: Tensor, second: Tensor) -> Recalls:
    def recalls(queries: Tensor, candidates: Tensor) -> list[float]:
        hits = []
        for rows in torch.arange(len(queries), device=queries.device).split(1024):
            best = (queries[rows] @ candidates.T).topk(max(AT), dim=1).indices
            hits.append(best == rows[:, None])
        return [torch.cat(hits)[:, :k].any(1).double().mean().item() for k in AT]

    return {"there": recalls(first, second), "back": recalls(second, first)}


def clip_benchmark(first: Tensor, second: Tensor) -> Recalls:
    """Return CLIP_benchmark's recalls, as its zero-shot retrieval computes them of the embeddings of all batches of 64."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = first @ second.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(first)), torch.arange(len(first))] = True

    def recalls(*both: Tensor) -> list[float]:
        return [(batchify(recall_at_k, *both, 64, "cpu", k=k) > 0).double().mean().item() for k in AT]

    return {"there": recalls(scores, positive), "back": recalls(scores.T, positive.T)}


def measure(contender: Callable[[Tensor, Tensor], Recalls], n: int, dim: int, threads: int) -> tuple[float, int, Recalls]:
    """Return (seconds, peak bytes of the process, recalls)."""
    torch.set_num_threads(threads)
    first, second = inputs(n, dim)
    contender(first[:64], second[:64])  # imports, and the libraries' first use
    start = time.perf_counter()
    recalls = contender(first, second)
    seconds = time.perf_counter() - start
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return seconds, peak, recalls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contenders", nargs="+", default=["counting", "topk"], choices=["counting", "topk"])
    parser.add_argument("--clip-benchmark", action="store_true", help="CLIP_benchmark too: 5·N² bytes and much time")
    options = parser.parse_args()
    contenders = [ours, *(globals()[name] for name in options.contenders)] + [clip_benchmark] * options.clip_benchmark
    print(f"{options.n:,} × {options.n:,}, width {options.dim}, both directions, {options.threads} threads")
    times: dict[str, list[float]] = {contender.__name__: [] for contender in contenders}
    for _ in range(options.pairs):
        reference: Recalls = {}
        for contender in contenders:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                seconds, peak, result = process.apply(measure, (contender, options.n, options.dim, options.threads))
            times[contender.__name__].append(seconds)
            reference = reference or result
            for way, recalls in result.items():  # near ties may fall either way where products are rounded otherwise
                differences = [abs(a - b) for a, b in zip(recalls, reference[way], strict=True)]
                assert max(differences) <= 3 / options.n, (result, reference)
            shown = ", ".join(f"{value:.4f}" for value in result["there"])
            print(f"{contender.__name__:>15}: {seconds:8.1f} s, peak {peak / 2**30:5.2f} GiB, recall {shown}", flush=True)
    for contender in contenders[1:]:
        ratios = sorted(a / b for a, b in zip(times["ours"], times[contender.__name__], strict=True))
        median, span = statistics.median(ratios), f"{ratios[0]:.2f}–{ratios[-1]:.2f}"
        print(f"ours / {contender.__name__}: {median:.2f} ({span}, {len(ratios)} pairs)")


if __name__ == "__main__":
    main()
