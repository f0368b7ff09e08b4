"""SIGKILL at random moments, in saves too: the run that is resumed every time ends as one that was left alone."""

import json
import random
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from mmcontrast.training import checkpoint
from tests import command
from tests.command import NO_EVALUATION

VIT = {"type": "timm", "model": "test_vit", "in_chans": 1, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
IMAGE, AUDIO = (json.dumps(VIT | {"img_size": size}) for size in ([48, 48], [32, 64]))  # no batch norm, which sees ranks apart
STEPS = 33
SETTINGS = [
    f"train.steps={STEPS}", "train.checkpoint_every=3", "train.warmup_steps=12", "train.lr=1e-3", "data.num_workers=1",
    "data.record_samples=true",
]  # fmt: skip
LIBRARIES = [
    *NO_EVALUATION, f"towers.image={IMAGE}", f"towers.audio={AUDIO}", "towers.text.config.hidden_dropout_prob=0.1",
    "fields.image.modality.size=48", "fields.audio.modality.mels=32", "fields.audio.modality.hop=186",
]  # fmt: skip


def start(config_file, ranks, *options, real=False):
    """Return the processes: forks, one for each rank; or in `real` a new interpreter, which is torchrun if there are two."""
    words = ("train", config_file, *SETTINGS, *options)
    return [command.start(*words, ranks=ranks, real=True)] if real else command.start_ranks(*words, ranks=ranks)


def finish(processes):
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]


def kill(processes, run, moment, chooser):
    """At a step, or while a checkpoint is being written, from `moment` on."""
    writing = chooser.random() < 0.5
    deadline = time.monotonic() + 600
    try:
        while True:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            last = checkpoint.complete(run / "checkpoints")[-1:]
            step = int(last[0].name[-8:]) if last else 0
            partial = writing and step < moment + 12 and not list((run / "checkpoints").glob(".*.partial"))
            if step >= max(moment, 1) and not partial:
                break
            time.sleep(0.0005 if writing else 0.005)
        if not writing:
            time.sleep(chooser.random() * 0.1)
    finally:
        for process in processes:
            process.kill()  # torchrun alone, if it is there: its ranks go with it
        for process in processes:
            process.communicate()


def end_of(run):
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    weights = {
        f"{file.name}/{name}": tensor for file in sorted(last.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    remembered = [leaf for leaf in tree_leaves(checkpoint.load_state(last)["objective"]) if isinstance(leaf, torch.Tensor)]
    weights |= {f"objective/{number}": tensor for number, tensor in enumerate(remembered)}
    return weights, (run / "samples.jsonl").read_text()


def end_alike(config_file, run, options, ranks, kills):
    """Train whole, and killed so many times; return the weights at both ends, whose steps saw the same samples."""
    finish(start(config_file, ranks, *options, "run.name=whole"))
    chooser = random.Random(ranks)
    moments = sorted([3, 4, *(chooser.randrange(5, 24) for _ in range(kills - 2))])
    for number, moment in enumerate(moments):
        resume = ["--resume"] if number else []
        processes = start(config_file, ranks, *options, "run.name=killed", *resume, real=number in (0, 5))
        kill(processes, run, moment, chooser)
    finish(start(config_file, ranks, *options, "run.name=killed", "--resume"))
    (whole, seen), (killed, seen_again) = end_of(run.with_name("whole")), end_of(run)
    assert seen == seen_again and len(seen.splitlines()) == STEPS
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1)) and whole.keys() == killed.keys()
    return whole, killed


@pytest.mark.slow(minutes=1)
def test_ten_kills(config_file, tmp_path):
    """Bitwise, with dropout, caching, an average and running estimators; no sample is lost, or seen twice in an epoch."""
    options = [*LIBRARIES, "data.lanes=4", "train.ema_decay=0.99", "train.micro_batch_size=11"]  # unequal parts
    options += ["objective={type: global, temperature: individual}"]
    whole, killed = end_alike(config_file, tmp_path / "runs" / "killed", options, 1, kills=10)
    assert any(name.startswith("objective/") for name in whole)
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


@pytest.mark.slow(minutes=1)
def test_six_kills_of_two_ranks(vectors_file, tmp_path):
    """With caching, an average and a queue: equal to rounding; no sample lost or seen twice."""
    options = ["train.ema_decay=0.99", "train.micro_batch_size=3", "train.queue_size=20"]
    whole, killed = end_alike(vectors_file, tmp_path / "runs" / "killed", options, 2, kills=6)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, killed[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_other_numbers_of_ranks(vectors_file, tmp_path):
    """2 → 1 → 2, killed in between: equal to rounding."""
    finish(start(vectors_file, 2, "run.name=whole"))
    chooser = random.Random(0)
    run = tmp_path / "runs" / "killed"
    for ranks, moment, resume in ((2, 9, []), (1, 21, ["--resume"])):
        kill(start(vectors_file, ranks, "run.name=killed", *resume), run, moment, chooser)
    finish(start(vectors_file, 2, "run.name=killed", "--resume"))
    (whole, seen), (killed, seen_again) = end_of(tmp_path / "runs" / "whole"), end_of(run)
    assert seen == seen_again
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, killed[name], rtol=1e-3, atol=1e-4)
