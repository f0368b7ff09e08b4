"""Weights in shards (FSDP2) on two gloo ranks: what one process and two whole copies do, and checkpoints across all of them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.command import mmcontrast
from tests.results import results_of

CONVNEXT = {"type": "timm", "model": "test_convnext", "in_chans": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
CONVNEXT = json.dumps(CONVNEXT)  # without batch norms, which see ranks apart
SETTINGS = [
    "train.steps=5", "data.lanes=2", "train.lr=1e-4", f"towers.image={CONVNEXT}", f"towers.audio={CONVNEXT}",
    "towers.text.config.num_hidden_layers=2", "fields.image.modality.size=48", "fields.audio.modality.mels=32",
    "fields.audio.modality.hop=200", "train.ema_decay=0.5", "train.evaluate_every=3", "train.checkpoint_every=5",
]  # fmt: skip
SLOW = pytest.mark.slow  # as `make test-slow` runs them
FSDP, DDP = "train.parallel=fsdp", "train.parallel=ddp"


def train(config_file, ranks, *options, settings=SETTINGS):
    done = mmcontrast("train", config_file, *settings, *options, ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]


def end_of(run):
    last = run / "checkpoints" / "step-00000005"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return losses, load_file(last / "model.safetensors"), load_file(last / "ema.safetensors")


def assert_equal_ends(run, other):
    ours, theirs = end_of(run), end_of(other)
    assert len(ours[0]) == 5 and ours[0] == pytest.approx(theirs[0], rel=1e-4)
    for weights, expected in zip(ours[1:], theirs[1:], strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    results = [results_of(run), results_of(other)]
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        if "uniformity" in name:
            assert results[0][name] == pytest.approx(results[1][name], abs=1e-3)


@pytest.mark.parametrize(
    "case",
    ["caching", *(pytest.param(c, marks=SLOW) for c in ("plain", "recomputed blocks, a queue, accumulation, kept weights"))],
)
def test_shards_train_as_whole_copies_do(config_file, tmp_path, case):
    options = {"plain": [], "caching": ["train.micro_batch_size=5"]}.get(case)
    if options is None:
        options = ["train.recompute=[image, text]", "train.queue_size=24", "train.accumulation_steps=2"]
        options += ["train.reshard_after_forward=false", "train.freeze={towers.text.network.embeddings.*: 3}"]
    runs = tmp_path / "runs"
    train(config_file, 1, *options, "run.name=one")
    train(config_file, 2, *options, FSDP, "run.name=fsdp")
    assert_equal_ends(runs / "fsdp", runs / "one")
    if case != "caching":  # tests/distributed/test_data_parallel.py compares one process and whole copies that cache
        train(config_file, 2, *options, DDP, "run.name=ddp")
        assert_equal_ends(runs / "ddp", runs / "one")
    shards = runs / "fsdp" / "checkpoints" / "step-00000005" / "optimizer"
    assert {file.name for file in shards.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}


@pytest.mark.slow
def test_a_checkpoint_of_shards_goes_on_whole_and_back(config_file, tmp_path):
    """Two ranks with shards → one process → two with whole copies → shards, against a run that was left alone."""
    for steps, ranks, options in ((2, 2, [FSDP]), (3, 1, ["--resume"]), (4, 2, [DDP, "--resume"]), (5, 2, [FSDP, "--resume"])):
        train(config_file, ranks, *options, "run.name=changing", "train.schedule=constant", f"train.steps={steps}")
    train(config_file, 1, "run.name=constant", "train.schedule=constant")
    assert_equal_ends(tmp_path / "runs" / "changing", tmp_path / "runs" / "constant")


@pytest.mark.parametrize("parallel", [FSDP, pytest.param(DDP, marks=SLOW)])
def test_what_is_evaluated_is_what_is_saved(config_file, tmp_path, parallel):
    """Batch norms see ranks apart; all evaluate with the statistics that are saved. With an average, in half precision."""
    options = ["train.steps=3", "data.lanes=2", parallel, "train.ema_decay=0.5"]
    options += ["train.precision=bf16"] if parallel == FSDP else []
    train(config_file, 2, *options, settings=())
    run = tmp_path / "runs" / "small"
    results = results_of(run)
    assert mmcontrast("evaluate", run).returncode == 0
    again = results_of(run)
    if parallel == DDP:
        assert results == pytest.approx(again, abs=1e-4, rel=1e-4, nan_ok=True)
    else:  # evaluated in fp32 the second time
        of_fields = {name: value for name, value in results.items() if "uniformity" in name}
        assert of_fields == pytest.approx({name: again[name] for name in of_fields}, abs=0.02)
