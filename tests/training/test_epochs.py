"""Runs of epochs: how many steps they are, when they are evaluated, when they end early, and what the page says of before."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmcontrast.config import load_config
from mmcontrast.data import ClusterOrder, MixtureOrder, NeighbourOrder, SampleOrder, StreamOrder
from mmcontrast.data.neighbours import Neighbours
from mmcontrast.doctor.run import checkpoints, length_of
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.plan import plan_run
from mmcontrast.run_folder import CONFIG
from mmcontrast.slurm import check_run
from mmcontrast.training import checkpoint
from mmcontrast.training.epochs import in_steps
from mmcontrast.training.evaluations import Evaluations
from mmcontrast.training.options import TrainOptions
from tests.command import NO_EVALUATION, train
from tests.results import results_of


def order(size: int, batch_size: int = 10, lanes: int = 2) -> SampleOrder:
    return SampleOrder((size - 7, 7), batch_size, 0, lanes, 8, 32)


@pytest.mark.parametrize(
    ("epochs", "size", "steps"),
    [(3, 100, 30), (0.5, 100, 5), (0.25, 100, 3), (1.04, 100, 10), (1e-6, 100, 1), (2, 109, 20), (2.5, 99, 23)],
)
def test_epochs_are_rounded_to_steps_of_whole_batches(epochs, size, steps):
    """99 samples are 9 batches of 10 and some: 2.5 · 9 is 22.5, and a half is rounded up."""
    options = in_steps(TrainOptions(epochs=epochs, batch_size=10), order(size))
    assert (options.total_steps, options.epochs) == (steps, epochs)
    assert options.evaluate_every == options.checkpoint_every == size // 10
    assert in_steps(TrainOptions(epochs=epochs, batch_size=10, evaluate_every=0), order(size)).evaluate_every == 0


def test_every_sample_is_seen_once_an_epoch_whatever_the_order_is():
    sources = (order(60), order(40))
    for made, at_least in (
        (order(100), 100),
        (ClusterOrder(10, 0, 2, "", "", torch.arange(100).numpy() % 7), 100),
        (NeighbourOrder(10, 0, 2, "", "", 9, 4, 0.5, Neighbours.none(100)), 100),
        (MixtureOrder(sources, (0.6, 0.4)), 75),  # its shares hold over thousands of samples: of so few some come twice
    ):
        steps = in_steps(TrainOptions(epochs=1, batch_size=10), made).total_steps
        seen = [place for step in range(steps) for _, place in made.places(step)]
        assert steps == 10 and len(set(seen)) >= at_least
    for none, why in (
        (StreamOrder(10, 0), "data.sequential draws shards with replacement"),
        (MixtureOrder(sources, (0.5, 0.5)), "sources of data.train have weights"),
    ):
        for given, place in (({"epochs": 2}, "train.epochs=2"), ({"steps": 9, "evaluate_every": None}, "evaluate_every=null")):
            with pytest.raises(UserError, match=f"{place}.*{why}.*set"):
                in_steps(TrainOptions(batch_size=10, **given), none)
        assert in_steps(TrainOptions(steps=9, batch_size=10), none).total_steps == 9


def test_one_of_steps_and_epochs_is_given_and_an_override_takes_the_place_of_the_other(config_file):
    def train_of(*overrides):
        options = load_config(config_file, overrides).train
        return options.steps, options.epochs, options.evaluate_every, options.checkpoint_every

    assert train_of() == (6, None, 0, 2)
    assert train_of("train.epochs=3") == (None, 3.0, None, 2) == train_of("train.epochs=3", "train.steps=null")
    assert train_of("train.epochs=3", "train.evaluate_every=0") == (None, 3.0, 0, 2)
    saved = load_config(config_file, ["train.epochs=1.5"]).to_yaml()
    config_file.write_text(saved)
    assert train_of() == (None, 1.5, None, 2)
    assert train_of("train.steps=4") == (4, None, None, 2)
    assert train_of("train.steps=null", "train.epochs=2") == (None, 2.0, None, 2)
    for overrides, message in (
        (["train.epochs=null"], "train: neither steps nor epochs is given: set one of them, as steps: 1000 or epochs: 5$"),
        (["train.epochs=2", "train.steps=4"], "train: both steps=4 and epochs=2 are given"),
        (["train.epochs=0"], "train.epochs.*greater than 0"),
        (["train.epochs=.inf"], "train.epochs.*finite"),
        (["train.patience=2", "train.evaluate_every=0"], "train: patience=2 counts evaluations"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(config_file, overrides)


def test_what_works_without_data_works_with_epochs(config_file):
    config = load_config(config_file, ["train.epochs=2.5", "train.keep_every=2"])
    assert length_of(config) == "2.5 epochs" and "its epochs" in checkpoints(config).found
    assert plan_run(config, available=2**36).fits


def test_every_so_many_steps_a_checkpoint_is_saved_and_kept(config_file, tmp_path):
    options = ["train.steps=5", "train.keep_every=2", "train.checkpoint_every=0", "train.keep_checkpoints=1"]
    assert train(config_file, *options, "evaluation.splits={}", "evaluation.zero_shot={}").returncode == 0
    kept = checkpoint.complete(tmp_path / "runs" / "small" / "checkpoints")
    assert [path.name[-1] for path in kept] == ["2", "4", "5"]


def test_a_run_of_epochs_is_evaluated_after_each_and_goes_on_for_more(config_file, tmp_path):
    """96 samples, 16 a step: 6 steps an epoch."""
    short = ["train.schedule=constant", "evaluation.zero_shot={}", "evaluation.geometry=false", "train.keep_checkpoints=9"]
    first = train(config_file, "train.epochs=1", "train.checkpoint_every=null", *short)
    assert first.returncode == 0 and "step 6/6" in first.stderr, first.stderr
    run = tmp_path / "runs" / "small"
    assert load_config(run / CONFIG).train.epochs == 1
    with pytest.raises(UserError, match="is complete, at step 6: raise train.epochs"):
        check_run(load_config(run / CONFIG), resume=False)
    more = train(run / CONFIG, "--resume", "train.epochs=1.5")
    assert more.returncode == 0 and "step 9/9" in more.stderr, more.stderr
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 9]
    assert [path.name[-1] for path in checkpoint.complete(run / "checkpoints")] == ["6", "9"]
    whole = train(config_file, "train.epochs=1.5", "train.checkpoint_every=null", *short, "run.name=whole")
    assert whole.returncode == 0, whole.stderr
    ends = [load_file(tmp_path / "runs" / n / "checkpoints" / "step-00000009" / checkpoint.WEIGHTS) for n in ("small", "whole")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    refused = train(run / CONFIG, "--resume", "train.epochs=1")
    assert refused.returncode == 2 and "already has 9 steps, more than the 6 of train.epochs=1" in " ".join(
        refused.stderr.split()
    )


COUNT = "val/retrieval/image_to_text/num_queries"


class Watched(Evaluations):
    """The decision alone, over results that are given."""

    def __init__(self, values: list[float], patience: int | None, best: str | None = "val/recall") -> None:
        self.history = {step: {best or "a/mean_recall_at_1": value} for step, value in enumerate(values)}
        options = TrainOptions(steps=99, batch_size=2, patience=patience, evaluate_every=1)
        evaluation = type("Options", (), {"best": best})()
        self.job = type("Job", (), {"options": options, "evaluation": evaluation, "folder": Path("run")})()


@pytest.mark.parametrize(
    ("values", "stale", "best"),
    [
        ([], 0, None),
        ([0.1], 0, 0),
        ([0.1, 0.1], 1, 0),  # a tie is no improvement
        ([0.3, 0.1, 0.2], 2, 0),
        ([0.3, 0.1, 0.4, math.nan], 1, 2),
        ([math.nan, math.nan], 2, None),
        ([math.nan, 0.0], 0, 1),
        ([-0.2, -0.1, -0.3, -0.4, -0.1], 3, 1),
    ],
)
def test_patience_counts_evaluations_since_the_best(values, stale, best):
    for patience in (1, 2, 3, None):
        watched = Watched(values, patience)
        assert (watched._stale(), watched._best()) == (stale, best)
        assert watched._is_exhausted() == (patience is not None and stale >= patience)
    assert Watched([3.0, 2.0, 4.0], 1, best="val/image_to_text/median_rank")._best() == 1  # lower is better


def test_a_run_whose_results_do_not_improve_ends_early_and_the_page_says_what_changed(config_file, tmp_path):
    """The number of queries never improves. Two ranks begin, one goes on."""
    options = ["train.epochs=9", "train.evaluate_every=2", "train.patience=2", "train.evaluate_first=true"]
    options += ["evaluation.geometry=false", "train.schedule=constant", f"evaluation.best={COUNT}"]
    done = train(config_file, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()]

    assert steps() == [0, 2, 4]
    results = json.loads((run / "results.json").read_text())
    assert results["training"]["stopped_early"] and (results["training"]["step"], results["training"]["steps"]) == (4, 54)
    assert results["training"]["best"]["step"] == 0
    note = " ".join(results["notes"])
    assert f"stopped early, after 4 of 54 steps: 2 evaluations in turn have not improved {COUNT}" in note
    page = (run / "report.html").read_text()
    assert "stopped early, after 4 of 54" in page and "Results by step" in page and "val: before</th>" in page
    assert len(re.findall("right now, wrong before: [0-9]+ of 24<", page)) == 6
    assert checkpoint.find(run / "checkpoints", "best").name == "step-00000002"
    assert results_of(run)["val/retrieval/image_to_text/num_queries"] == 24
    assert "low" in results["results"]["val/retrieval/image_to_text/recall_at_1"]  # with intervals, as at any end
    table = EmbeddingTable.read(run / "before")
    assert len(table) == 24 and set(table.fields) == {"image", "text", "audio"}

    again = train(run / CONFIG, "--resume")
    assert again.returncode == 0 and "small is complete: train.patience is at its end" in again.stderr, again.stderr
    lines = (run / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (run / "evaluations.jsonl").write_text("".join(lines[:-1]))  # killed while it was evaluated
    (run / "results.json").unlink()
    again = train(run / CONFIG, "--resume")
    assert again.returncode == 0 and (run / "results.json").exists() and steps() == [0, 2, 4], again.stderr
    assert json.loads((run / "results.json").read_text())["training"] == results["training"]

    more = train(run / CONFIG, "--resume", "train.patience=3")
    assert more.returncode == 0 and steps() == [0, 2, 4, 6], more.stderr


def test_the_last_word_is_not_patience_where_results_improve(config_file, tmp_path):
    done = train(config_file, "train.evaluate_every=2", "train.patience=1", "evaluation.best=val/none")
    assert done.returncode == 2 and "evaluation.best='val/none' is no result" in " ".join(done.stderr.split())
    done = train(config_file, *NO_EVALUATION, "train.evaluate_every=2", "train.patience=1", "run.name=nothing")
    assert done.returncode == 2 and "train.patience: nothing is evaluated" in " ".join(done.stderr.split())
    assert not (tmp_path / "runs" / "nothing").exists()
