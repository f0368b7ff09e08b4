"""Tests, without a card, that every tensor of a pass is made on the inputs' device, and that nothing waits for it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmcontrast import contrastive_loss
from mmcontrast.objectives.names import OBJECTIVES
from mmcontrast.score.backends import BACKENDS
from mmcontrast.score.backends.base import Block, SameGroup, Statistics
from tests.score.problems import REDUCTIONS


def asks_the_driver_of_fake_tensors() -> bool:
    """Return whether this torch needs a card's driver to slice a tensor that has no contents: 2.8 does, 2.14 does not."""
    with FakeTensorMode():
        try:
            torch.empty(2, device="cuda")[:1].to(torch.float32)
        except RuntimeError:
            return True
    return False


pytestmark = pytest.mark.skipif(asks_the_driver_of_fake_tensors(), reason="this torch asks the driver of fake tensors")


@pytest.mark.parametrize("per_anchor", [False, True], ids=["scalar", "per_anchor"])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_tensors_of_a_pass_are_where_the_inputs_are(reduction, per_anchor):
    for n in (1, 5, 600):
        with FakeTensorMode():  # shapes and devices alone; a look at a value of a device raises
            x, y, row, column = (torch.empty(n, 8, device="cuda") for _ in range(4))
            scales = (row[:, 0], column[:, 0]) if per_anchor else (row[0, 0], None)
            ids = torch.zeros(n, dtype=torch.int64, device="cuda")
            block = Block(x, y, *scales, row[0, 0], SameGroup(ids, ids), (reduction,), True, None)
            final = BACKENDS["torch"].forward(block)
            gradients = BACKENDS["torch"].backward(block, final, Statistics(final.rows, final.columns), torch.zeros_like(x))
            made = [*final.rows, *final.columns, gradients.dy, gradients.bias]
        assert all(tensor.device.type == "cuda" for tensor in made)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in ("global", "distillation")])
def test_no_objective_waits_for_the_device(objective):
    with FakeTensorMode():
        rows = {field: torch.empty(12, 8, device="cuda") for field in ("image", "text")}
        scale = torch.empty((), device="cuda")
        loss = contrastive_loss(rows, objective=objective, logit_scale=scale, logit_bias=scale, backend="torch")
    assert loss.device.type == "cuda"
