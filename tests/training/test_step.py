"""One step: what is updated is the gradient of the mean over the parts of an accumulated batch."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator

from mmcontrast import contrastive_loss
from mmcontrast.config import load_config
from mmcontrast.data import training_batches
from mmcontrast.errors import UserError
from mmcontrast.objectives import InfoNCE
from mmcontrast.objectives.pairing import AllPairs
from mmcontrast.runs import make_run_context
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.step import Learner, training_step
from tests.command import mmcontrast
from tests.training.samples import make_batch, make_model
from tests.training.teaching import run, write_config, write_vectors


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


def test_samples_count_by_their_weights(tmp_path):
    """Those of their json, 1 without one; with gradient caching too."""
    given = {0: 0, 1: 2.5, 2: None, 3: "", 4: 1e-3}
    shards = write_vectors(tmp_path / "a.tar", about=lambda k: {"sample_weight": given[k % 6]} if k % 6 in given else {})
    for micro in (None, 3):
        job = run(write_config(tmp_path, shards, f"run{micro}", train={"micro_batch_size": micro}))
        model = make_run_context(load_config(tmp_path / f"run{micro}.yaml")).model
        (batch,) = training_batches(job.dataset, job.order, range(1), rank=0, world_size=1, num_workers=0, pin_memory=False)
        weights = torch.tensor([float(given.get(k % 6) or (0.0 if k % 6 == 0 else 1.0)) for k in batch.sample_ids.tolist()])
        assert torch.equal(batch.weights, weights)
        out = model(batch)
        want = contrastive_loss(out.fields, logit_scale=out.logit_scale, ids=batch.ids, sample_weights=weights)
        assert want.item() != pytest.approx(contrastive_loss(out.fields, logit_scale=out.logit_scale).item())
        first = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(want.item(), rel=1e-6)


def test_own_negatives_are_candidates_of_their_own_sample(tmp_path):
    """Several of a list in the json, of which some samples lack some; with gradient caching, and on two ranks."""
    random = torch.Generator().manual_seed(3)

    def about(k):
        return {"negatives": torch.randn(k % 4, 6, generator=random).tolist()}

    shards = write_vectors(tmp_path / "a.tar", about=about)
    vector = {"modality": {"type": "vector", "width": 6}}
    fields = {f: vector | {"tower": f, "keys": [f"{f}.npy"]} for f in "ab"}
    fields |= {
        f"n{k}": vector | {"tower": "b", "keys": [f"json:negatives.{k}"], "negative_of": "b", "own": True} for k in (0, 1)
    }
    path = write_config(tmp_path, shards, fields=fields)
    job = make_run_context(load_config(path))
    (batch,) = training_batches(job.dataset, job.order, range(1), rank=0, world_size=1, num_workers=0, pin_memory=False)
    counts = torch.tensor([k % 4 for k in batch.sample_ids.tolist()])
    assert torch.equal(batch.present["n1"], counts >= 2) and 0 < batch.present["n1"].sum() < batch.present["n0"].sum() < 8
    out = job.model(batch)
    x, y, z = (out.fields["a"], out.fields["b"], torch.stack([out.fields["n0"], out.fields["n1"]], 1))
    scores, own = out.logit_scale * x @ y.T, out.logit_scale * torch.einsum("nd,nkd->nk", x, z)
    own = own.masked_fill(counts[:, None] <= torch.arange(2), -torch.inf)
    forth = (torch.cat([scores, own], 1).logsumexp(1) - scores.diagonal()).mean()
    want = (forth + (scores.logsumexp(0) - scores.diagonal()).mean()) / 2
    found = []
    for name, more, ranks in (("plain", [], 1), ("cached", ["train.micro_batch_size=3"], 1), ("two", [], 2)):
        if ranks == 1:
            run(path, f"run.name={name}", *more)
        else:
            done = mmcontrast("train", path, f"run.name={name}", ranks=ranks)
            assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[0][0] == pytest.approx(want.item(), rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)
    with pytest.raises(UserError, match=r"fields.b.own: set fields.b.negative_of, the field of which it is"):
        make_run_context(load_config(path, ["fields.b.own=true"]))
    with pytest.raises(UserError, match=r"train.teacher: Distillation: .*own_negatives"):
        make_run_context(load_config(path, ["objective=distillation", "train.teacher={stored: {a: a.npy, b: b.npy}}"]))
