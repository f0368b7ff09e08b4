"""The running estimators against a textbook simulation of several steps, their memory, and temperatures of a long tail."""

import gc

import pytest
import torch
import torch.nn.functional as F

from mmcontrast import contrastive_loss
from mmcontrast.objectives import GlobalContrastive
from mmcontrast.objectives.sample_table import SampleTable
from tests.objectives.textbook import assert_all_close, unit

EPSILON, RHO, GAMMA = 1e-3, 1.5, 0.3


def visits():
    """(sample ids, group ids) of four batches: samples come again, lack a field, share a group."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        samples = torch.randperm(9, generator=generator)[:6]
        groups = {0: 4, 7: 4}
        ids = torch.tensor([groups.get(int(s), int(s)) for s in samples])
        yield samples * 10**15 - 3, {"a": ids, "b": torch.where(samples == 2, -1, ids)}


class Textbook:
    """Everything as the papers write it: dictionaries, exponentials, one anchor at a time."""

    def __init__(self, temperature, momentum=0.9, lr=0.05, lowest=0.01, highest=1.0):
        self.temperature, self.momentum, self.lr, self.lowest, self.highest = temperature, momentum, lr, lowest, highest
        self.u, self.tau, self.moment = {}, {}, {}

    def step(self, x, y, scale, samples, ids):
        """The loss whose gradient is the estimator's, as a sum of terms; own temperatures are leaves."""
        keep = (ids["a"] >= 0) & (ids["b"] >= 0)
        x, y, samples, group = x[keep], y[keep], samples[keep].tolist(), ids["a"][keep]
        terms, self.leaves = [], {}
        for side, cosines in (("a", x @ y.T), ("b", y @ x.T)):
            for i, sample in enumerate(samples):
                tau = 1 / scale
                if self.temperature == "constant":
                    tau = tau.detach()
                if self.temperature == "individual":
                    tau = self.tau.get((side, sample), float(1 / scale.detach()))
                    tau = self.leaves[side, sample] = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
                mean = ((cosines[i] - cosines[i, i])[group != group[i]] / tau).exp().mean()
                old = self.u.get((side, sample))
                u = self.u[side, sample] = mean.detach() if old is None else (1 - GAMMA) * old + GAMMA * mean.detach()
                term = tau.detach() * mean / (u + EPSILON) + tau * (RHO + (u + EPSILON).log())
                terms.append((term, tau * (RHO + (u + EPSILON).log())))
        self.value = sum(value for _, value in terms) / len(terms)
        return sum(term for term, _ in terms) / len(terms), len(terms)

    def descend(self, count):
        for key, leaf in self.leaves.items():
            own = (leaf.grad * count).clamp(-5, 5)
            self.moment[key] = self.momentum * self.moment.get(key, 0.0) + (1 - self.momentum) * own
            self.tau[key] = float((leaf.detach() - self.lr * self.moment[key]).clamp(self.lowest, self.highest))


@pytest.mark.parametrize("temperature", ["learnable", "constant", "individual"])
@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_every_step_is_the_papers(temperature, backend, scale):
    objective = GlobalContrastive(GAMMA, temperature, RHO, EPSILON, temperature_lr=0.05)
    textbook = Textbook(temperature)
    for number, (samples, ids) in enumerate(visits()):
        leaves = [unit(6, 5, seed=2 * number), unit(6, 5, seed=2 * number + 1), torch.tensor(scale).double()]
        want = [leaf.clone().requires_grad_() for leaf in leaves]
        loss, count = textbook.step(*want, samples, ids)
        loss.backward()
        textbook.descend(count)
        options = {"objective": objective, "ids": ids, "sample_ids": samples, "backend": backend, "tile_size": 2}
        x, y, s = (leaf.requires_grad_() for leaf in leaves)
        value = contrastive_loss({"a": x, "b": y}, logit_scale=s, **options)
        value.backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in want]
        got = [value, x.grad, y.grad, s.grad]
        assert_all_close(got, [textbook.value, *grads], rtol=1e-10, atol=1e-10)
    for (side, sample), u in textbook.u.items():
        name = "a_to_b" if side == "a" else "b_to_a"
        key = torch.tensor([sample])
        torch.testing.assert_close(objective.table.read(key, f"{name}/log_u"), u.log()[None], rtol=1e-10, atol=1e-10)
        if temperature == "individual":
            found = objective.table.read(key, f"{name}/tau").item()
            assert found == pytest.approx(textbook.tau[side, sample], rel=1e-10)


def a_step(objective, seed, **options):
    fields = {f: unit(6, 5, seed=seed + k).requires_grad_() for k, f in enumerate("ab")}
    loss = contrastive_loss(fields, objective=objective, logit_scale=20.0, **({"sample_ids": torch.arange(6)} | options))
    return loss, fields


def test_its_memory_goes_through_a_checkpoint(tmp_path):
    objective = GlobalContrastive(temperature="individual")
    a_step(objective, 0)[0].backward()
    torch.save(objective.state_dict(), tmp_path / "state.pt")
    other = GlobalContrastive(temperature="individual")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    losses = [a_step(o, 10)[0] for o in (objective, other)]
    assert losses[0] == losses[1] != a_step(GlobalContrastive(temperature="individual"), 10)[0]


def test_evaluation_leaves_the_memory_alone():
    objective = GlobalContrastive(temperature="individual")
    a_step(objective, 0)[0].backward()
    before = objective.table.get_extra_state()
    with torch.no_grad():
        a_step(objective, 3)
    a_step(objective.eval(), 3)[0].backward()
    after = objective.table.get_extra_state()
    assert before["columns"] == after["columns"] and len(before["ids"]) == 6
    assert torch.equal(before["ids"], after["ids"]) and torch.equal(before["values"], after["values"])


def test_gamma_falls_on_a_cosine():
    objective = GlobalContrastive(gamma=0.2, decay=0.5)
    assert objective.gamma == pytest.approx(0.2)  # unless somebody says how far training is
    seen = []
    for objective.progress in (0.0, 0.25, 0.5, 0.9):
        seen.append(objective.gamma)
    assert seen == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_no_graph_outlives_its_step():
    """The temperatures' hooks must not hold the graph that holds them."""
    objective = GlobalContrastive(temperature="individual")
    counts = []
    for seed in range(4):
        a_step(objective, seed)[0].backward()
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert counts[1] == counts[3]


@pytest.mark.parametrize("individual", [False, True])
def test_what_is_refused(individual):
    objective = GlobalContrastive(temperature="individual" if individual else "learnable")
    with pytest.raises(ValueError, match="pass sample_ids"):
        a_step(objective, 0, sample_ids=None)
    with pytest.raises(ValueError, match="remembers earlier calls: make a GlobalContrastive once"):
        a_step("global", 0)
    for options, message in (
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature_range": (0.5, 0.1)}, "temperature_range"),
        ({"decay": 2.0}, "decay is 2.0"),
        ({"epsilon": 0.0}, "epsilon 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            GlobalContrastive(**options)


def test_a_table_keeps_what_a_dictionary_would():
    generator = torch.Generator().manual_seed(0)
    table, dictionary = SampleTable(), {}
    pool = torch.cat([torch.randint(-(2**62), 2**62, (400,), generator=generator), torch.arange(400) * 2**20])
    for _ in range(30):
        ids = pool[torch.randperm(len(pool), generator=generator)[:100]]
        for column in ("x", "y"):
            values = torch.rand(100, generator=generator)
            table.write(ids, column, values)
            dictionary |= {(int(i), column): float(v) for i, v in zip(ids, values, strict=True)}
    for column in ("x", "y"):
        want = torch.tensor([dictionary.get((int(i), column), torch.nan) for i in pool])
        torch.testing.assert_close(table.read(pool, column), want, equal_nan=True)
    assert len(table) == len({i for i, _ in dictionary}) and len(table.keys) <= 8 * len(table)
    assert table.read(torch.tensor([17]), "x").isnan() and table.read(pool, "z").isnan().all()


@pytest.mark.parametrize("ids", [torch.arange(40_000), torch.arange(40_000) * 2**20, torch.randint(-(2**62), 2**62, (40_000,))])
@pytest.mark.parametrize("ranks", [2, 7, 512])
def test_ranks_divide_a_table_evenly(ids, ranks):
    """Each id belongs to one rank, and the shares are no fuller in some slots than in others: a search ends after a few."""
    whole = SampleTable()
    whole.write(ids, "x", torch.arange(len(ids)).float())
    state, sizes, kept = whole.get_extra_state(), [], []
    for rank in range(ranks) if ranks < 100 else (0, 100, 511):
        table = SampleTable()
        table.divide(rank, ranks)
        table.set_extra_state(state)
        slots, start = table._find_slots(table._content()[0], insert=False), table._start(table._content()[0])
        assert ((slots - start) % len(table.keys)).float().mean() < 2
        sizes.append(len(table))
        kept.append(table._content()[0])
        with pytest.raises(ValueError, match="divided among"):
            table.divide(0, 3)
    assert torch.cat(kept).unique().numel() == sum(sizes) and (sum(sizes) == len(ids) or ranks == 512)
    expected = len(ids) / ranks
    assert all(abs(size - expected) < 6 * expected**0.5 for size in sizes)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_temperatures_rise_for_frequent_semantics_and_fall_for_rare_ones(seed):
    """iSogCLR's observation (arXiv:2305.11965): of 40 kinds with counts of a power law, members of the frequent ones have
    many lookalikes among their negatives, and come to a higher temperature than they started from; the rare to a lower."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([round(40 / k**0.7) for k in range(1, 41)])
    kinds = torch.repeat_interleave(torch.arange(len(counts)), counts)
    centres = F.normalize(torch.randn(len(counts), 64, generator=generator), dim=1)
    start, n = 0.2, len(kinds)
    x, y = (F.normalize(centres[kinds] + 0.08 * torch.randn(n, 64, generator=generator), dim=1) for _ in "xy")
    objective = GlobalContrastive(0.5, "individual", rho=0.7, temperature_lr=0.005)
    for _ in range(60):
        for batch in torch.randperm(n, generator=generator).split(100):
            leaves = {"a": x[batch].requires_grad_(), "b": y[batch].requires_grad_()}
            contrastive_loss(leaves, objective=objective, logit_scale=1 / start, sample_ids=batch).backward()
    tau = torch.stack([objective.table.read(torch.arange(n), f"{name}/tau") for name in ("a_to_b", "b_to_a")]).mean(0)
    means = torch.stack([tau[kinds == kind].mean() for kind in range(len(counts))])
    assert means[:3].mean() > 1.1 * start and means[-10:].mean() < 0.95 * start
    ranks = torch.stack([means, counts.float()]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.8  # Spearman's


@pytest.mark.parametrize("temperature", ["learnable", "constant", "individual"])
def test_an_anchor_without_negatives_costs_and_remembers_nothing(temperature):
    objective = GlobalContrastive(temperature=temperature)
    for n, ids in ((1, None), (3, torch.tensor([4, 4, 4]))):
        fields = {f: unit(n, 5, seed=k).requires_grad_() for k, f in enumerate("ab")}
        scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(fields, objective=objective, logit_scale=scale, ids=ids, sample_ids=torch.arange(n))
        loss.backward()
        assert loss == 0 and not any(leaf.grad.any() for leaf in (*fields.values(), scale))
    values = objective.table.get_extra_state()["values"]
    assert values.isnan().all()
