"""The queue of past embeddings, and fields that only provide negatives."""

import torch
from accelerate import Accelerator

from mmcontrast import contrastive_loss
from mmcontrast.objectives import InfoNCE
from mmcontrast.objectives.pairing import AllPairs
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.queue import MomentumQueue
from mmcontrast.training.step import Learner
from tests.training.samples import make_batch, make_model

CPU = torch.device("cpu")


def pushed(queue, batch, micro=None):
    queue.push(batch, micro, CPU, None)
    with torch.no_grad():
        return queue.encoder(batch).fields


def test_it_keeps_the_last_rows_of_those_who_have_the_field():
    queue, batches = MomentumQueue(make_model(), ["a", "c"], 25, 0.9), [make_batch(12, seed) for seed in range(4)]
    assert all(len(rows) == len(ids) == 0 for rows, ids in queue.negatives().values())
    fields = [pushed(queue, batch, micro) for batch, micro in zip(batches, (None, 5, 5, 5), strict=True)]
    for field in ("a", "c"):
        rows = torch.cat([f[field][b.present[field]] for f, b in zip(fields, batches, strict=True)])[-25:].float()
        ids = torch.cat([b.group_ids[b.present[field]] for b in batches])[-25:]
        shares = [queue.negatives(rank, 3)[field] for rank in range(3)]
        found = torch.cat([share[0] for share in shares]), torch.cat([share[1] for share in shares])
        order, wanted = found[0][:, 0].argsort(), rows[:, 0].argsort()
        torch.testing.assert_close(found[0][order], rows[wanted], rtol=1e-6, atol=1e-7)
        assert torch.equal(found[1][order], ids[wanted])


def test_its_encoder_follows_the_model_slowly_and_has_no_dropout():
    model = make_model()
    queue, start = MomentumQueue(model, ["a"], 5, 0.9), make_model().log_logit_scale.detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    for step in (1, 2):
        queue.update_encoder(model)
        expected = start + 1 - 0.9**step
        torch.testing.assert_close(queue.encoder.log_logit_scale, expected)
    assert not any(parameter.requires_grad for parameter in queue.encoder.parameters())
    torch.testing.assert_close(pushed(queue, make_batch(4))["a"], pushed(queue, make_batch(4))["a"])


def test_what_the_loss_of_a_step_is_made_of():
    """Fields `a` and `b` contrasted; `c` and the queue are further candidates, `c` of nobody's group."""
    model, batch = make_model().eval(), make_batch(10)
    queue = MomentumQueue(model, ["a", "b"], 16, 0.9).double()
    queue.push(make_batch(9, seed=1), None, CPU, None)
    accelerator = Accelerator(cpu=True)
    options = TrainOptions(steps=1, batch_size=10)
    for negatives in ({"c": "b"}, {}):
        learner = Learner(model, InfoNCE(), AllPairs(), None, accelerator, options, negatives, queue)
        out = model(batch)
        rows, ids = queue.negatives()["b"]
        fields = "abc"
        if negatives:
            fields = "ab"
            mined = out.fields["c"][batch.present["c"]]
            rows, ids = torch.cat([rows, mined]), torch.cat([ids, torch.full((len(mined),), -2)])
        want = contrastive_loss(
            {f: out.fields[f] for f in fields},
            logit_scale=out.logit_scale,
            logit_bias=out.logit_bias,
            ids={f: batch.ids[f] for f in fields},
            extra_negatives={"a": queue.negatives()["a"], "b": (rows, ids)},
        )
        got = learner.loss(out, batch.labels())
        torch.testing.assert_close(got, want)
        (grad,) = torch.autograd.grad(got, [out.fields["c"]])
        assert grad.any(), "what is mined learns too"
