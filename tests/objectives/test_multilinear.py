"""The multilinear pairing against the symile package and a dense textbook form; XOR, which no pair of fields can learn."""

import itertools
from functools import reduce

import pytest
import symile.loss
import torch
import torch.nn.functional as F

from mmcontrast import contrastive_loss
from tests.objectives.textbook import (
    IDS,
    OBJECTIVES,
    assert_all_close,
    averages_over_positives,
    textbook_anchor_loss,
    unit,
    value_and_grads,
)


def n_squared(objective="infonce", **options):
    return {"objective": objective, "pairing": {"type": "multilinear", "negatives": "n_squared"}, **options}


def product(factors):
    return reduce(torch.mul, factors)


@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 3), (7, 3), (5, 4), (3, 5)])
def test_n_squared_is_the_packages(n, m):
    leaves = [*(unit(n, 6, seed=k) for k in range(m)), torch.tensor(30.0).double()]
    want = value_and_grads(lambda *t: symile.loss.Symile("n_squared")(list(t[:-1]), t[-1]), *leaves)
    got = value_and_grads(
        lambda *t: contrastive_loss(dict(zip("abcde", t[:-1], strict=False)), logit_scale=t[-1], **n_squared()), *leaves
    )
    assert_all_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "m"), [(13, 3), (64, 3), (12, 4)])
def test_n_is_the_packages_with_the_same_permutations(n, m, monkeypatch):
    """Permutations that make no product wholly of one sample: theirs takes those for negatives, ours does not."""
    bases = [torch.randperm(n) for _ in range(m)]
    orders = [(base + shift) % n for base in bases for shift in range(m - 1)]
    leaves = [*(unit(n, 6, seed=k) for k in range(m)), torch.tensor(30.0).double()]

    def replayed(function):
        left = iter(orders)
        monkeypatch.setattr(torch, "randperm", lambda *_, **__: next(left))
        return value_and_grads(function, *leaves)

    got = replayed(
        lambda *t: contrastive_loss(dict(zip("abcd"[:m], t, strict=False)), logit_scale=t[-1], pairing="multilinear")
    )
    want = replayed(lambda *t: symile.loss.Symile("n")(list(t[:-1]), t[-1]))
    assert_all_close(got, want, rtol=1e-10, atol=1e-10)


def textbook(objective, fields, ids, scale, bias, orders=None):
    """All products of the other fields, or with `orders` [anchor, other, n] those of permutations."""
    keep = torch.stack([v >= 0 for v in ids.values()]).all(0)
    group, n, total = next(iter(ids.values()))[keep], int(keep.sum()), 0.0
    if n == 0:
        return 0.0 * sum(rows.sum() for rows in fields.values())
    for anchor, field in enumerate(fields):
        others = [rows[keep] for f, rows in fields.items() if f != field]
        tuples = list(itertools.product(range(n), repeat=len(others))) if orders is None else orders[anchor].T.tolist()
        columns = torch.stack([product([rows[j] for rows, j in zip(others, t, strict=True)]) for t in tuples])
        own = product(others)
        for i in range(n):
            wholly = torch.tensor([all(group[j] == group[i] for j in t) for t in tuples])
            if orders is None:
                same, z, positive = wholly, columns @ fields[field][keep][i], tuples.index((i,) * len(others))
            else:  # the place of a sample of its group, unless the product is wholly of another
                of_one = torch.tensor([len({int(group[j]) for j in t}) == 1 for t in tuples])
                same = torch.where(of_one, wholly, group == group[i])
                z = torch.cat([columns, own[i : i + 1]]) @ fields[field][keep][i]
                same, positive = torch.cat([same, torch.tensor([True])]), len(tuples)
            total = total + textbook_anchor_loss(objective, scale * z + bias, positive, same, scale) / n
    return total / len(fields)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize(
    ("scale", "negatives"),
    [
        (1.0, "n"),
        (100.0, "n_squared"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(100.0, "n"), (1.0, "n_squared")]),
    ],
)
def test_every_objective_is_the_textbooks(objective, case, scale, negatives, monkeypatch):
    ids = dict(zip("abc", map(torch.tensor, IDS[case]), strict=True))
    leaves = [*(unit(7, 6, seed=k) for k in range(3)), torch.tensor(scale).double(), torch.tensor(-0.5).double()]
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **b: drawn.append(randperm(*a, **b)) or drawn[-1])

    def ours(*t):
        fields = dict(zip("abc", t[:3], strict=True))
        pairing = {"type": "multilinear", "negatives": negatives}
        return contrastive_loss(
            fields, objective=objective, pairing=pairing, logit_scale=t[3], logit_bias=t[4], ids=ids, tile_size=3
        )

    if averages_over_positives(objective) and negatives == "n":
        with pytest.raises(ValueError, match="averages over all positives of an anchor"):
            ours(*leaves)
        return
    got = value_and_grads(ours, *leaves)
    orders = torch.stack(drawn).view(3, 2, -1) if drawn else None
    want = value_and_grads(lambda *t: textbook(objective, dict(zip("abc", t[:3], strict=True)), ids, *t[3:], orders), *leaves)
    assert_all_close(got, want, rtol=1e-10, atol=1e-10)


def test_the_blocks_of_tuples_change_nothing(monkeypatch):
    leaves = [unit(7, 6, seed=k) for k in range(4)]

    def ours(*t):
        return contrastive_loss(dict(zip("abcd", t, strict=True)), logit_scale=9.0, **n_squared("hard_negative"))

    want = value_and_grads(ours, *leaves)
    monkeypatch.setattr("mmcontrast.objectives.multilinear.ROWS", 30)  # four tuples at a time, of 49
    assert_all_close(value_and_grads(ours, *leaves), want, rtol=1e-12, atol=1e-12)


def test_every_step_draws_anew_and_a_seed_repeats_it():
    fields = {f: unit(9, 5, seed=k) for k, f in enumerate("abc")}

    def two_losses():
        torch.manual_seed(3)
        return [contrastive_loss(fields, pairing="multilinear", logit_scale=20.0) for _ in range(2)]

    (a, b), (c, d) = two_losses(), two_losses()
    assert a != b and a == c and b == d


def test_signals_are_of_the_products():
    fields, signals = {f: unit(6, 5, seed=k) for k, f in enumerate("abc")}, {}
    contrastive_loss(fields, logit_scale=40.0, signals=signals, **n_squared())
    a, b, c = fields.values()
    z = 40.0 * torch.einsum("id,jd,kd->ijk", a, b, c)
    negatives = z.clone()
    negatives[range(6), range(6), range(6)] = -torch.inf
    accurate = [z[i, i, i] > negatives[i].max() for i in range(6)]
    torch.testing.assert_close(signals["a_to_b+c/accuracy"], torch.tensor(accurate).double().mean())
    assert {name.split("/")[0] for name in signals} == {"a-b-c", "a_to_b+c", "b_to_a+c", "c_to_a+b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairing": {"type": "multilinear", "negatives": "all"}}, '"n" or "n_squared"'),
        ({"extra_negatives": {"a": unit(2, 4, seed=0)}}, "a product needs a partner in every other field"),
    ],
)
def test_mistakes_are_named(change, message):
    fields = {f: unit(3, 4, seed=k) for k, f in enumerate("abc")}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(fields, **({"logit_scale": 10.0, "pairing": "multilinear"} | change))
    with pytest.raises(ValueError, match="three fields at least, not a, b; use all_pairs"):
        contrastive_loss({f: fields[f] for f in "ab"}, pairing="multilinear", logit_scale=10.0)


def xor_accuracy(pairing, objective, seed, steps=80, n=128, bits=4, width=16):
    """c = a XOR b, bit by bit, of fair random bits: which of the 2^bits values c has, told from a and b."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(list(itertools.product((0.0, 1.0), repeat=bits)))
    torch.manual_seed(seed)
    towers = torch.nn.ModuleDict({f: torch.nn.Embedding(2**bits, width) for f in "abc"})
    log_scale = torch.nn.Parameter(torch.tensor(10.0).log())
    optimizer = torch.optim.Adam([*towers.parameters(), log_scale], lr=0.1)
    weights = 2 ** torch.arange(bits).flip(0)

    def draw(count):
        a, b = (torch.randint(2**bits, (count,), generator=generator) for _ in "ab")
        return {"a": a, "b": b, "c": (values[a] != values[b]).long() @ weights}

    for _ in range(steps):
        fields = {f: F.normalize(towers[f](v), dim=1) for f, v in draw(n).items()}
        loss = contrastive_loss(fields, pairing=pairing, objective=objective, logit_scale=log_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = draw(4000)
    with torch.no_grad():
        a, b, c = (F.normalize(towers[f].weight, dim=1) for f in "abc")
        x, y = a[test["a"]], b[test["b"]]
        scores = (x * y) @ c.T if pairing == "multilinear" else (x + y) @ c.T
    # zero-shot accuracy of telling c's first bit, from the best candidate with it set against the best without
    first = values[:, 0].bool()
    said = scores[:, first].amax(1) > scores[:, ~first].amax(1)
    return float((said == first[test["c"]]).double().mean())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_xor_is_learnt_by_all_three_fields_together_and_by_no_pair(seed):
    """Symile's published toy (arXiv:2411.01053, section 4): any two of a, b and a XOR b are independent."""
    assert xor_accuracy("multilinear", "infonce", seed) >= 0.98
    for objective in ("infonce", "siglip", "hard_negative"):
        assert abs(xor_accuracy("all_pairs", objective, seed) - 0.5) <= 0.2  # by chance: 128 pairs of values
