"""Hyperbolic scores and cones: against the dense form, value and gradients, and the geometry of a cone."""

import pytest
import torch

from mmcontrast import contrastive_loss
from mmcontrast.objectives.hyperbolic import MIN_RADIUS, Hyperbolic
from tests.objectives.textbook import assert_all_close, textbook_anchor_loss, unit, value_and_grads


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("objective", ["infonce", "siglip"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_it_is_the_dense_form(objective, scale, backend):
    ids = torch.tensor([0, 1, 2, 2, -1, 5, 6])
    keep, group = ids >= 0, ids[ids >= 0]
    leaves = [0.8 * unit(7, 5, seed=0), 1.4 * unit(7, 5, seed=1)]
    leaves += [torch.tensor(v).double() for v in (scale, 3.0, 0.6)]

    def lifted(v, c):
        length = c.sqrt() * v.norm(dim=1, keepdim=True)
        space = torch.sinh(length) * v / length
        return space, (1 / c + (space**2).sum(1, keepdim=True)).sqrt()

    def textbook(image, text, s, b, c):
        (x, x_time), (y, y_time) = lifted(image[keep], c), lifted(text[keep], c)
        z = s * -torch.acosh(-c * (x @ y.T - x_time @ y_time.T)) / c.sqrt() + b
        turned = [z] if objective == "siglip" else [z, z.T]
        losses = [textbook_anchor_loss(objective, d[i], i, group == group[i], s) for d in turned for i in range(6)]
        inner = c * ((x * y).sum(1) - (x_time * y_time)[:, 0])
        length = y.norm(dim=1)
        angle = ((x_time[:, 0] + y_time[:, 0] * inner) / (length * (inner**2 - 1).sqrt())).acos()  # at the text
        outside = (angle - (2 * MIN_RADIUS / (c.sqrt() * length)).asin()).clamp_min(0)
        return torch.stack(losses).mean() + 0.3 * outside.mean()

    def ours(image, text, s, b, c):
        return contrastive_loss(
            {"image": image, "text": text},
            objective=objective,
            score={"type": "lorentz", "curvature": c, "general": "text", "entailment": 0.3},
            logit_scale=s,
            logit_bias=b,
            ids=ids,
            backend=backend,
            tile_size=3,
        )

    assert_all_close(value_and_grads(ours, *leaves), value_and_grads(textbook, *leaves), rtol=1e-9, atol=1e-9)


def test_a_cone_opens_away_from_the_origin():
    """What lies behind a point, seen from the origin, is inside of its cone; the origin's side and the other side are not."""
    general = torch.tensor([[0.5, 0.0]]).double()
    behind, before, opposite = (torch.tensor([[v, 0.001]]).double() for v in (1.5, 0.2, -1.5))
    penalty = [Hyperbolic(1.0, general="text").penalty({"image": v, "text": general}) for v in (behind, before, opposite)]
    assert penalty[0] == 0 and penalty[1] > 0.3 and penalty[2] > 0.3
    assert Hyperbolic().penalty({"image": behind, "text": general}) is None
