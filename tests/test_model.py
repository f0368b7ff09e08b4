"""The model: unit embeddings for who is there, zeros for who is not, and gradients for every tower in every case."""

import torch

from mmcontrast.modalities import VectorModality
from mmcontrast.model import ContrastiveModel
from mmcontrast.towers import LinearTower
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


def test_the_scale_is_clamped():
    model = make(max_logit_scale=50.0)
    for value, clamped in ((10.0, 50.0), (-3.0, 1.0)):
        model.log_logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        torch.testing.assert_close(model.log_logit_scale.exp(), torch.tensor([clamped]))
