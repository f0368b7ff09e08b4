"""`contrastive_loss` against open_clip and against dense textbook forms, in value and every gradient."""

import itertools

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

import mmcontrast
from mmcontrast import contrastive_loss
from mmcontrast.objectives import AllPairs, Anchor, InfoNCE
from tests.objectives.textbook import (
    IDS,
    OBJECTIVES,
    OF_ONE_DIRECTION,
    assert_all_close,
    name_of,
    textbook_anchor_loss,
    unit,
    value_and_grads,
)


@pytest.mark.parametrize("n", [1, 2, 7, 256])
def test_infonce_is_open_clips(n):
    x, y, scale = unit(n, 32, seed=n, dtype=torch.float32), unit(n, 32, seed=n + 1, dtype=torch.float32), torch.tensor(14.3)
    want = value_and_grads(lambda x, y, s: ClipLoss()(x, y, s), x, y, scale)
    got = value_and_grads(lambda x, y, s: contrastive_loss({"image": x, "text": y}, logit_scale=s), x, y, scale)
    assert_all_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 256])
def test_siglip_is_open_clips(n):
    x, y = unit(n, 32, seed=n, dtype=torch.float32), unit(n, 32, seed=n + 1, dtype=torch.float32)
    leaves = x, y, torch.tensor(10.0), torch.tensor(-10.0)
    want = value_and_grads(lambda x, y, s, b: SigLipLoss()(x, y, s, b), *leaves)
    got = value_and_grads(
        lambda x, y, s, b: contrastive_loss({"a": x, "b": y}, objective="siglip", logit_scale=s, logit_bias=b), *leaves
    )
    assert_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_every_objective_is_here():  # but those with a memory or a teacher, which have their own tests
    assert set(map(name_of, OBJECTIVES)) == set(mmcontrast.objectives.OBJECTIVES) - {"global", "distillation"}


def directions_of(objective, z):
    return [z] if name_of(objective) in OF_ONE_DIRECTION else [z, z.T]


ANCHOR = {"type": "anchor", "field": "b"}


def textbook_loss(objective, fields, ids, pairs, scale, bias):
    losses = []
    for a, b in pairs:
        keep = (ids[a] >= 0) & (ids[b] >= 0)
        if not keep.any():
            continue
        z, group = scale * fields[a][keep] @ fields[b][keep].T + bias, ids[a][keep]
        directions = directions_of(objective, z)
        losses.append(
            sum(
                textbook_anchor_loss(objective, d[i], i, group == group[i], scale)
                for d in directions
                for i in range(len(group))
            )
            / len(group)
            / len(directions)
        )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize(
    ("pairing", "scale"),
    [
        pytest.param("all_pairs", 1.0, id="all_pairs-1"),
        pytest.param(ANCHOR, 100.0, id="anchor-100"),
        pytest.param("all_pairs", 100.0, id="all_pairs-100", marks=pytest.mark.slow),
        pytest.param(ANCHOR, 1.0, id="anchor-1", marks=pytest.mark.slow),
    ],
)
def test_every_objective_is_the_textbooks(objective, pairing, case, scale):
    ids = dict(zip("abc", map(torch.tensor, IDS[case]), strict=True))
    pairs = [("a", "b"), ("a", "c"), ("b", "c")] if pairing == "all_pairs" else [("b", "a"), ("b", "c")]
    leaves = [*(unit(7, 6, seed=k) for k in range(3)), torch.tensor(scale).double(), torch.tensor(-0.5).double()]
    want = value_and_grads(
        lambda *t: textbook_loss(objective, dict(zip("abc", t[:3], strict=True)), ids, pairs, *t[3:]), *leaves
    )
    for backend in ("dense", "torch"):
        got = value_and_grads(
            lambda *t, backend=backend: contrastive_loss(
                dict(zip("abc", t[:3], strict=True)),
                objective=objective,
                pairing=pairing,
                logit_scale=t[3],
                logit_bias=t[4],
                ids=ids,
                backend=backend,
                tile_size=3,
            ),
            *leaves,
        )
        assert_all_close(got, want, rtol=1e-10, atol=1e-10)


def test_nothing_present_is_zero_and_still_steps():
    x, y = unit(3, 4, seed=0), unit(3, 4, seed=1)
    ids = {"a": torch.tensor([-1, 2, -1]), "b": torch.tensor([1, -1, -1])}
    loss, dx, dy = value_and_grads(lambda x, y: contrastive_loss({"a": x, "b": y}, logit_scale=10.0, ids=ids), x, y)
    assert loss == 0 and not dx.any() and not dy.any()
    x[0], scale, bias = torch.nan, torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    for scales, biases in ((scale, bias), ({"a-b": scale}, {"a-b": bias})):  # as data parallelism wants them: all take part
        rows = {"a": x.clone().requires_grad_(), "b": y}
        loss = contrastive_loss(rows, objective="siglip", logit_scale=scales, logit_bias=biases, ids=ids)
        grads = torch.autograd.grad(loss, [rows["a"], scale, bias])
        assert loss == 0 and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_extra_negatives_are_further_candidates(objective):
    """Equal to writing them into the textbook's sums; those of an anchor's own group are left out."""
    ids, extra_ids = torch.tensor([0, 1, 2, 2, 4]), torch.tensor([1, 7, 4])
    leaves = [unit(5, 6, seed=0), unit(5, 6, seed=1), unit(3, 6, seed=2), unit(4, 6, seed=3), torch.tensor(9.0).double()]

    def textbook(x, y, more_y, more_x, scale):
        total = 0.0
        for rows, columns, more, more_ids in ((x, y, more_y, extra_ids), (y, x, more_x, torch.full((4,), 99))):
            if rows is y and len(directions_of(objective, rows)) == 1:
                continue
            z = scale * torch.cat([rows @ columns.T, rows @ more.T], 1)
            group = torch.cat([ids, more_ids])
            total += sum(textbook_anchor_loss(objective, z[i], i, group == ids[i], scale) for i in range(5)) / 5
        return total / len(directions_of(objective, x))

    def ours(x, y, more_y, more_x, scale):
        extras = {"b": (more_y, extra_ids), "a": more_x}
        return contrastive_loss(
            {"a": x, "b": y}, objective=objective, logit_scale=scale, ids=ids, extra_negatives=extras, tile_size=2
        )

    assert_all_close(value_and_grads(ours, *leaves), value_and_grads(textbook, *leaves), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_a_prior_for_each_sample(backend):
    """As memeff's debiased loss takes one a row; 0 is InfoNCE."""
    priors, keep = torch.tensor([0.0, 0.1, 0.02, 0.3, 0.05]), torch.tensor([True, True, False, True, True])
    ids = torch.tensor([0, 1, -1, 3, 1])
    leaves = [unit(5, 6, seed=0), unit(5, 6, seed=1), torch.tensor(9.0).double()]

    def textbook(x, y, scale):
        z, group, total = scale * x[keep] @ y[keep].T, ids[keep], 0.0
        for i, prior in enumerate(priors[keep].tolist()):
            objective = {"type": "debiased", "tau_plus": prior} if prior else "infonce"
            total = total + sum(textbook_anchor_loss(objective, d[i], i, group == group[i], scale) for d in (z, z.T)) / 8
        return total

    def ours(x, y, scale):
        given = {"sample_values": {"tau_plus": priors.double()}, "ids": ids, "backend": backend}
        return contrastive_loss({"a": x, "b": y}, objective={"type": "debiased", "tau_plus": 0.2}, logit_scale=scale, **given)

    assert_all_close(value_and_grads(ours, *leaves), value_and_grads(textbook, *leaves), rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="InfoNCE takes no sample_values 'tau_plus': it takes none"):
        contrastive_loss({"a": leaves[0], "b": leaves[1]}, logit_scale=1.0, sample_values={"tau_plus": priors})


def test_scales_per_pair():
    fields = {name: unit(6, 4, seed=k) for k, name in enumerate("abc")}
    scales = {("b", "a"): 3.0, ("a", "c"): 5.0, ("b", "c"): 7.0}
    got = contrastive_loss(fields, logit_scale=scales)
    parts = [
        contrastive_loss({a: fields[a], b: fields[b]}, logit_scale=scales.get((a, b), scales.get((b, a))))
        for a, b in itertools.combinations("abc", 2)
    ]
    torch.testing.assert_close(got, sum(parts) / 3)
    with pytest.raises(ValueError, match=r"no entry for \('a', 'c'\)"):
        contrastive_loss(fields, logit_scale={("a", "b"): 1.0})


@pytest.mark.parametrize("pairing", [AllPairs, lambda weights: Anchor("b", weights)], ids=["all_pairs", "anchor"])
def test_weights_of_pairs(pairing):
    fields = {name: unit(6, 4, seed=k) for k, name in enumerate("abc")}
    weighted = contrastive_loss(fields, pairing=pairing({"b-a": 3.0, "b-c": 0.5}), logit_scale=9.0)
    counts = {("a", "b"): 3.0, ("b", "c"): 0.5} | ({("a", "c"): 1.0} if pairing is AllPairs else {})
    parts = {(a, b): contrastive_loss({a: fields[a], b: fields[b]}, logit_scale=9.0) for a, b in counts}
    torch.testing.assert_close(weighted, sum(counts[pair] * parts[pair] for pair in counts) / sum(counts.values()))
    alone = contrastive_loss(fields, pairing=AllPairs({"a-b": 0.0, "c-a": 0.0}), logit_scale=9.0)
    torch.testing.assert_close(alone, contrastive_loss({f: fields[f] for f in "bc"}, logit_scale=9.0))


def test_a_pair_that_is_empty_or_weighs_nothing_still_reaches_every_field():
    fields = {name: unit(3, 4, seed=k).requires_grad_() for k, name in enumerate("abc")}
    contrastive_loss(fields, pairing=AllPairs({"a-c": 0.0, "b-c": 0.0}), logit_scale=9.0).backward()
    assert fields["c"].grad is not None and not fields["c"].grad.any() and fields["a"].grad.any()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_signals_are_what_they_say_and_change_nothing(objective):
    ids = {"a": torch.tensor([0, 0, 1, 2, 3, -1, 5]), "b": torch.tensor([0, 0, 1, -1, 3, 4, 5])}
    x, y = unit(7, 3, seed=0), unit(7, 3, seed=1)
    signals = {}
    options = {"objective": objective, "logit_scale": 7.0, "ids": ids}
    loss = contrastive_loss({"a": x, "b": y}, signals=signals, **options)
    torch.testing.assert_close(loss, contrastive_loss({"a": x, "b": y}, **options))
    keep = (ids["a"] >= 0) & (ids["b"] >= 0)
    x, y, group = x[keep], y[keep], ids["a"][keep]
    want = {"a-b/loss": loss, "a-b/alignment": (x - y).square().sum(1).mean()}
    for name, z in (("a_to_b", 7.0 * x @ y.T), ("b_to_a", 7.0 * y @ x.T)):
        negatives = [row[group != group[i]] for i, row in enumerate(z)]
        correct = [z[i, i] > row.max() for i, row in enumerate(negatives)]
        numbers = [row.exp().sum() ** 2 / (2 * row).exp().sum() for row in negatives]
        want[f"{name}/accuracy"] = torch.tensor(correct).double().mean()
        want[f"{name}/effective_negatives"] = sum(numbers) / len(numbers)
        want[f"{name}/temperature"] = torch.tensor(1 / 7).double()
    assert signals.keys() == want.keys() and not any(value.requires_grad for value in signals.values())
    for name, value in signals.items():
        torch.testing.assert_close(value, want[name])


def test_hard_negatives_weigh_more_the_larger_beta():
    """The share of the gradient that the harder half of an anchor's negatives gets grows with beta (HN-NCE)."""
    x, y = unit(40, 8, seed=0), unit(40, 8, seed=1)
    z = (x @ y.T).requires_grad_()
    hard = z.detach() > z.detach().median()
    shares = []
    for beta in (0.0, 0.1, 0.3, 1.0, 3.0):
        embeddings = {"a": z, "b": torch.eye(40, dtype=z.dtype)}  # so that the gradient is by the scores themselves
        loss = contrastive_loss(
            embeddings, objective={"type": "hard_negative", "beta": beta, "detach_weights": True}, logit_scale=2.0
        )
        (grad,) = torch.autograd.grad(loss, z)
        grad = grad.fill_diagonal_(0.0)
        shares.append((grad * hard).sum() / grad.sum())
    assert all(a < b for a, b in itertools.pairwise(shares))
    assert shares[-1] > shares[0] + 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([0, 1, -2])}, "≥ 0, or −1"),
        ({"ids": {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([0, 1, 3])}}, "one id in all fields"),
        ({"ids": {"c": torch.tensor([0, 1, 2])}}, "field 'c'"),
        ({"ids": torch.tensor([0.0, 1, 2])}, r"int64 \[3\]"),
        ({"objective": "infonse"}, "did you mean 'infonce'"),
        ({"objective": {"type": "infonce", "beta": 1}}, "no option 'beta'"),
        ({"objective": {"type": "hard_negative", "beta": -1.0}}, "beta is -1.0, it must be ≥ 0"),
        ({"objective": {"type": "hard_negative", "alpha": 2.0}}, r"alpha is 2.0, it must be in \[0, 1\]"),
        ({"objective": {"type": "debiased", "tau_plus": 1.0}}, r"tau_plus is 1.0, it must be in \[0, 1\)"),
        ({"objective": {"type": "debiased", "beta": float("nan")}}, "beta is nan"),
        ({"pairing": {"type": "all_pairs", "weights": {"a-c": 1.0}}}, "no term is named 'a-c'; there is a-b"),
        ({"pairing": {"type": "all_pairs", "weights": {"a-b": -1.0}}}, "the weight of 'a-b' is -1.0"),
        ({"pairing": {"type": "all_pairs", "weights": {"a-b": 0.0}}}, "all weights are 0"),
        ({"pairing": {"type": "anchor"}}, "missing a required argument: 'field'"),
        ({"pairing": {"type": "anchor", "field": "c"}}, "no field 'c'"),
        ({"extra_negatives": {"a": torch.zeros(2, 5)}}, "extra_negatives of field 'a'"),
        ({"extra_negatives": {"a": (torch.zeros(2, 4).double(), torch.arange(2))}}, "pass ids"),
        ({"sample_ids": torch.arange(2)}, r"sample_ids must be int64 .3., not torch.int64 .2."),
        ({"sample_ids": torch.arange(3, dtype=torch.int32)}, r"sample_ids must be int64 .3., not torch.int32"),
        ({"ids": [0, 1, 2]}, "ids of field 'a' must be an int64 tensor .3., not list"),
    ],
)
def test_mistakes_are_named(change, message):
    fields = {"a": unit(3, 4, seed=0), "b": unit(3, 4, seed=1)}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(fields, **({"logit_scale": 10.0} | change))


def test_shapes_are_checked_by_field():
    with pytest.raises(ValueError, match="field 'b'"):
        contrastive_loss({"a": torch.zeros(3, 4), "b": torch.zeros(2, 4)}, logit_scale=1.0)
    for fields in ({"a": torch.zeros(3, 4)}, {}):
        with pytest.raises(ValueError, match="two fields"):
            contrastive_loss(fields, logit_scale=1.0)
    with pytest.raises(ValueError, match="embeddings are tensors by field"):
        contrastive_loss((torch.zeros(3, 4), torch.zeros(3, 4)), logit_scale=1.0)


def test_objectives_see_the_sample_ids_of_their_anchors():
    class Remember(InfoNCE):
        def forward(self, d):
            seen.append(d.sample_ids.tolist())
            return super().forward(d)

    seen = []
    ids = {"a": torch.tensor([0, -1, 2]), "b": torch.tensor([0, 1, 2])}
    fields = {"a": unit(3, 4, seed=0), "b": unit(3, 4, seed=1)}
    contrastive_loss(fields, objective=Remember(), logit_scale=1.0, ids=ids, sample_ids=torch.tensor([7, 8, 9]))
    assert seen == [[7, 9], [7, 9]]


@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["wrapped", "as it is"])
def test_a_compiled_training_step_contains_it(whole):
    """As it is with a graph break at every branch on data, wrapped in `torch.compiler.disable` with one."""
    loss_of = torch.compiler.disable(contrastive_loss) if whole else contrastive_loss
    towers = {"image": torch.nn.Linear(8, 4), "text": torch.nn.Linear(6, 4)}
    inputs = {"image": torch.randn(12, 8), "text": torch.randn(12, 6)}
    leaves = [p for tower in towers.values() for p in tower.parameters()] + [torch.tensor(2.0, requires_grad=True)]

    def step(inputs):
        embeddings = {field: F.normalize(towers[field](values), dim=1) for field, values in inputs.items()}
        return loss_of(embeddings, logit_scale=leaves[-1].exp(), ids=torch.arange(12) % 9)

    plain = step(inputs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, backend="aot_eager")(inputs)  # inductor takes half a minute here, and a C++ compiler
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1 or not whole
    torch.testing.assert_close(compiled, plain)
    for a, b in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("objective", ["infonce", "dcl", "siglip"])
def test_a_second_derivative_is_refused(objective):
    x = F.normalize(torch.randn(4, 3), dim=1).requires_grad_()
    loss = contrastive_loss({"a": x, "b": x.roll(1, 0)}, objective=objective, logit_scale=5.0, logit_bias=0.0)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, x, create_graph=True)
