"""Measures the communication of a loss, for benchmarks/scale.py: calls and bytes, the cost model against measured steps."""

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from counting import Counted
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmcontrast import contrastive_loss
from mmcontrast.config import load_config
from mmcontrast.plan import GIB, plan_run
from mmcontrast.scaling import Cluster
from mmcontrast.score import LogSumExp, score_statistics
from mmcontrast.score.backends import SameGroup
from mmcontrast.score.ranks import ALL_GATHER, REDUCE_SCATTER, driver
from mmcontrast.score.traffic import SCHEMES, Calls, Link, blocks_of, gathered_bytes, loss_calls, passes

CONFIGS = Path(__file__).parent.parent / "configs"
RANKS, WITHIN = 8, 4  # two nodes of four, which are processes of this machine
ROWS, WIDTH, REPEATS = 512, 256, 7
CHAIN = 8  # equal calls in a row, of which each is time_in_turn
Timed = dict[str, Callable[[], Any]]


def run_on_ranks(function: Callable[..., None], *arguments: Any) -> Any:
    """Return what the first of RANKS forks of this process puts into a queue."""
    context = mp.get_context("fork")
    queue = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=run_rank, args=(function, rank, port, queue, *arguments)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    answer = queue.get()
    for rank in ranks:
        rank.join()
    return answer


def run_rank(function: Callable[..., None], rank: int, port: int, queue: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(WITHIN)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    answer = function(rank, *arguments)
    if rank == 0:
        queue.put(answer)
    dist.barrier()
    dist.destroy_process_group()


def unit_rows(rank: int, rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1).requires_grad_() for _ in "ab"]


def count_on(rank: int) -> dict[str, tuple[dict[str, int], dict[str, int], int]]:
    counts = {}
    SameGroup._pairs = None  # as on a GPU, where ids are not compare_parts on the host
    for scheme in SCHEMES:
        x, y = unit_rows(rank, 64)
        ids = torch.arange(64) + 64 * rank
        with Counted() as counted:
            loss = contrastive_loss(
                {"a": x, "b": y}, ids=ids, logit_scale=50.0, group=dist.group.WORLD, communication=scheme
            )  # fmt: skip
            loss.backward()
        counts[scheme] = dict(counted.calls), dict(counted.sent), counted.waits
    return counts


def calls() -> Iterator[str]:
    """Count the calls, bytes and waits of a rank in one loss of two fields, by scheme."""
    yield f"Counted on {RANKS} gloo ranks as {RANKS // WITHIN} nodes of {WITHIN}, 64 rows a rank, D = {WIDTH}, infonce with"
    yield "group ids, fp32 (by the formula in brackets). Messages: of moves one a tensor, of a collective of W ranks W − 1.\n"
    yield "| scheme | moves | collectives | messages | KiB sent | host waits |"
    yield "|---|---|---|---|---|---|"
    for scheme, (number, sent, waits) in run_on_ranks(count_on).items():
        formula = loss_calls(scheme, RANKS // WITHIN, WITHIN, 64, passes(WIDTH))
        formula.append(Calls("all_gather", RANKS, 2, 1, 1, (RANKS - 1) * 4 * 8))
        moves = sum(call.messages for call in formula if call.kind == "move")
        collectives = sum(call.count for call in formula if call.kind != "move")
        counted = number.get("move", 0), sum(n for kind, n in number.items() if kind != "move")
        yield (
            f"| {scheme} | {counted[0]} ({moves}) | {counted[1]} ({collectives}) | {sum(call.messages for call in formula)} |"
            f" {sum(sent.values()) / 1024:.1f} ({sum(call.sent for call in formula) / 1024:.1f}) | {waits} |"
        )
    yield "\nBy the same formulas, D = 512, a batch of 524,288, 8 ranks a node, of a rank in a loss. Before: the host waited"
    yield "for each rank's size of each field.\n"
    yield "| ranks | scheme | calls in turn | MiB between nodes | within | MiB of others' columns | host waits before | now |"
    yield "|---|---|---|---|---|---|---|---|"
    for ranks in (8, 64, 512, 4096):
        rows = 524_288 // ranks
        for scheme in SCHEMES:
            if scheme == "hierarchical" and ranks == 8:
                continue
            formula = loss_calls(scheme, ranks // 8, 8, rows, passes(512))
            across, inside = traffic_of(scheme, formula, ranks)
            held = gathered_bytes(scheme, ranks // 8, 8, rows, 512)
            yield (
                f"| {ranks:,} | {scheme} | {sum(call.count for call in formula) + 1:,} | {across / 2**20:,.0f} |"
                f" {inside / 2**20:,.0f} | {held / 2**20:,.0f} | {2 * ranks:,} | 1 |"
            )


def traffic_of(scheme: str, formula: list[Calls], ranks: int) -> tuple[float, float]:
    """Return the bytes that leave a node's busiest device for others, and that stay within."""
    moved = sum(call.sent for call in formula if call.kind == "move")
    gathered = sum(call.sent for call in formula if call.kind != "move")
    if ranks == 8:
        return 0, moved + gathered
    if scheme == "gather":
        return gathered * (ranks // 8 - 1) / (ranks - 1), gathered
    return moved, moved * (scheme == "ring") + gathered


def time_in_turn(works: Timed, group: dist.ProcessGroup) -> list[dict[str, float]]:
    """Run each work in turn; return for every repeat the seconds of each, the mean over the ranks."""
    repeats = []
    for _ in range(REPEATS + 1):
        seconds_of = {}
        for name, run in works.items():
            dist.barrier(group)
            start = time.perf_counter()
            run()
            seconds = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(seconds, group=group)
            seconds_of[name] = float(seconds) / dist.get_world_size(group)
        repeats.append(seconds_of)
    return repeats[1:]


def replay(scheme: str, group: dist.ProcessGroup, ranks: int, within: int) -> Callable[[], None]:
    """Return a function that sends all that a loss sends, and computes nothing."""

    def run() -> None:
        loss_driver = driver(group, [ROWS] * ranks, scheme, within, WIDTH, "cpu")
        for loss_pass in passes(WIDTH):
            columns = [torch.zeros(ROWS, n // 4) if n > 8 else torch.zeros(ROWS, dtype=dtype_of(n)) for n in loss_pass.out]
            home, merge = loss_driver.accumulator(), [torch.add] * len((*loss_pass.home, *loss_pass.home_matrices))
            for step, block in loss_driver.visits(columns):
                results = [torch.zeros(len(block[0]), dtype=dtype_of(n)) for n in loss_pass.home]
                results += [torch.zeros(len(block[0]), n // 4) for n in loss_pass.home_matrices]
                home.add(step, merge, results)
            home.home()

    return run


def dtype_of(size: int) -> torch.dtype:
    return torch.int64 if size == 8 else torch.float32


def calls_of_a_kind(group: dist.ProcessGroup, numbers: int) -> Timed:
    """Return CHAIN calls of each kind that send so many fp32 numbers to each other rank; moves send a few more."""
    members, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    ranks = len(members)
    right, left = members[(rank + 1) % ranks], members[(rank - 1) % ranks]
    part, whole = torch.zeros(numbers), torch.zeros(numbers * ranks)
    columns = [torch.zeros(numbers), torch.zeros(SMALL)]

    def move() -> None:
        arriving = [torch.empty_like(tensor) for tensor in columns]
        sent = [dist.P2POp(dist.isend, tensor, right, group, k) for k, tensor in enumerate(columns)]
        for work in dist.batch_isend_irecv(sent + [dist.P2POp(dist.irecv, o, left, group, k) for k, o in enumerate(arriving)]):
            work.wait()

    def chain(call: Callable[[], Any]) -> Callable[[], None]:
        return lambda: [call() for _ in range(CHAIN)] and None

    return {
        "move": chain(move),
        "all_gather": chain(lambda: ALL_GATHER(torch.empty_like(whole), part, group=group)),
        "all_to_all": chain(lambda: dist.all_to_all_single(torch.empty_like(whole), whole, group=group)),
        "reduce_scatter": chain(lambda: REDUCE_SCATTER(torch.empty_like(part), whole, group=group)),
    }


SMALL, LARGE = 64, ROWS * WIDTH  # numbers of a call whose time is taken
SHARES = 8, 2  # of the gradients


def constants(seconds_of: dict[str, float], ranks: int, gradients: int, where: str = "") -> dict[str, tuple[float, float]]:
    """Return for each kind of call its seconds, and the seconds for each byte that a rank sends."""
    costs = {}
    for kind in ("move", "all_gather", "all_to_all", "reduce_scatter"):
        factor = 1 if kind == "move" else ranks - 1
        small, large = (seconds_of[f"{where}{kind} of {n}"] / CHAIN for n in (SMALL, LARGE))
        per_byte = max(0.0, (large - small) / (4 * (LARGE - SMALL) * factor))
        costs[kind] = max(0.0, small - 4 * SMALL * factor * per_byte), per_byte
    small, large = (seconds_of[f"all_reduce of 1/{share}"] for share in SHARES)
    per_gradient = max(0.0, (large - small) / (gradients // SHARES[1] - gradients // SHARES[0]))
    costs["all_reduce"] = large - per_gradient * (gradients // SHARES[1]), per_gradient / (4 * 2 * (ranks - 1) / ranks)
    return costs


def measure_on(rank: int) -> list[tuple[int, list[dict[str, float]], int]]:
    """Time everything on groups of 1, 2, 4 and 8 ranks; return (ranks, seconds, FLOPs of the towers a sample) of each."""
    results = []
    torch.manual_seed(0)
    towers = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(6)), nn.Linear(512, WIDTH))
    with FlopCounterMode(display=False) as counter:
        towers(torch.zeros(1, 512, requires_grad=True)).sum().backward()
    numbers = sum(p.numel() for p in towers.parameters())

    def trained(samples: int) -> Callable[[], None]:
        return lambda: towers(torch.zeros(samples, 512, requires_grad=True)).sum().backward()

    nodes = [dist.new_group(list(range(first, first + WITHIN))) for first in range(0, RANKS, WITHIN)]
    for ranks in (1, 2, 4, 8):
        group = dist.new_group(list(range(ranks)))
        if rank < ranks:
            x, y = unit_rows(rank, ROWS)
            z = F.normalize(torch.randn(ROWS * ranks, WIDTH), dim=1).requires_grad_()
            many, few = unit_rows(rank, 2 * ROWS), unit_rows(rank, SMALL)
            gradients = torch.zeros(numbers)

            def loss(scheme: str | None, x: Tensor = x, y: Tensor = y, group: dist.ProcessGroup = group) -> None:
                group_of = group if scheme else None
                contrastive_loss(
                    {"a": x, "b": y}, ids=torch.arange(len(x)), logit_scale=50.0, group=group_of, communication=scheme or "auto"
                ).backward()  # fmt: skip

            def step(scheme: str | None, group: dist.ProcessGroup = group, gradients: Tensor = gradients) -> None:
                x, y = (F.normalize(towers(torch.randn(ROWS, 512, requires_grad=True)), dim=1) for _ in "xy")
                ids = torch.arange(ROWS)
                contrastive_loss(
                    {"a": x, "b": y}, ids=ids, logit_scale=50.0, group=group if scheme else None, communication=scheme or "auto"
                ).backward()  # fmt: skip
                if scheme:
                    dist.all_reduce(gradients, group=group)

            def products(x: Tensor = x, z: Tensor = z) -> None:
                ids = torch.arange(len(z))
                rows, _ = score_statistics(
                    x, z, [LogSumExp()], scale=50.0, ids=ids[: len(x)], column_ids=ids, paired=False, columns=False
                )
                rows[LogSumExp()].sum().backward()

            works: Timed = {"towers of 256": trained(256), "towers": trained(1024), "products": products}
            for rows, (a, b) in (("many", many), ("few", few)):
                works[f"products of {rows}"] = lambda a=a, b=b: products(a, b)
                works[f"loss of {rows}"] = lambda a=a, b=b: loss(None, a, b)
            if ranks == 1:
                works |= {"loss": lambda run=loss: run(None), "step": lambda run=step: run(None)}
            else:
                for n in (SMALL, LARGE):
                    works |= {f"{kind} of {n}": run for kind, run in calls_of_a_kind(group, n).items()}
                    if ranks > WITHIN:
                        node_calls = calls_of_a_kind(nodes[rank // WITHIN], n)
                        works |= {f"in a node, {kind} of {n}": run for kind, run in node_calls.items()}
                for share in SHARES:
                    part = torch.zeros(numbers // share)
                    works[f"all_reduce of 1/{share}"] = lambda g=part, group=group: dist.all_reduce(g, group=group)
                works["reduction of the gradients"] = lambda g=gradients, group=group: dist.all_reduce(g, group=group)
                for scheme in schemes_of(ranks):
                    works[f"sent by {scheme}"] = replay(scheme, group, ranks, WITHIN)
                    works[f"loss by {scheme}"] = lambda scheme=scheme, run=loss: run(scheme)
                    works[f"step by {scheme}"] = lambda scheme=scheme, run=step: run(scheme)
            results.append((ranks, time_in_turn(works, group), counter.get_total_flops()))
        dist.barrier()
    return results


def schemes_of(ranks: int) -> list[str]:
    return [scheme for scheme in SCHEMES if scheme != "hierarchical" or ranks > WITHIN]


def compare_parts(ranks: int, seconds_of: dict[str, float], flops: int) -> Iterator[tuple[str, float, float]]:
    """Yield (part, measured, predicted) of one repeat."""
    scores = (2 * ROWS) ** 2  # of what is time_in_turn; fewer take a fixed time
    block, fixed = seconds_of["products of few"], seconds_of["loss of few"]
    per_score, per_score_of_loss = (
        (seconds_of["products of many"] - block) / scores,
        (seconds_of["loss of many"] - fixed) / scores,
    )
    score_count = ROWS * ROWS * ranks
    towers = 1024 / 256 * seconds_of["towers of 256"]
    yield "towers", seconds_of["towers"], towers
    yield "products", seconds_of["products"], block + score_count * per_score
    if ranks == 1:
        predicted = fixed + score_count * per_score_of_loss
        yield "loss", seconds_of["loss"], predicted
        yield "step", seconds_of["step"], towers + predicted
        return
    gradients = flops // 6  # a weight is 6 FLOPs
    costs = {ranks: constants(seconds_of, ranks, gradients)}
    if ranks > WITHIN:  # of a ring of two nodes the moves are those of eight ranks
        costs |= {WITHIN: constants(seconds_of, WITHIN, gradients, "in a node, "), ranks // WITHIN: costs[ranks]}

    def seconds(call: Calls) -> float:
        per_call, per_byte = costs[call.ranks][call.kind]
        return call.count * per_call + call.sent * per_byte

    reduction = seconds(Calls("all_reduce", ranks, 1, 1, 1, 2 * (ranks - 1) * 4 * gradients // ranks))
    yield "reduction of the gradients", seconds_of["reduction of the gradients"], reduction
    for scheme in schemes_of(ranks):
        nodes = max(1, ranks // WITHIN)
        formula = loss_calls(scheme, nodes, ranks // nodes, ROWS, passes(WIDTH))
        alone = sum(seconds(call) for call in formula)
        yield f"sent by {scheme}", seconds_of[f"sent by {scheme}"], alone
        predicted = fixed + (blocks_of(scheme, nodes, ranks // nodes) - 1) * block + score_count * per_score_of_loss + alone
        predicted += seconds(Calls("all_gather", ranks, 1, 1, 1, (ranks - 1) * 32))
        yield f"loss by {scheme}", seconds_of[f"loss by {scheme}"], predicted
        yield f"step by {scheme}", seconds_of[f"step by {scheme}"], towers + predicted + reduction


def model() -> Iterator[str]:
    """Compare the cost model with measurements on this machine, by parts, on 1, 2, 4 and 8 ranks."""
    yield f"{ROWS} rows a rank, D = {WIDTH}; towers of 1,024 samples; ms, means of the ranks. In turn with them are taken,"
    yield f"on as many ranks at once: towers of 256 samples, a loss of {2 * ROWS} rows and one of {SMALL} alone, small and"
    yield f"large calls of each kind. Medians of {REPEATS} repeats, of model / measured as well."
    yield f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}.\n"
    yield "| ranks | part | measured | model / measured | of single repeats |"
    yield "|---|---|---|---|---|"
    errors: dict[str, list[float]] = {}
    for ranks, repeats, flops in run_on_ranks(measure_on):
        rows = zip(*(compare_parts(ranks, seconds_of, flops) for seconds_of in repeats), strict=True)
        for of_part in rows:
            (name, *_), *_ = of_part
            ratios = sorted(predicted / measured for _, measured, predicted in of_part)
            ratio, measured = statistics.median(ratios), statistics.median(measured for _, measured, _ in of_part)
            errors.setdefault(name.split(" by ")[0], []).append(abs(ratio - 1))
            yield f"| {ranks} | {name} | {measured * 1e3:.1f} | {ratio:.2f} | {ratios[0]:.2f}–{ratios[-1]:.2f} |"
    by_kind = ", ".join(f"{kind} {statistics.median(values):.0%}" for kind, values in errors.items())
    every = [error for values in errors.values() for error in values]
    yield f"\nMedian error: {by_kind}; of all {statistics.median(every):.0%}, the worst {max(every):.0%}."


A800 = Cluster(gpu="A800", within=Link(2e-6, 200e9), link=Link(5e-6, 50e9))
FIGURE_4 = {32: 25.0, 64: 49.4, 128: 98.3, 256: 200.3}  # batch / 1,024: seconds of a step
TABLE_1 = [(8, 32, 0.18), (8, 256, 1.45), (8, 1024, 6.53), (32, 256, 0.35), (32, 1024, 1.44)]  # GPUs, batch / 1,024, GB
TABLE_2 = [(8, 4096), (32, 12_288)]  # with inputs on the host, as ours


def published() -> Iterator[str]:
    """Compare Inf-CL's published rows with `mmcontrast plan`'s, for A800s of 80 GB in nodes of 8."""
    yield "arXiv:2410.17243, figure 4 and tables 1 and 2 (ViT-L/14, gradient caching of 128 samples); ours computed, not run.\n"
    yield "| | published | plan | plan / published |"
    yield "|---|---|---|---|"

    @cache
    def planned(gpus: int, batch: int) -> Any:
        overrides = [f"train.batch_size={batch * 1024}", "train.micro_batch_size=128"]
        cluster = Cluster(gpus // 8, A800.link, A800.within, A800.gpu)
        return plan_run(load_config(CONFIGS / "clip-vit-l-14.yaml", overrides), gpus, 80 * GIB, cluster)

    for batch, seconds in FIGURE_4.items():
        planned_value = planned(8, batch).time.total
        yield f"| a step of {batch}k on 8 | {seconds} s | {planned_value:.1f} s | {planned_value / seconds:.2f} |"
    for gpus, batch, size in TABLE_1:
        planned_value = planned(gpus, batch).memory["embeddings and loss"] / GIB
        yield f"| memory of the loss at {batch}k on {gpus} | {size} GB | {planned_value:.2f} GiB | {planned_value / size:.2f} |"
    for gpus, batch in TABLE_2:
        planned_value = planned(gpus, 1024).largest_batch // 1024
        yield f"| largest batch on {gpus}, inputs on the host | {batch}k | {planned_value}k | {planned_value / batch:.2f} |"


PARTS = {"calls": calls, "model": model, "published": published}
