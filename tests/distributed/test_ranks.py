"""Real gloo processes: unequal, empty and absent parts give the single-process statistics, loss and gradients.

Four processes are started once, and work through all cases in groups of as many ranks as a case has."""

import itertools
import os
import pickle
import traceback
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmcontrast import contrastive_loss, score_statistics
from mmcontrast.objectives import OBJECTIVES, GlobalContrastive
from mmcontrast.score.ranks import Everyone, subgroups_agree
from tests.command import call_on_ranks, free_port, locked, session_folder
from tests.score.problems import REDUCTIONS, finite_sum, problem

RANKS, FIELDS = 4, ("a", "b", "c")
SIZES = [(12,), (5, 1), (5, 1, 6), (5, 0, 6), (1, 0, 0), (2, 5, 1, 4)]
DRIVERS = ["ring", "gather"]
OTHERS = sorted(set(OBJECTIVES) - {"infonce", "siglip", "global", "distillation"})
ALL_LOSSES = list(itertools.product(SIZES, DRIVERS, ["infonce", "siglip"], [True, False]))
ALL_LOSSES += list(itertools.product([(5, 0, 6)], DRIVERS, OTHERS, [True]))
ALL_PRODUCTS = list(itertools.product([(5, 0, 6), (1, 0, 0), (2, 5, 1, 4)], DRIVERS, ["n", "n_squared"], [True, False]))
EXACT = list(itertools.product(SIZES, DRIVERS, ["dense", "torch"], [False, True]))
MEMORIES = [((5, 0, 6), "ring", "individual"), ((5, 0, 6), "gather", "learnable")]


def half(cases):
    """Return every second case, not the same of each size, driver and further choice: `make test-slow` runs the others."""
    return [case for k, case in enumerate(cases) if (k + k // 2 + k // 4 + k // 8) % 2]


LOSSES, PRODUCTS = half(ALL_LOSSES), half(ALL_PRODUCTS)
STATISTICS = [*half(EXACT), ((5, 0, 6), "ring", "triton", True), ((5, 0, 6), "gather", "triton", False)]
GIVEN = {
    "distillation": {"objective": {"type": "distillation", "alpha": 0.7}},
    "margin": {"objective": {"type": "infonce", "false_negative_margin": 0.2, "label_smoothing": 0.1}},
    "guide": {"objective": {"type": "infonce", "false_negative_margin": 0.1, "guide": True}},
    "own fields": {"pairing": {"type": "all_pairs", "same_field": True}},
    "one denominator": {
        "pairing": {"type": "all_pairs", "same_field": True, "joint": "pair"},
        "objective": {"type": "infonce", "false_negative_margin": 0.1},
    },
    "hyperbolic": {"score": {"type": "lorentz", "curvature": 0.7, "general": "a"}},
    "matryoshka": {"matryoshka": {2: 0.5, 5: 1.0}},
    "some weigh": {},  # the first rank has no weights
    "locked": {"locked": ("a", "c")},
}
FURTHER = list(itertools.product([(5, 1, 6)], ["ring"], GIVEN)) + list(itertools.product([(5, 0, 6)], ["gather"], GIVEN))
OTHER_GROUP = (3, 4), "ring", "infonce", True  # on ranks 0 and 2 of the world
UNEQUAL = ((5, 1, 6),)
NODES = (2, 5, 1, 4), "hierarchical"  # two nodes of two ranks
LOSSES += [(*NODES, "infonce", True), (*NODES, "siglip", False), ((5, 0, 6, 0), "auto", "infonce", True)]
LOSSES += [((5, 1), "hierarchical", "hard_negative", True)]  # one node
PRODUCTS += [(*NODES, "n", True), (*NODES, "n_squared", False)]
STATISTICS += [(*NODES, "torch", False), (*NODES, "dense", True)]
FURTHER += [(*NODES, case) for case in ("distillation", "one denominator", "locked")]
SLOW_LOSSES = [case for case in ALL_LOSSES if case not in LOSSES]
SLOW_PRODUCTS = [case for case in ALL_PRODUCTS if case not in PRODUCTS]
SLOW_STATISTICS = [*EXACT, *itertools.product(SIZES, DRIVERS, ["triton"], [False, True])]
SLOW_STATISTICS = [case for case in SLOW_STATISTICS if case not in STATISTICS]
SLOW_MEMORIES = list(itertools.product([(5, 0, 6), (5, 1)], DRIVERS, ["learnable", "individual"]))
SLOW_MEMORIES = [case for case in SLOW_MEMORIES if case not in MEMORIES]


def a_batch(n):
    generator = torch.Generator().manual_seed(3)
    fields = {f: F.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1) for f in FIELDS}
    owner = torch.randint(n // 2 + 1, (n,), generator=generator)
    ids = {f: torch.where(torch.rand(n, generator=generator) < 0.25, -1, owner) for f in FIELDS}
    extra = F.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=1)
    return fields, ids, extra


def loss_and_grads(fields, ids, extra, objective, negatives, **options):
    """The loss and the signals; the gradients by every field, and by the extra negatives, the scale and the bias.
    With `negatives` of the multilinear pairing, which takes no extra ones."""
    torch.manual_seed(0)
    if negatives:
        options["pairing"] = {"type": "multilinear", "negatives": negatives}
    leaves = {f: rows.clone().requires_grad_() for f, rows in fields.items()}
    others = [extra.clone().requires_grad_(), *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (20.0, -2.0))]
    signals = {}
    loss = contrastive_loss(
        leaves,
        objective=objective,
        ids=ids,
        extra_negatives=None if negatives else {"b": others[0]},
        logit_scale=others[1],
        logit_bias=others[2],
        tile_size=3,
        signals=signals,
        **options,
    )
    loss.backward()
    unused = [torch.zeros_like(t) if t.grad is None else t.grad for t in others]
    return torch.stack([loss.detach(), *signals.values()]), [leaf.grad for leaf in leaves.values()], unused


@cache
def loss_of_one_process(n, objective, negatives, with_ids):
    """Return the dense loss and gradients; other sizes and drivers of as many samples compare with the same."""
    fields, ids, extra = a_batch(n)
    return loss_and_grads(fields, ids if with_ids else None, extra, objective, negatives, backend="dense")


def check_products(group, rank, sizes, driver, negatives, with_ids):
    check_loss(group, rank, sizes, driver, "hard_negative", with_ids, negatives)


def check_loss(group, rank, sizes, driver, objective, with_ids, negatives=None):
    fields, ids, extra = a_batch(sum(sizes))
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    ids = ids if with_ids else None
    extras = extra.tensor_split(len(sizes))
    want, want_rows, (want_extra, *want_scalars) = loss_of_one_process(sum(sizes), objective, negatives, with_ids)
    got, got_rows, (got_extra, *got_scalars) = loss_and_grads(
        {f: v[rows] for f, v in fields.items()},
        None if ids is None else {f: v[rows] for f, v in ids.items()},
        extras[rank],
        objective,
        negatives,
        group=group,
        communication=driver,
    )
    mean = torch.cat([got, torch.stack(got_scalars)])  # what data parallelism averages over the ranks
    dist.all_reduce(mean, group=group)
    mean /= len(sizes)
    expected = [*want, *want_scalars, *(g[rows] for g in want_rows), want_extra.tensor_split(len(sizes))[rank]]
    # the rows' gradients are of the sum of all ranks' losses, W times the mean's
    found = [*mean, *(g / len(sizes) for g in got_rows), got_extra / len(sizes)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def given_loss(n, rows, case, **options):
    """The loss and its gradients of some rows of a batch: by fields, by negatives of their own, by the scale."""
    fields, ids, _ = a_batch(n)
    generator = torch.Generator().manual_seed(4)
    teachers = [{f: torch.randn(n, 3, generator=generator, dtype=torch.float64) for f in FIELDS} for _ in range(2)]
    weights = torch.rand(n, generator=generator).double()
    if case == "some weigh":
        weights[:5] = 1.0
    own = torch.randn(n, 2, 5, generator=generator, dtype=torch.float64)
    given = {name: value for name, value in GIVEN[case].items() if name != "locked"}
    takes_teachers, takes_own = case in ("distillation", "guide"), case not in ("distillation", "guide")
    leaves = [fields[f][rows].requires_grad_(f not in GIVEN[case].get("locked", ())) for f in FIELDS]
    leaves += [own[rows].requires_grad_(), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)]
    loss = contrastive_loss(
        dict(zip(FIELDS, leaves, strict=False)),
        ids={f: v[rows] for f, v in ids.items()},
        teacher=[{f: v[rows] for f, v in teacher.items()} for teacher in teachers] if takes_teachers else None,
        teacher_scale=(1.5, 2.0),
        sample_weights=None if case == "some weigh" and rows == slice(0, 5) else weights[rows],
        own_negatives={"b": leaves[3]} if takes_own else None,
        logit_scale=leaves[4],
        logit_bias=-1.0,
        tile_size=3,
        **given,
        **options,
    )
    loss.backward()
    return [loss.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


@cache
def given_loss_of_one_process(n, case):
    return given_loss(n, slice(None), case, backend="dense")


def check_given(group, rank, sizes, driver, case):
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    want_loss, *want_rows, want_scale = given_loss_of_one_process(sum(sizes), case)
    loss, *found, scale = given_loss(sum(sizes), rows, case, group=group, communication=driver)
    mean = torch.stack([loss, scale])
    dist.all_reduce(mean, group=group)
    found = [*(mean / len(sizes)), *(grad / len(sizes) for grad in found)]
    for a, b in zip(found, [want_loss, want_scale, *(grad[rows] for grad in want_rows)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def check_memory(group, rank, sizes, driver, temperature):
    """Three steps of `global`, in which samples come again, on other ranks: the memory of one process, the same on all ranks
    after the first step, divided among them after the others."""
    n = sum(sizes)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    together, apart = (GlobalContrastive(0.3, temperature, rho=1.0) for _ in "12")
    for step in range(3):
        fields, ids, extra = a_batch(n)
        sample_ids = torch.arange(n).roll(4 * step) + 10**12
        if step == 1:
            assert len(apart.table) == len(together.table)
            apart.table.divide(rank, len(sizes))
        want, want_rows, _ = loss_and_grads(fields, ids, extra, together, None, sample_ids=sample_ids)
        got, got_rows, _ = loss_and_grads(
            {f: v[rows] for f, v in fields.items()},
            {f: v[rows] for f, v in ids.items()},
            extra.tensor_split(len(sizes))[rank],
            apart,
            None,
            sample_ids=sample_ids[rows],
            group=group,
            communication=driver,
        )
        dist.all_reduce(got, group=group)
        torch.testing.assert_close(got / len(sizes), want, rtol=1e-10, atol=1e-10)
        for a, b in zip(got_rows, want_rows, strict=True):
            torch.testing.assert_close(a / len(sizes), b[rows], rtol=1e-10, atol=1e-10)
    number = torch.tensor(len(apart.table))
    dist.all_reduce(number, group=group)
    assert apart.table.columns == together.table.columns and number == len(together.table) > 0
    ids, everyone = (torch.arange(n) + 10**12)[rows], Everyone(group, sizes)
    for column in together.table.columns:
        found, wanted = apart.table.read(ids, column, everyone), together.table.read(ids, column)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, equal_nan=True)


def statistics_and_grads(leaves, ids, n, reductions, rows=None, **options):
    """Reductions at once, of the whole batch of n or of some of its rows, with the same upstream gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    x, y, *scales, bias = leaves
    given = dict(zip(("scale", "column_scale"), scales, strict=False))
    directions = score_statistics(x, y, reductions, **given, bias=bias, ids=ids, **options)
    values = [value for d in directions for value in (d.positives, *(d[r] for r in reductions))]
    if rows is not None:  # so that each value meets its own upstream gradient; infinities take no part
        values = [value.new_full((n,), torch.inf).index_copy(0, rows, value) for value in values]
    grads = torch.autograd.grad(finite_sum(values), leaves, allow_unused=True, materialize_grads=True)
    values = [value.detach() if rows is None else value.detach()[rows] for value in values]
    return values, [d.num_negatives for d in directions], list(grads)


def reductions_of(sizes, driver, backend, per_anchor):
    """All of them; Triton's interpreter, which is slow, has those over the same scores: others for other cases."""
    over = ("negatives", "positives", "all")[(SIZES.index(sizes) + len(driver) + per_anchor) % 3]
    return [reduction for reduction in REDUCTIONS if backend != "triton" or reduction.over == over]


def check_statistics(group, rank, sizes, driver, backend, per_anchor):
    n, reductions = sum(sizes), reductions_of(sizes, driver, backend, per_anchor)
    dtype = torch.float32 if backend == "triton" else torch.float64
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if backend == "triton" else {"rtol": 1e-10, "atol": 1e-10}
    leaves, ids = problem(n, 5, 7, n // 2 + 1, 10.0, per_anchor, dtype=dtype)
    place = torch.arange(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    exact = [leaf.double() for leaf in leaves]
    want, want_counts, want_grads = statistics_and_grads(exact, ids, n, reductions, backend="dense")
    mine = [leaf[place] if leaf.dim() else leaf for leaf in leaves]
    got, got_counts, got_grads = statistics_and_grads(
        mine, ids[place], n, reductions, place, backend=backend, tile_size=3, group=group, communication=driver
    )
    for grad in got_grads:
        if grad.dim() == 0:  # each rank has its rows' share
            dist.all_reduce(grad, group=group)
    for a, b in zip(got + got_counts, want + want_counts, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b[place], **tolerance)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a.double(), b if a.dim() == 0 else b[place], **tolerance)


def check_unequal(group, rank, sizes):
    x = torch.ones(sizes[rank], 2)
    with pytest.raises(ValueError, match="nodes have 2, 1 ranks, not equally many; use ring"):
        score_statistics(x, x, [], scale=1.0, group=group, communication="hierarchical")


def check_alone(group, rank, sizes):
    fields = {"a": torch.eye(2), "b": torch.eye(2)}
    with pytest.warns(UserWarning, match="group=None in one of 4 processes: only this process's samples") as warned:
        contrastive_loss(fields, logit_scale=1.0)
    assert warned[0].filename == __file__  # the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contrastive_loss(fields, logit_scale=1.0, group=group)


def worker(rank, port, folder, slow):
    """Run all cases, or the slow ones, and leave in a file what went wrong."""
    answers = []
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=600)
    )
    first = {count: dist.new_group(list(range(count))) for count in range(1, RANKS + 1)}
    apart = dist.new_group([0, 2])
    if not subgroups_agree(first[RANKS], torch.device("cpu")):  # torch before 2.14: each rank is in another number of groups
        x = torch.ones(2, 2)
        with pytest.raises(ValueError, match="made different numbers of process groups"):
            score_statistics(x, x, [], scale=1.0, group=first[RANKS], communication="hierarchical")
        for _ in range(rank + (rank in (1, 3))):
            dist.new_group([rank], use_local_synchronization=True)
        subgroups_agree.cache_clear()
        assert subgroups_agree(first[RANKS], torch.device("cpu"))
    checks = (check_loss, check_products, check_memory, check_statistics, check_given)
    cases_of_each = (LOSSES, PRODUCTS, MEMORIES, STATISTICS, FURTHER)
    if slow:
        cases_of_each = (SLOW_LOSSES, SLOW_PRODUCTS, SLOW_MEMORIES, SLOW_STATISTICS, [])
    cases = [(check, case, first[len(case[0])]) for check, each in zip(checks, cases_of_each, strict=True) for case in each]
    if not slow:
        cases += [(check_loss, OTHER_GROUP, apart), (check_unequal, UNEQUAL, first[3]), (check_alone, UNEQUAL, first[3])]
    for check, case, group in cases:
        if dist.get_rank(group) >= 0:
            try:
                check(group, dist.get_rank(group), *case)
            except Exception:  # every rank goes on to the next case
                answers.append((check.__name__, case, rank, traceback.format_exc()))
        dist.barrier()
    Path(folder, f"rank-{rank}.pickle").write_bytes(pickle.dumps(answers))
    dist.destroy_process_group()


@cache
def found_by_ranks(slow):
    """Return {(check, case): what went wrong}, of all cases; run once, whichever of pytest's workers asks first."""
    folder = session_folder() / f"ranks-{slow}"
    folder.mkdir(exist_ok=True)
    files = [folder / f"rank-{rank}.pickle" for rank in range(RANKS)]
    with locked(folder):
        if not all(file.exists() for file in files):
            call_on_ranks(f"{__name__}:worker", RANKS, free_port(), str(folder), slow)
    answers = [answer for file in files for answer in pickle.loads(file.read_bytes())]
    return {(check, case): f"rank {rank}: {text}" for check, case, rank, text in reversed(answers)}


def assert_right(check, case, slow=False):
    failures = found_by_ranks(slow)
    assert (check, case) not in failures, failures[check, case]


def fast_and_slow(cases, slow_cases):
    """Parametrize by `case` and `slow`."""
    values = [pytest.param(case, False, id="-".join(map(str, case))) for case in cases]
    values += [pytest.param(case, True, id="-".join(map(str, case)), marks=pytest.mark.slow) for case in slow_cases]
    return pytest.mark.parametrize(("case", "slow"), values)


@fast_and_slow(LOSSES, SLOW_LOSSES)
def test_the_loss_of_all_ranks_is_that_of_one_process(case, slow):
    assert_right("check_loss", case, slow)


@fast_and_slow(PRODUCTS, SLOW_PRODUCTS)
def test_products_of_all_ranks_are_those_of_one_process(case, slow):
    assert_right("check_products", case, slow)


@fast_and_slow(MEMORIES, SLOW_MEMORIES)
def test_the_memory_of_all_ranks_is_that_of_one_process(case, slow):
    assert_right("check_memory", case, slow)


@fast_and_slow(FURTHER, [])
def test_teachers_weights_limits_and_own_candidates_of_all_ranks_are_those_of_one_process(case, slow):
    assert_right("check_given", case, slow)


@fast_and_slow(STATISTICS, SLOW_STATISTICS)
def test_the_statistics_of_all_ranks_are_those_of_one_process(case, slow):
    assert_right("check_statistics", case, slow)


def test_a_group_other_than_the_world():
    assert_right("check_loss", OTHER_GROUP)


def test_nodes_of_unequal_ranks_are_no_hierarchy():
    assert_right("check_unequal", UNEQUAL)


def test_a_loss_without_a_group_among_other_ranks_is_warned_of():
    assert_right("check_alone", UNEQUAL)
