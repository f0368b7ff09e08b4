"""One step: what is updated is the gradient of the mean over the parts of an accumulated batch."""

import copy

import pytest
import torch
from accelerate import Accelerator

from mmcontrast import contrastive_loss
from mmcontrast.objectives import InfoNCE
from mmcontrast.objectives.pairing import AllPairs
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.step import Learner, training_step
from tests.training.samples import make_batch, make_model


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_an_accumulated_step_is_that_of_the_mean_of_its_parts_losses(parts, micro_batch_size):
    model, batch = make_model().eval(), make_batch(24)
    by_hand = copy.deepcopy(model)
    losses = []
    for part in batch.deal(parts):
        out = by_hand(part)
        scale_and_bias = {"logit_scale": out.logit_scale, "logit_bias": out.logit_bias}
        losses.append(contrastive_loss(out.fields, ids=part.ids, **scale_and_bias))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in by_hand.parameters() if p.grad is not None]).norm()
    torch.optim.SGD(by_hand.parameters(), lr=0.01).step()

    options = TrainOptions(
        steps=10, batch_size=24, accumulation_steps=parts, micro_batch_size=micro_batch_size, lr=0.01, warmup_steps=0,
        schedule="constant", clip_grad_norm=None,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.param_groups[0]["peak_lr"] = 0.01
    learner = Learner(model, InfoNCE(), AllPairs(), optimizer, Accelerator(cpu=True), options, {}, None)
    told = training_step(0, batch, learner)
    assert told["loss"] == pytest.approx(loss.item()) and told["grad_norm"] == pytest.approx(norm.item())
    for (name, updated), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(updated, expected, msg=lambda text, name=name: f"{name}: {text}")
