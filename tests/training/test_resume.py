"""Check what a resumed run takes over, what of its config counts, and what a refused one leaves alone."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmcontrast.embedder import load
from mmcontrast.errors import UserError
from mmcontrast.objectives import GlobalContrastive
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from mmcontrast.training.log import StepLines
from mmcontrast.training.saver import Saver
from mmcontrast.training.state import load_objective
from tests.command import NO_EVALUATION, train


@pytest.fixture
def run(config_file, tmp_path) -> Path:
    done = train(config_file, "train.steps=2", "train.schedule=constant", *NO_EVALUATION)
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs" / "small"


def test_a_refused_run_stays_as_it_was(config_file, run):
    before = (run / "config.yaml").read_text()
    for change, message in (("model.embed_dim=8", "the model's [8, 16]"), ("train.steps=1", "already has 2 steps")):
        refused = train(config_file, "--resume", *NO_EVALUATION, "train.steps=4", change)
        assert refused.returncode == 2 and message in " ".join(refused.stderr.split()), refused.stderr
        assert (run / "config.yaml").read_text() == before
    other = train(config_file, "--resume", *NO_EVALUATION, "train.steps=4", "train.optimizer=lion")
    assert other.returncode == 2 and "it was AdamW, and is Lion" in " ".join(other.stderr.split())
    frozen = train(config_file, "--resume", *NO_EVALUATION, "train.steps=4", "train.freeze={towers.text.*: null}")
    assert frozen.returncode == 2 and "learn in one of the two" in " ".join(frozen.stderr.split())


def test_rates_and_decays_are_those_of_the_config(config_file, run):
    """Other groups than before, as the text tower has a rate now; one of nearly 0 leaves the weights where they are."""
    options = ["train.steps=3", "train.schedule=constant", *NO_EVALUATION]
    options += ["train.lr=1e-12", "train.weight_decay=0", "train.tower_lr.text=1e-11"]
    assert train(config_file, "--resume", *options).returncode == 0
    before, after = (load_file(run / "checkpoints" / f"step-0000000{step}" / checkpoint.WEIGHTS) for step in (2, 3))
    for name, weights in before.items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(after[name], weights, rtol=1e-6, atol=1e-8)
    state = checkpoint.load_state(run / "checkpoints" / "step-00000003")["optimizer"]["state"]
    assert {float(one["step"]) for one in state.values()} == {3.0}  # its memory is that of before


def test_changed_options_are_told_and_those_of_an_optimizer_count(config_file, tmp_path):
    options = [*NO_EVALUATION, "train.schedule=constant"]
    first = train(config_file, *options, "train.steps=2", "train.optimizer={type: sgd, momentum: 0.9}")
    assert first.returncode == 0, first.stderr
    changes = ["train.optimizer={type: sgd, momentum: 0.1}", "objective=dcl", "train.steps=3"]
    done = train(config_file, *options, *changes, "--resume")
    text = " ".join(done.stderr.split())
    assert done.returncode == 0 and "resumed with other options: " in text, text
    assert "objective was infonce, is dcl" in text and "train.optimizer.momentum was 0.9, is 0.1" in text
    assert "train.steps" not in text
    for step, momentum in ((2, 0.9), (3, 0.1)):
        state = checkpoint.load_state(tmp_path / "runs/small/checkpoints" / f"step-{step:08d}")
        assert {group["momentum"] for group in state["optimizer"]["groups"]} == {momentum}
    same = train(config_file, *options, *changes[:2], "train.steps=4", "--resume")
    assert same.returncode == 0 and "resumed with other options" not in same.stderr


def test_what_an_objective_or_a_score_remembers_is_not_exchanged(config_file, tmp_path):
    options = [*NO_EVALUATION, "train.steps=2"]
    assert train(config_file, *options, "objective=global", "score={type: lorentz, curvature: 1.0}").returncode == 0
    for changes, message in (
        (["objective=infonce", "score={type: lorentz, curvature: 1.0}"], "with another objective: global and infonce remember"),
        (["objective=global", "score={type: lorentz, curvature: 0.2}"], "cannot resume .* with score="),
    ):
        done = train(config_file, *NO_EVALUATION, "train.steps=3", *changes, "--resume")
        assert done.returncode == 2 and re.search(message, " ".join(done.stderr.split())), done.stderr


def test_a_checkpoint_stays_the_model_that_it_was_when_options_change(config_file, tmp_path):
    """An option that changes what a model computes and not the shapes of its weights: the mean of its pictures."""
    done = train(config_file, "train.steps=2", *NO_EVALUATION)
    assert done.returncode == 0, done.stderr
    run, picture = tmp_path / "runs" / "small", np.random.randint(0, 255, (24, 24, 3), dtype=np.uint8)  # noqa: NPY002
    before = load(run, checkpoint=2, device="cpu").embed(images=[picture])
    change = "fields.image.modality.mean=[0.1]"
    done = train(config_file, "train.steps=3", *NO_EVALUATION, change, "--resume")
    assert done.returncode == 0 and "fields.image.modality.mean was" in " ".join(done.stderr.split()), done.stderr
    assert torch.equal(load(run, checkpoint=2, device="cpu").embed(images=[picture]), before)
    assert not torch.equal(load(run, device="cpu").embed(images=[picture]), before)


@pytest.mark.parametrize(
    "optimizer", ["lamb", *(pytest.param(o, marks=pytest.mark.slow) for o in ("adafactor", "lion", "nadamw"))]
)
def test_optimizers_of_timm_go_on_bitwise(config_file, tmp_path, optimizer):
    options = [*NO_EVALUATION, f"train.optimizer={optimizer}", "train.lr=1e-4", "train.schedule=constant"]
    assert train(config_file, *options, "train.steps=4", "run.name=whole").returncode == 0
    for steps, resume in ((2, []), (4, ["--resume"])):
        done = train(config_file, *options, f"train.steps={steps}", *resume)
        assert done.returncode == 0, done.stderr
    ends = [load_file(tmp_path / "runs" / n / "checkpoints" / "step-00000004" / checkpoint.WEIGHTS) for n in ("whole", "small")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_an_evaluation_that_was_missed_is_made_up(config_file, tmp_path):
    assert train(config_file, "train.steps=4", "train.evaluate_every=2").returncode == 0
    run = tmp_path / "runs" / "small"
    first, last = (run / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in (first, last)] == [2, 4]
    (run / "evaluations.jsonl").write_text(first + "\n")  # killed while it was evaluated
    (run / "checkpoints" / "best.json").unlink()
    (run / "checkpoints" / ".step-00000003.partial").mkdir()
    assert train(config_file, "--resume", "train.steps=4", "train.evaluate_every=2").returncode == 0
    assert (run / "evaluations.jsonl").read_text().splitlines() == [first, last]
    key = next(name for name in json.loads(first) if "/mean_recall_at_" in name)
    best = max(map(json.loads, (first, last)), key=lambda results: results[key])  # which of the two is the processor's to say
    assert checkpoint.find(run / "checkpoints", "best").name == f"step-{best['step']:08d}"
    assert not list((run / "checkpoints").glob(".step-*"))


def test_without_its_checksums_a_checkpoint_is_refused_and_nan_is_never_the_best(tmp_path):
    values: dict[int, float] = {}
    with Saver(tmp_path, 9, 0, beside=True) as saver:
        for step, value in ((1, 0.2), (2, math.nan), (3, 0.1)):
            saver.save(step, Contents({"w": torch.ones(1)}, {}, {}, ""))
            values[step] = value
            saver.mark_best(values)
    assert checkpoint.find(tmp_path, "best").name == "step-00000001"
    for text in ("{", None):
        manifest = tmp_path / "step-00000003" / checkpoint.MANIFEST
        manifest.write_text(text) if text else manifest.unlink()
        with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
            checkpoint.check(tmp_path / "step-00000003")


def test_what_lies_beside_checkpoints_is_none(tmp_path):
    with Saver(tmp_path, 1, 5, beside=False) as saver:
        for step in (1, 2):
            saver.save(step, Contents({"w": torch.ones(1)}, {}, {}, ""))
        saver.mark_best({2: 0.5})
        shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000002-backup")
        (tmp_path / "step-00000009.tar").touch()
        saver.save(3, Contents({"w": torch.ones(1)}, {}, {}, ""))
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000002", "step-00000003"]
    assert checkpoint.find(tmp_path, "last").name == "step-00000003" == checkpoint.find(tmp_path, 3).name
    shutil.rmtree(tmp_path / "step-00000002")
    for best in ((tmp_path / checkpoint.BEST).read_text(), "", "{}"):  # of a checkpoint that is gone; torn
        (tmp_path / checkpoint.BEST).write_text(best)
        with pytest.raises(UserError, match="no checkpoint 'best' in .*; there are steps: 3"):
            checkpoint.find(tmp_path, "best")
    with pytest.raises(UserError, match="no checkpoint '²'"):
        checkpoint.find(tmp_path, "²")


def test_a_full_disk_at_a_line_of_the_log_is_one_line(tmp_path):
    lines = StepLines(tmp_path / "metrics.jsonl", 0)
    lines.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match="/dev/full cannot be written to .No space left on device.: make room"):
        lines.add({"step": 1})


def test_a_memory_that_ranks_divide_goes_on_on_other_numbers_of_them(config_file, tmp_path):
    """Two ranks, then four, then one: the estimates and temperatures of one process. A checkpoint has each sample once."""

    def memory_of(name):
        last = checkpoint.find(tmp_path / "runs" / name / "checkpoints", "last")
        objective = GlobalContrastive(temperature="individual")
        load_objective(objective, checkpoint.load_state(last)["objective"], last / checkpoint.SHARDS)
        return last, objective.table.get_extra_state()

    convnext = "{type: timm, model: test_convnext, in_chans: 1, depths: [1, 1, 1, 1], dims: [8, 8, 16, 16]}"  # no batch norms
    change = [f"towers.image={convnext}", f"towers.audio={convnext}", "train.lr=1e-4", "data.lanes=4", *NO_EVALUATION]
    change += ["fields.image.modality.size=48", "fields.audio.modality.mels=32", "fields.audio.modality.hop=200"]
    change += [
        "objective={type: global, temperature: individual, gamma: 0.5}",
        "train.checkpoint_every=2",
        "train.keep_checkpoints=3",
    ]
    assert train(config_file, *change, "run.name=whole").returncode == 0
    for ranks, steps in ((2, 2), (4, 4), (1, 6)):
        resume = ["--resume"] if steps > 2 else []
        done = train(config_file, *change, "run.name=divided", *resume, ranks=ranks)
        assert done.returncode == 0, done.stderr
        for later in (tmp_path / "runs" / "divided" / "checkpoints").glob("step-*"):
            if later.name > f"step-{steps:08d}":
                shutil.rmtree(later)
        last, memory = memory_of("divided")
        in_state = len(checkpoint.load_state(last)["objective"]["table._extra_state"]["ids"])
        assert (in_state, (last / checkpoint.SHARDS).exists()) == ((0, True) if ranks > 1 else (96, False))
        assert len(memory["ids"]) == len(memory["ids"].unique()) == 16 * steps
    _, whole = memory_of("whole")
    assert memory["columns"] == whole["columns"] and torch.equal(memory["ids"], whole["ids"])
    torch.testing.assert_close(memory["values"], whole["values"], rtol=1e-3, atol=1e-3, equal_nan=True)
