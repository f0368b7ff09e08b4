"""Prefixes of embeddings: learnt, evaluated, embedded, searched."""

import json

import pytest
import torch
import torch.nn.functional as F

from mmcontrast import contrastive_loss, load
from mmcontrast.config import load_config
from mmcontrast.data import training_batches
from mmcontrast.embedding_job import embed_shards
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, evaluate
from mmcontrast.runs import make_run_context, open_run
from mmcontrast.search.index import build_index
from mmcontrast.search.searcher import Searcher
from tests.training.teaching import run, write_config, write_vectors


def test_a_step_learns_every_prefix(tmp_path):
    shards = write_vectors(tmp_path / "a.tar")
    path = write_config(tmp_path, shards, train={"matryoshka": {2: 0.5, 8: 1.0}, "micro_batch_size": 3})
    job = run(path)
    model = make_run_context(load_config(path)).model
    (batch,) = training_batches(job.dataset, job.order, range(1), rank=0, world_size=1, num_workers=0, pin_memory=False)
    out = model(batch)
    narrow = {field: F.normalize(rows[:, :2], dim=1) for field, rows in out.fields.items()}
    want = sum(
        w * contrastive_loss(e, logit_scale=out.logit_scale, ids=batch.ids) for w, e in ((0.5, narrow), (1.0, out.fields))
    )
    first = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(want.item(), rel=1e-6)
    for given, message in (
        ("[2, 4]", "its largest width is 4, that of the embeddings 8"),
        ("[2, 16]", "its largest width is 16"),
        ("[]", "train.matryoshka"),
        ("{2: 0, 8: 1}", "train.matryoshka"),
        ("[0, 8]", "train.matryoshka"),
    ):
        with pytest.raises(UserError, match=message):
            make_run_context(load_config(path, [f"train.matryoshka={given}"]))
    with pytest.raises(UserError, match="train.matryoshka: objective GlobalContrastive remembers"):
        make_run_context(load_config(path, ["objective=global"]))


def test_results_of_a_width_are_those_of_a_model_of_that_width(config_file, tmp_path):
    """Retrieval and zero-shot tasks with their intervals, those of captions too; a table of prefixes, and a search in it."""
    options = ["train.matryoshka=[4, 16]", "train.steps=2", "evaluation.resamples=20"]
    job = run(config_file, *options)
    found = json.loads((job.folder / "results.json").read_text())["results"]
    model = open_run(job.folder, device="cpu").model
    model.narrow(4)
    narrow = evaluate(model, job.eval_datasets, job.evaluation.model_copy(update={"widths": [4], "resamples": 20}))
    assert not any("@" in name for name in narrow.values)
    tasks = [name for name in narrow.values if "/geometry/" not in name]
    assert {name.partition("@")[0] for name in found if name.endswith("@4")} == set(tasks) and "@16" not in str(found)
    assert any("/zero_shot/" in name for name in tasks)
    for name in tasks:
        assert found[f"{name}@4"]["value"] == pytest.approx(narrow.values[name], abs=1e-6, nan_ok=True), name
        if name in narrow.intervals:
            assert [found[f"{name}@4"][end] for end in ("low", "high")] == pytest.approx(list(narrow.intervals[name]), abs=1e-6)
    shards = load_config(config_file).evaluation.splits["val"]
    for width in (None, 4):
        assert embed_shards(str(job.folder), shards, tmp_path / f"table{width}", width=width, device="cpu")
    whole, part = (EmbeddingTable.read(tmp_path / f"table{width}") for width in (None, 4))
    for field, rows in whole.fields.items():
        torch.testing.assert_close(part.fields[field], F.normalize(rows[:, :4], dim=1))
    manifest = json.loads((tmp_path / "table4" / "manifest.json").read_text())
    assert manifest["width"] == manifest["dim"] == 4
    with pytest.raises(UserError, match=r"width=17: the model's embeddings have 16 numbers"):
        load(job.folder, device="cpu", width=17)
    build_index(tmp_path / "table4", tmp_path / "index", progress=False)
    assert Searcher.open(tmp_path / "index", device="cpu").vector(text="a").shape == (4,)
