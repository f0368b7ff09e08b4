"""Mined negatives in training: the loss by hand, with gradient caching, on two ranks, interrupted and resumed."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mmcontrast.config import load_config
from mmcontrast.data import training_batches
from mmcontrast.errors import UserError
from mmcontrast.runs import make_run_context, open_run
from tests.command import mmcontrast
from tests.training.teaching import N, run, write_config, write_vectors


@pytest.fixture
def mined(tmp_path):
    """For each sample 0 to 4 of the others."""
    random = np.random.default_rng(7)
    rows = [random.permutation([j for j in range(N) if j != k])[: k % 5].tolist() for k in range(N)]
    pq.write_table(pa.table({"sample_id": list(range(N)), "candidate_ids": rows}), tmp_path / "mined.parquet")
    return tmp_path / "mined.parquet"


def losses(tmp_path, name):
    return [json.loads(line)["loss"] for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def test_they_are_negatives_of_their_own_anchor(tmp_path, mined):
    """Of two fields at once: the loss by hand; the same with gradient caching; accumulated beside a queue alike on one and two
    ranks; interrupted and resumed, to the bit; and the run is opened without the table."""
    shards = write_vectors(tmp_path / "t.tar")
    tables = [{"table": str(mined), "field": "b", "count": 2}, {"table": str(mined), "field": "a"}]
    path = write_config(tmp_path, shards, data={"negatives": tables}, train={"steps": 6, "checkpoint_every": 2})
    job = make_run_context(load_config(path))
    assert job.negative_of == {"b.negative.0": "b", "b.negative.1": "b", "a.negative.0": "a"}
    assert job.own_negatives == {*job.negative_of}
    (batch,) = training_batches(job.dataset, job.order, range(1), rank=0, world_size=1, num_workers=0, pin_memory=False)
    counts = torch.tensor([k % 5 for k in batch.sample_ids.tolist()])
    for name, least in (("b.negative.0", 1), ("b.negative.1", 2), ("a.negative.0", 1)):
        assert torch.equal(batch.present[name], counts >= least)
    out = job.model(batch).fields
    scale = job.model.log_logit_scale.exp()
    scores, terms = scale * out["a"] @ out["b"].T, []
    for x, y, own in (("a", "b", ["b.negative.0", "b.negative.1"]), ("b", "a", ["a.negative.0"])):
        more = scale * torch.einsum("nd,nkd->nk", out[x], torch.stack([out[name] for name in own], 1))
        more[~torch.stack([batch.present[name] for name in own], 1)] = -torch.inf
        both = torch.cat([scores if (x, y) == ("a", "b") else scores.T, more], 1)
        terms.append((both.logsumexp(1) - scores.diagonal()).mean())
    want = sum(terms) / 2
    run(path, "run.name=plain")
    assert losses(tmp_path, "plain")[0] == pytest.approx(want.item(), rel=1e-5)
    run(path, "run.name=none", "data.negatives=[]")
    assert losses(tmp_path, "plain")[0] > 1.01 * losses(tmp_path, "none")[0]
    run(path, "run.name=cached", "train.micro_batch_size=3", "data.num_workers=2")
    assert losses(tmp_path, "cached") == pytest.approx(losses(tmp_path, "plain"), rel=1e-5)

    more = ["train.accumulation_steps=2", "train.queue_size=8"]
    run(path, "run.name=parts", *more)
    done = mmcontrast("train", path, "run.name=two", *more, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "parts"), rel=1e-4)

    run(path, "run.name=again", "train.steps=4", "train.schedule=constant")
    run(path, "run.name=again", "train.schedule=constant", "data.num_workers=1", resume=True)
    run(path, "run.name=whole", "train.schedule=constant")
    ends = [
        load_file(tmp_path / "runs" / n / "checkpoints" / "step-00000006" / "model.safetensors") for n in ("again", "whole")
    ]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())

    other = pq.read_table(mined).to_pylist()
    other[4]["candidate_ids"] = other[4]["candidate_ids"][::-1]
    changed = tmp_path / "changed.parquet"
    pq.write_table(pa.Table.from_pylist(other), changed)
    for negatives in (f"[{{table: {changed}, field: b}}]", "[]", f"[{{table: {mined}, field: b, count: 1}}]"):
        with pytest.raises(UserError, match="cannot resume .*its data order had data="):
            run(path, "run.name=again", "train.steps=8", f"data.negatives={negatives}", resume=True)
    mined.unlink()
    assert set(open_run(tmp_path / "runs" / "whole", device="cpu").model.modalities) == {"a", "b"}


def test_what_does_not_fit_is_refused(tmp_path, mined):
    shards = write_vectors(tmp_path / "t.tar")
    path = write_config(tmp_path, shards, data={"negatives": {"table": str(mined), "field": "b"}})
    third = "fields.c={modality: {type: vector, width: 6}, tower: a, keys: [a.npy]}"
    for override, message in (
        ("data.negatives.field=c", r"data.negatives.field: no field 'c' that is contrasted"),
        ("pairing=multilinear", "data.negatives: a product needs a partner in every other field"),
        ("data.sequential=true", "data.negatives: they are read by their ids"),
        ("data.held_out=0.2", r"its candidate \d+ is no sample of the training data"),
        ("data.negatives.count=0", "data.negatives"),
    ):
        with pytest.raises(UserError, match=message):
            make_run_context(load_config(path, [override, third] if "pairing" in override else [override]))
    job = make_run_context(load_config(path, ["data.held_out=0.2", "data.negatives.unknown_ids=skip"]))
    assert len(job.dataset.negatives[0].ids) == len(job.dataset) < N
    with pytest.raises(UserError, match=r"train.teacher: Distillation: .*own_negatives"):
        make_run_context(load_config(path, ["objective=distillation", "train.teacher={stored: {a: a.npy, b: b.npy}}"]))
