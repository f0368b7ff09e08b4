"""Distillation against open_clip's, and against the dense form of several teachers with groups, weights and absences."""

import pytest
import torch
from open_clip.loss import DistillClipLoss

from mmcontrast import contrastive_loss
from mmcontrast.objectives import Objective
from mmcontrast.score import CrossSum
from tests.objectives.textbook import assert_all_close, textbook_anchor_loss, unit, value_and_grads


@pytest.mark.parametrize("n", [1, 2, 40])
def test_it_is_open_clips(n):
    """Which adds both terms: alpha 1/2, twice."""
    x, y, u, v = (unit(n, 16, seed=k, dtype=torch.float32) for k in range(4))
    scale, theirs_scale = torch.tensor(14.3), torch.tensor(50.0)
    want = value_and_grads(lambda x, y, s: sum(DistillClipLoss()(x, y, s, u, v, theirs_scale)), x, y, scale)
    got = value_and_grads(
        lambda x, y, s: (
            2.0
            * contrastive_loss(
                {"image": x, "text": y},
                objective={"type": "distillation", "alpha": 0.5},
                teacher={"image": u, "text": v},
                teacher_scale=50.0,
                logit_scale=s,
            )
        ),
        x,
        y,
        scale,
    )
    assert_all_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_several_teachers_are_averaged_after_their_softmaxes(alpha, scale, backend):
    ids = {"a": torch.tensor([0, 1, 2, 2, -1, 5, 6]), "b": torch.tensor([0, 1, 2, 2, 4, -1, 6])}
    keep = torch.tensor([True] * 4 + [False] * 2 + [True])
    teachers = [{f: unit(7, 3 + k, seed=10 * k + j) for j, f in enumerate("ab")} for k in range(3)]
    scales, weights = (5.0, 20.0, 100.0), torch.tensor([1.0, 0.0, 2.0, 0.5, 9.0, 9.0, 3.0])
    leaves = [unit(7, 6, seed=1), unit(7, 6, seed=2), torch.tensor(scale).double()]

    def textbook(x, y, s):
        group, total = ids["a"][keep], 0.0
        z, weight = s * x[keep] @ y[keep].T, weights[keep].double()
        for turn in (lambda t: t, torch.t):
            p = [torch.softmax(turn(k * t["a"][keep] @ t["b"][keep].T), 1) for k, t in zip(scales, teachers, strict=True)]
            distilled = -(torch.stack(p).mean(0) * turn(z).log_softmax(1)).sum(1)
            plain = [textbook_anchor_loss("infonce", turn(z)[i], i, group == group[i], s) for i in range(len(group))]
            mixed = alpha * distilled + (1 - alpha) * torch.stack(plain)
            total = total + (weight * mixed).sum() / weight.sum() / 2
        return total

    def ours(x, y, s):
        return contrastive_loss(
            {"a": x, "b": y},
            objective={"type": "distillation", "alpha": alpha},
            teacher=teachers,
            teacher_scale=scales,
            sample_weights=weights,
            logit_scale=s,
            ids=ids,
            backend=backend,
            tile_size=3,
        )

    assert_all_close(value_and_grads(ours, *leaves), value_and_grads(textbook, *leaves), rtol=1e-10, atol=1e-10)


class Agreement(Objective):
    """What a user writes: the squared difference of the teacher's expected score and the positive's."""

    teachers, reductions = True, (CrossSum(),)

    def forward(self, d):
        return (d[CrossSum()] - d.positives) ** 2


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_an_objective_of_ones_own_takes_a_teacher(backend):
    leaves, u, v = [unit(9, 4, seed=0), unit(9, 4, seed=1), torch.tensor(5.0).double()], unit(9, 3, seed=2), unit(9, 3, seed=3)

    def textbook(x, y, s):
        z, t = s * x @ y.T, 4.0 * u @ v.T
        sides = ((z, t), (z.T, t.T))
        return torch.stack([((torch.softmax(q, 1) * w).sum(1) - w.diagonal()).square().mean() for w, q in sides]).mean()

    def ours(x, y, s):
        given = {"teacher": {"a": u, "b": v}, "teacher_scale": 4.0, "backend": backend, "tile_size": 4}
        return contrastive_loss({"a": x, "b": y}, objective=Agreement(), logit_scale=s, **given)

    assert_all_close(value_and_grads(ours, *leaves), value_and_grads(textbook, *leaves), rtol=1e-10, atol=1e-10)


def test_a_teacher_of_itself_has_no_gradient():
    """Where the softmaxes agree the cross-entropy is least."""
    x, y = unit(9, 4, seed=0), unit(9, 4, seed=1)

    def loss(x, y):
        given = {"teacher": {"a": x.detach(), "b": y.detach()}, "teacher_scale": 8.0}
        return contrastive_loss({"a": x, "b": y}, objective="distillation", logit_scale=8.0, **given)

    _, dx, dy = value_and_grads(loss, x, y)
    assert dx.abs().max() < 1e-14 and dy.abs().max() < 1e-14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "distillation"}, "Distillation learns from a teacher"),
        ({"teacher": {"a": 1}}, "InfoNCE takes no teacher"),
        ({"objective": "distillation", "teacher": {"a": 1}}, "teacher lacks the field 'b'"),
        ({"objective": "distillation", "teacher": {"a": 1, "c": 1}}, "teacher names a field 'c' that embeddings lack"),
        ({"objective": "distillation", "teacher": {"a": 1, "b": 1}, "teacher_scale": [1.0, 2.0]}, "2 entries for 1 teachers"),
        ({"objective": "distillation", "teacher": {"a": 1, "b": 1}, "extra_negatives": {"b": 1}}, "not among them"),
        ({"objective": {"type": "distillation", "alpha": 1.5}}, r"alpha is 1.5, it must be in \[0, 1\]"),
        ({"sample_weights": torch.tensor([1.0, -1.0, 1.0])}, "a weight is a finite number, at least 0"),
        ({"sample_weights": torch.ones(2)}, r"sample_weights is \(2,\), it must be \[3\]"),
    ],
)
def test_mistakes_are_named(change, message):
    rows = {f: unit(3, 4, seed=k) for k, f in enumerate("abc")}
    for option in ("teacher", "extra_negatives"):
        if option in change:
            change = change | {option: {field: rows[field] for field in change[option]}}
    with pytest.raises(ValueError, match=message):
        contrastive_loss({"a": rows["a"], "b": rows["b"]}, **{"logit_scale": 1.0} | change)
