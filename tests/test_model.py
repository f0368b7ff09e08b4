"""The model: unit embeddings for who is there, zeros for who is not, and gradients for every tower in every case."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from mmcontrast.modalities import VectorModality
from mmcontrast.models import ContrastiveModel, LinearTower, Tower
from mmcontrast.plan.memory import CannotBePlanned, flops_of
from mmcontrast.types import Batch


def make(**options):
    modalities = {field: VectorModality(3) for field in ("a", "b", "c")}
    towers = {"shared": LinearTower(3, 4), "own": LinearTower(3, 4)}
    return ContrastiveModel(modalities, towers, {"a": "shared", "b": "shared", "c": "own"}, 5, **options)


def batch(present_c):
    here = torch.tensor(present_c)
    return Batch(
        {"a": torch.randn(3, 3), "b": torch.randn(3, 3), "c": torch.randn(max(1, int(here.sum())), 3)},
        {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bool), "c": here},
        torch.arange(3), torch.arange(3), [{}] * 3,
    )  # fmt: skip


def test_fields_share_a_tower_and_absent_rows_are_zero():
    model, samples = make(logit_bias=-10.0), batch([True, False, True])
    out = model(samples)
    assert out.logit_scale.dim() == 0 and out.logit_bias == -10
    torch.testing.assert_close(out.fields["a"].norm(dim=1), torch.ones(3))
    assert out.fields["c"].norm(dim=1).tolist()[1] == 0
    torch.testing.assert_close(out.fields["c"][[0, 2]], model.encode("c", samples.values["c"]))


def test_every_tower_has_a_gradient_even_where_nobody_has_its_field():
    for present in ([False, False, False], [True, False, False], [True, True, True]):
        model = make(projection="mlp")
        out = model(batch(present))
        (sum(rows.sum() for rows in out.fields.values()) + out.logit_scale).backward()
        assert all(p.grad is not None for p in model.parameters())


class NormTower(Tower):
    """Every way to remember what passes: batch norms, a norm over instances, and dropout."""

    def __init__(self, kind):
        super().__init__()
        self.width = 4
        first = {"1d": nn.BatchNorm1d(6), "2d": nn.Sequential(nn.Unflatten(1, (2, 3, 1)), nn.BatchNorm2d(2), nn.Flatten())}
        first["instance"] = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten())
        self.network = nn.Sequential(nn.Linear(3, 6), first[kind], nn.Dropout(0.3), nn.Linear(6, 4))

    def forward(self, batch):
        return self.network(batch)


def with_norms(kind):
    torch.manual_seed(0)
    modalities, towers = {f: VectorModality(3) for f in ("a", "b", "c")}, {"shared": NormTower(kind), "own": NormTower(kind)}
    return ContrastiveModel(modalities, towers, {"a": "shared", "b": "shared", "c": "own"}, 5, "mlp")


@pytest.mark.parametrize("kind", ["1d", "2d", "instance"])
def test_norms_learn_nothing_of_a_field_that_nobody_has(kind):
    """Steps that lack a field leave its tower's statistics as they are, bit for bit; yet every weight has a gradient, and a
    micro-batch, a step of one sample and a copy do the same."""
    model, there, nobody = with_norms(kind), batch([True, True, True]), batch([False, False, False])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for part in (nobody, *nobody.split(2), *nobody.deal(3), copy.deepcopy(nobody)):
        out = model(part)
        assert not out.fields["c"].any()
        (sum(rows.sum() for rows in out.fields.values()) + out.logit_scale).backward()
    for name, buffer in model.named_buffers():
        if name.startswith("towers.own"):
            assert torch.equal(buffer, before[name]), name
        elif "towers" in name and not (kind == "instance" and buffer.dim() == 0):  # which torch leaves at 0
            assert not torch.equal(buffer, before[name]), f"{name}: others' are counted"
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.training and all(module.training for module in model.modules())
    first = dataclasses.replace(there, present=there.present | {"a": torch.zeros(3, dtype=torch.bool)})
    first.values["a"] = first.values["a"][:1]
    sum(rows.sum() for rows in model(first).fields.values()).backward()  # `b` changes what `a` was computed with
    changed = [name for name, buffer in model.named_buffers() if "own" in name and not torch.equal(buffer, before[name])]
    assert changed


def test_a_row_that_is_alone_gets_the_running_statistics():
    """Torch would refuse it in the middle of a run: one value has no variance."""
    model, alone = with_norms("1d"), batch([False, True, False])
    model.towers["own"].network[2].p = 0.0
    out = model(alone)
    model.eval()
    torch.testing.assert_close(out.fields["c"][1], model(alone).fields["c"][1])
    assert model.towers["own"].network[1].num_batches_tracked == 0


def test_an_error_of_a_tower_names_it_and_what_it_was_given():
    towers = {"one": LinearTower(6, 4), "two": LinearTower(7, 4)}
    model = ContrastiveModel({f: VectorModality(6) for f in "ab"}, towers, {"a": "one", "b": "two"}, 4)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as raised:
        model.encode("b", torch.ones(3, 6))
    assert raised.value.__notes__ == ["in tower 'two', given field 'b' as [3, 6] of torch.float32"]
    with pytest.raises(CannotBePlanned, match=r"shapes cannot be multiplied .* in tower 'two', given field 'b'"):
        flops_of(model)


def test_the_scale_is_clamped():
    model = make(max_logit_scale=50.0)
    for value, clamped in ((10.0, 50.0), (-3.0, 1.0)):
        model.log_logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        torch.testing.assert_close(model.log_logit_scale.exp(), torch.tensor([clamped]))
