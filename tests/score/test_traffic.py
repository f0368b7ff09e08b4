"""The schemes of communication on eight real ranks, as nodes of four and of two: equal in value and gradients on unequal and
empty parts, and their calls, messages and bytes are those of the formulas by which `communication: auto` chooses."""

import os
import pickle
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.counting import Counted
from mmcontrast import contrastive_loss
from mmcontrast.score import ranks as ranks_module
from mmcontrast.score.backends import SameGroup
from mmcontrast.score.ranks import Gather, Hierarchical, Ring, driver, subgroups_agree
from mmcontrast.score.traffic import (
    GATHERED,
    MACHINES,
    SCHEMES,
    Calls,
    Link,
    blocks_of,
    cheapest,
    gathered_bytes,
    loss_calls,
    passes,
    products_seconds,
    waiting_seconds,
    with_links,
)  # fmt: skip
from mmcontrast.training.cost import _AliveBytes
from tests.command import call_on_ranks, free_port

RANKS, WIDTH = 8, 5
EQUAL, UNEQUAL, ONE = (2,) * 8, (3, 0, 2, 1, 4, 1, 0, 2), (0, 0, 0, 0, 0, 1, 0, 0)
CASES = [(EQUAL, 4, "infonce"), (EQUAL, 2, "siglip"), (UNEQUAL, 4, "infonce"), (UNEQUAL, 2, "siglip")]
CASES += [(ONE, 4, "infonce")]
BOTH = {"infonce": True, "siglip": False}  # with group ids, and statistics of both directions; or without either


def loss_and_grads(sizes, rank, objective, with_ids, **options):
    """Return the loss and the gradients by the rows of this rank, or of all (rank None), and by the scale."""
    n = sum(sizes)
    generator = torch.Generator().manual_seed(5)
    rows = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    fields = {f: F.normalize(torch.randn(n, WIDTH, generator=generator, dtype=torch.float64), dim=1)[rows] for f in "ab"}
    ids = torch.randint(n // 2 + 1, (n,), generator=generator)[rows]
    leaves = [*(one.requires_grad_() for one in fields.values()), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)]
    ids = dict.fromkeys("ab", ids) if with_ids else None
    loss = contrastive_loss(fields, objective=objective, logit_scale=leaves[2], logit_bias=-1.0, ids=ids, **options)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def check(rank, sizes, within, objective):
    os.environ["LOCAL_WORLD_SIZE"] = str(within)
    with_ids = BOTH[objective]
    results = {}
    for scheme in (*SCHEMES, *(["auto"] if sizes == EQUAL else [])):
        with Counted() if sizes == EQUAL else nullcontext() as counted:
            loss, *rows, scale = loss_and_grads(
                sizes, rank, objective, with_ids, group=dist.group.WORLD, communication=scheme, tile_size=3
            )
        mean = torch.stack([loss, scale])
        dist.all_reduce(mean)
        results[scheme] = [*(mean / RANKS), *(grad / RANKS for grad in rows)]
        if scheme != "auto" and sizes == EQUAL:
            check_counts(counted, scheme, within, sizes[0], with_ids)
    want_loss, *want_rows, want_scale = loss_and_grads(sizes, None, objective, with_ids, backend="dense")
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    want = [want_loss, want_scale, *(grad[own] for grad in want_rows)]
    for scheme, values in results.items():
        for value, wanted in zip(values, want, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12, msg=lambda text, s=scheme: f"{s}: {text}")


def check_counts(counted, scheme, within, rows, with_ids):
    wanted = loss_calls(scheme, RANKS // within, within, rows, passes(WIDTH, 8, 1, counted=with_ids, both=with_ids))
    wanted += [Calls("all_gather", RANKS, RANKS // within, 1, 1, (RANKS - 1) * 4 * 8)]  # of sizes, once a loss
    for kind in ("move", "all_gather", "all_to_all", "reduce_scatter"):
        of_kind = [calls for calls in wanted if calls.kind == kind]
        number = sum(calls.messages if kind == "move" else calls.count for calls in of_kind)
        assert counted.calls[kind] == number, (scheme, kind, counted.calls, wanted)
        assert counted.sent[kind] == sum(calls.sent for calls in of_kind), (scheme, kind, counted.sent, wanted)
    assert counted.waits == 1, f"{scheme}: {counted.waits} looks at numbers, not the exchange's alone"


def check_memory(rank):
    """The formula says what a loss has alive at its worst moment, above one of this rank's rows alone."""
    rows, width, peaks = 64, 256, {}
    for scheme in (None, *SCHEMES):
        leaves = [torch.randn(rows, width).requires_grad_() for _ in "ab"]
        with _AliveBytes({leaf.untyped_storage()._cdata for leaf in leaves}, []) as alive:
            options = {"group": dist.group.WORLD, "communication": scheme} if scheme else {}
            contrastive_loss(dict(zip("ab", leaves, strict=True)), logit_scale=1.0, tile_size=32, **options).backward()
        peaks[scheme] = alive.peak
    for scheme in SCHEMES:
        measured, formula = peaks[scheme] - peaks[None], gathered_bytes(scheme, RANKS // 2, 2, rows, width)
        assert 0.9 * formula < measured < 1.1 * formula, (scheme, measured / (4 * rows * width), formula / (4 * rows * width))


def worker(rank, port, folder):
    """Run all cases, and leave in a file what went wrong."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=600)
    )
    answers = {}
    assert subgroups_agree(dist.group.WORLD, torch.device("cpu"))  # asked once a group
    SameGroup._pairs = None  # as on a GPU, where nobody looks at ids
    for case in CASES:
        try:
            check(rank, *case)
        except Exception:  # every rank goes on to the next case
            answers[case] = f"rank {rank}: {traceback.format_exc()}"
    try:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        check_memory(rank)
    except Exception:
        answers["memory"] = f"rank {rank}: {traceback.format_exc()}"
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


def test_schemes_on_eight_ranks_agree_and_send_what_the_formulas_say(tmp_path):
    call_on_ranks(f"{__name__}:worker", RANKS, free_port(), str(tmp_path))
    for rank in range(RANKS):
        answers = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        assert not answers, next(iter(answers.values()))


def test_calls_written_out():
    """Two fields of width 512 in fp32 with group ids, 100 rows a rank, infonce, on 64 nodes of 8: by hand."""
    both = passes(512)
    by = {scheme: loss_calls(scheme, 64, 8, 100, both) for scheme in SCHEMES}
    assert sum(calls.count for calls in by["ring"]) == 4 * 512 - 2  # as the ring's moves were counted
    columns, statistics = 100 * (512 * 4 + 8), 100 * 4
    moved = 511 * columns + 512 * (statistics + 100 * 8) + 511 * (columns + 2 * statistics) + 512 * 100 * 512 * 4
    assert sum(calls.sent for calls in by["ring"]) == moved
    assert sum(calls.count for calls in by["hierarchical"] if calls.kind == "move") == 4 * 64 - 2
    assert sum(calls.count for calls in by["hierarchical"] if calls.kind != "move") == 64 * (2 + 2 + 4 + 1)
    assert [(calls.kind, calls.count) for calls in by["gather"]] == [
        ("all_gather", 2), ("all_to_all", 2), ("all_gather", 4), ("reduce_scatter", 1),
    ]  # fmt: skip
    assert all(calls.ranks == 8 and calls.nodes == 1 for calls in by["hierarchical"] if calls.kind != "move")
    assert sum(calls.sent for calls in loss_calls("ring", 1, 1, 100, both)) == 0


def test_seconds_of_calls():
    machine = with_links(MACHINES["cuda"], within=Link(1e-6, 100e9), between=Link(10e-6, 10e9))
    call = machine.call
    ring = Calls("move", 8, 1, 7, 2, 7 * 10**9)
    assert ring.seconds(machine) == pytest.approx(7 * call + 7 * 1e-6 + 0.07)
    assert Calls("move", 16, 2, 15, 2, 15 * 10**9).seconds(machine) == pytest.approx(15 * call + 15 * 10e-6 + 1.5)
    # of 15 GB that a rank passes on in an all-gather of 2 nodes of 8, its node's own links carry 1 of each 15 across
    gather = Calls("all_gather", 16, 2, 1, 1, 15 * 10**9)
    assert gather.seconds(machine) == pytest.approx(call + 15 * 10e-6 + max(0.15, 0.1))
    # an all-reduce of 1 GB: twice (W − 1) / W of it, of which an eighth crosses by each of a node's eight links, twice
    reduce = Calls("all_reduce", 16, 2, 1, 1, round(2 * 15 / 16 * 10**9))
    assert reduce.seconds(machine) == pytest.approx(call + 8 * 10e-6 + 2 * 15 / 16 / 8 / 10)
    # a ring hides behind the products, and so does the start of its blocks; gathering does not
    assert waiting_seconds([ring], 8, products=1.0, machine=machine) == 0.0
    assert waiting_seconds([ring], 8, products=1e-3, machine=machine) == pytest.approx(ring.seconds(machine) - 7e-3 / 8)
    assert waiting_seconds([], 8, products=1e-3, machine=machine) == pytest.approx(7 * machine.block - 1e-3)
    assert waiting_seconds([gather], 1, products=1.0, machine=machine) == gather.seconds(machine)
    slow = with_links(MACHINES["cpu"], within=machine.within)
    assert waiting_seconds([ring], 8, products=1.0, machine=slow) == pytest.approx(ring.seconds(slow) + 7 * slow.block)


def test_auto_takes_the_fastest_and_never_gathers_what_is_large(monkeypatch):
    cuda, cpu = MACHINES["cuda"], MACHINES["cpu"]
    assert cheapest(1, 8, 256, 512, cuda) == "gather"  # a small batch waits for its calls
    assert cheapest(1, 8, 16_384, 512, cuda) == "ring"  # a large one hides them, in less memory
    assert cheapest(64, 8, 512, 512, cuda) == "hierarchical"
    assert cheapest(64, 1, 4096, 512, cuda) == "ring"  # one device a node
    assert gathered_bytes("gather", 64, 8, 512, 512) > GATHERED > gathered_bytes("gather", 1, 8, 256, 512)
    for nodes in (1, 2, 8, 64, 512):
        for rows in (1, 32, 1024, 65_536):
            for machine in (cuda, cpu):
                chosen = cheapest(nodes, 8, rows, 768, machine)
                products = products_seconds(rows, rows * nodes * 8, 768, machine)
                times = {
                    scheme: waiting_seconds(
                        loss_calls(scheme, nodes, 8, rows, passes(768)), blocks_of(scheme, nodes, 8), products, machine
                    )
                    for scheme in SCHEMES
                    if not (scheme == "hierarchical" and nodes == 1)
                    and not (scheme == "gather" and gathered_bytes("gather", nodes, 8, rows, 768) > GATHERED)
                }
                assert times[chosen] == min(times.values())
                assert gathered_bytes(chosen, nodes, 8, rows, 768) <= max(GATHERED, (3 + 3 * 8) * rows * 768 * 4)
    # and the driver asks it
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(8)))
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: rank)
    monkeypatch.setattr(ranks_module, "subgroup", lambda group, members: group)
    monkeypatch.setattr(ranks_module, "subgroups_agree", lambda *_: True)
    for within, rows, kind in ((8, 256, Gather), (8, 16_384, Ring), (4, 8192, Hierarchical)):
        assert type(driver("group", [rows] * 8, "auto", within, 512, "cuda")) is kind
    monkeypatch.setattr(ranks_module, "subgroups_agree", lambda *_: False)
    assert type(driver("group", [8192] * 8, "auto", 4, 512, "cuda")) is Ring
    with pytest.raises(ValueError, match="made different numbers of process groups"):
        driver("group", [8192] * 8, "hierarchical", 4, 512, "cuda")
