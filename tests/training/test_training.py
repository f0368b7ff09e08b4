"""The loop on real shards: a run's folder, exact resume after SIGKILL, refusals, and a loss that is not finite."""

import json
import shutil
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data_pipelines.glyphs.glyphs import Glyphs
from mmcontrast.config import load_config
from mmcontrast.data import write_shard
from mmcontrast.embedding_job import embed_shards
from mmcontrast.errors import TrainingStopped, UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.run_folder import lock_folder
from mmcontrast.runs import make_run_context, open_run
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from mmcontrast.training.cost import flops_per_sample, peak_samples
from mmcontrast.training.log import StepLog
from mmcontrast.training.optim import make_optimizer
from mmcontrast.training.saver import Saver
from tests.command import NO_EVALUATION, mmcontrast, start, train
from tests.results import results_of


def test_a_run_from_empty_folder_to_page(config_file, tmp_path):
    done = train(config_file, "train.evaluate_every=3", real=True)
    assert done.returncode == 0, done.stderr
    assert "step 6/6  loss" in done.stderr and "recall_at_1" in done.stderr and "report.html" in done.stderr
    run = tmp_path / "runs" / "small"

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {"step", "samples_seen", "loss", "lr", "logit_scale", "samples_per_second", "data_seconds", "peak_memory_bytes"}
    assert all(wanted <= line.keys() for line in lines)
    assert lines[-1]["samples_seen"] == 96

    results = results_of(run)
    for a, b in (("image", "text"), ("audio", "text"), ("text", "image"), ("image", "audio")):
        for metric in ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "num_queries", "num_candidates"):
            assert f"val/retrieval/{a}_to_{b}/{metric}" in results
    assert results["val/retrieval/image_to_text/num_candidates"] == 24
    assert 0 <= results["val/zero_shot/script/top1"] <= 1
    evaluations = (run / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [3, 6]

    page = (run / "report.html").read_text()
    assert page.count("<audio") >= 6 and page.count("<img") >= 6 and "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="data:' in page
    assert list((run / "tensorboard").iterdir())
    kept = [path.name for path in checkpoint.complete(run / "checkpoints")]
    assert "step-00000006" in kept and len(kept) <= 3
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 6

    refused = train(config_file)
    assert refused.returncode == 2 and "--resume" in refused.stderr and "--overwrite" in refused.stderr
    written = (run / "results.json").stat().st_mtime_ns
    assert train(config_file, "--resume").returncode == 0  # complete: nothing is done
    assert (run / "results.json").stat().st_mtime_ns == written
    results = results_of(run)
    (run / "results.json").unlink()
    (run / "evaluations.jsonl").unlink()
    complete = train(config_file, "--resume")  # ended in its last evaluation
    assert complete.returncode == 0 and results_of(run) == results, complete.stderr
    fewer = train(config_file, "--resume", "train.steps=5")
    assert fewer.returncode == 2 and "already has 6 steps" in " ".join(fewer.stderr.split())
    longer = train(config_file, "--resume", "train.steps=8")
    assert longer.returncode == 0, longer.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 8

    before = results_of(run)
    assert mmcontrast("evaluate", run).returncode == 0
    assert results_of(run) == pytest.approx(before, abs=1e-5, nan_ok=True)


def test_a_killed_run_resumes_as_if_it_had_never_stopped(config_file, tmp_path):
    """SIGKILL after the second checkpoint; the weights and losses at the end are those of a run left alone, bitwise."""
    change = ["train.steps=12", "towers.text.config.hidden_dropout_prob=0.1", "data.num_workers=1", *NO_EVALUATION]
    change.append("train.keep_checkpoints=9")  # the fourth step's does not go while it is waited for
    whole = train(config_file, *change, "run.name=whole")
    assert whole.returncode == 0, whole.stderr

    process = start("train", config_file, *change, "run.name=killed")
    killed = tmp_path / "runs" / "killed"
    try:
        deadline = time.monotonic() + 300
        while not (killed / "checkpoints" / "step-00000004").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()

    resumed = train(config_file, *change, "run.name=killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    runs = [tmp_path / "runs" / name for name in ("whole", "killed")]
    losses = [[json.loads(line)["loss"] for line in (r / "metrics.jsonl").read_text().splitlines()] for r in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    weights = [load_file(checkpoint.find(run / "checkpoints", "last") / checkpoint.WEIGHTS) for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_an_objective_and_a_queue_remember_goes_through_a_checkpoint(config_file, tmp_path):
    """Individual temperatures, a queue, caching, accumulation, dropout: resumed from step 4, bitwise the run left alone."""
    objective = "objective={type: global, temperature: individual, gamma: 0.5}"
    change = [objective, "train.queue_size=40", "train.micro_batch_size=3", "train.accumulation_steps=2"]
    change += ["towers.text.config.hidden_dropout_prob=0.1", *NO_EVALUATION]
    whole = train(config_file, *change)
    assert whole.returncode == 0, whole.stderr
    assert "warning: train.micro_batch_size=3: batch norms (towers.audio." in " ".join(whole.stderr.split())
    run = tmp_path / "runs" / "small"
    last = run / "checkpoints" / "step-00000006"
    weights, lines = load_file(last / checkpoint.WEIGHTS), (run / "metrics.jsonl").read_text().splitlines()
    state, queue = checkpoint.load_state(last), load_file(last / checkpoint.QUEUE)
    shutil.rmtree(last)
    resumed = train(config_file, *change, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    again = load_file(last / checkpoint.WEIGHTS)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    losses = [[json.loads(line)["loss"] for line in text] for text in (lines, (run / "metrics.jsonl").read_text().splitlines())]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    memory = state["objective"]["table._extra_state"]
    assert len(memory["ids"]) == 96 and "image_to_text/tau" in memory["columns"]
    assert int(queue["text_pushed"]) == 96 and queue["text_rows"].shape == (40, 16)
    quantiles = [json.loads(lines[-1])[f"signals/image_to_text/temperature_p{p}"] for p in ("05", "50", "95")]
    assert quantiles == sorted(quantiles)


def test_a_field_of_mined_negatives(config_file, corpus, tmp_path):
    """`key.neg.txt`, a caption that does not fit, in every other sample: read by the text tower, and by nobody's evaluation."""
    items = [item for item in Glyphs().splits()["val"] if item[0].script == "Greek"][:16]
    samples = [Glyphs(side=24).make_sample("train", item) for item in items]
    for number in range(0, 16, 2):
        samples[number]["neg.txt"] = samples[number - 1]["txt"]
    write_shard(tmp_path / "mined-00000.tar", samples)
    mined = "fields.mined={modality: {type: text, context_length: 24}, tower: text, keys: [neg.txt], negative_of: text}"
    options = [mined, f"data.train={tmp_path}/mined-00000.tar", "train.steps=2"]
    done = train(config_file, *options)
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "runs" / "small")
    assert not any("mined" in name for name in results) and "val/retrieval/image_to_text/recall_at_1" in results
    first = json.loads((tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()[0])
    assert not any("mined" in name for name in first)
    assert train(config_file, *options[1:], "run.name=plain", *NO_EVALUATION).returncode == 0
    plain = json.loads((tmp_path / "runs" / "plain" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > plain["loss"] + 0.01  # more candidates
    refused = train(config_file, mined.replace("of: text", "of: sound"), "run.name=other")
    assert refused.returncode == 2 and "fields.mined.negative_of: no field 'sound' that is contrasted" in refused.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["pairing=multilinear", "train.queue_size=8"], "train.queue_size: a product needs a partner in every other field"),
        (["pairing=multilinear", "model.scale_per_pair=true"], "model.scale_per_pair: the pairing scores more than two"),
        (["pairing=multilinear", "objective=multi_positive"], "MultiPositive averages over all positives"),
        (["objective=global", "objective.gamma=2"], "gamma is 2, it must be in"),
    ],
)
def test_what_cannot_be_trained_together_is_refused_first(config_file, change, message):
    with pytest.raises(UserError, match=message):
        make_run_context(load_config(config_file, change))


def test_a_batch_that_cannot_be_cut_is_refused(config_file):
    done = train(config_file, "train.accumulation_steps=3")
    assert done.returncode == 2 and "train.batch_size=16 on 1 processes cannot be cut into" in done.stderr


def test_resuming_with_another_order_of_the_data_is_refused(config_file):
    assert train(config_file, *NO_EVALUATION, "train.steps=2").returncode == 0
    done = train(config_file, *NO_EVALUATION, "--resume", "train.seed=9")
    assert done.returncode == 2 and "seed=0, now 9" in done.stderr


def test_init_from_a_run_starts_at_its_weights(config_file, tmp_path):
    assert train(config_file, *NO_EVALUATION, "train.steps=2").returncode == 0
    first = load_file(checkpoint.find(tmp_path / "runs/small/checkpoints", "last") / checkpoint.WEIGHTS)
    done = train(
        config_file,
        "run.name=warm",
        f"train.init_from={tmp_path}/runs/small",
        "train.steps=1",
        "train.lr=1e-12",
        *NO_EVALUATION,
    )
    assert done.returncode == 0, done.stderr
    second = load_file(checkpoint.find(tmp_path / "runs/warm/checkpoints", "last") / checkpoint.WEIGHTS)
    name = "projections.image.weight"
    torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-8)
    refused = train(config_file, "run.name=other", f"train.init_from={tmp_path}/runs/small", "model.embed_dim=8")
    assert refused.returncode == 2 and "projections.audio.weight is [16, " in refused.stderr


def test_a_loss_that_is_not_finite_stops_before_the_update(config_file, tmp_path):
    done = train(config_file, "train.lr=1e30", "train.clip_grad_norm=null", "train.warmup_steps=0", "train.checkpoint_every=1")
    assert done.returncode == 3
    assert "stopped before the update" in done.stderr and "Traceback" not in done.stderr
    saved = checkpoint.find(tmp_path / "runs/small/checkpoints", "last")
    assert int(saved.name.removeprefix("step-")) >= 1  # what was good is kept
    assert issubclass(TrainingStopped, UserError)


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    weights, state = {"w": torch.ones(3)}, {"step": 1}
    checkpoint.save(tmp_path, 1, Contents(weights, {}, state, "a: 1"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match="No space left on device.*earlier ones are untouched"):
        checkpoint.save(tmp_path, 2, Contents(weights, {}, state, "a: 1"))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load_state(checkpoint.find(tmp_path, "last")) == state


def test_checkpoints_beside_the_training(tmp_path, monkeypatch):
    """A checkpoint holds what there was when it was asked for; a failure comes with the next; best and every fourth stay."""
    weights, state = {"w": torch.zeros(1000)}, {"step": 0, "optimizer": {"state": [torch.zeros(3), (1, 2)]}}
    with Saver(tmp_path, 1, 4, beside=True) as saver:
        for step in range(1, 8):
            saver.save(step, Contents(weights, {}, state, "a: 1"))
            weights["w"] += 1
            state["optimizer"]["state"][0].add_(1)
            if step == 3:
                saver.mark_best({step: 0.9})
    kept = checkpoint.complete(tmp_path)
    assert [path.name for path in kept] == ["step-00000003", "step-00000004", "step-00000007"]
    for path in kept:
        before = int(path.name[-8:]) - 1
        assert (checkpoint.load_weights(path)["w"] == before).all()
        assert checkpoint.load_state(path)["optimizer"]["state"][0].tolist() == [before] * 3

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with Saver(tmp_path, 9, 0, beside=True) as saver:
        saver.save(8, Contents(weights, {}, state, "a: 1"))
        with pytest.raises(UserError, match="step 8 could not be written"):
            saver.save(9, Contents(weights, {}, state, "a: 1"))
    assert checkpoint.complete(tmp_path) == kept


def test_a_damaged_checkpoint_is_refused(config_file, tmp_path):
    assert train(config_file, *NO_EVALUATION).returncode == 0
    last = checkpoint.find(tmp_path / "runs" / "small" / "checkpoints", "last")
    checkpoint.check(last)
    with (last / checkpoint.WEIGHTS).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"x")
    refused = train(config_file, "train.steps=8", "--resume")
    assert refused.returncode == 2 and "model.safetensors is damaged" in " ".join(refused.stderr.split())
    with pytest.raises(UserError, match="remove this checkpoint, and the one before it is the last"):
        open_run(tmp_path / "runs" / "small")
    (last / checkpoint.STATE).unlink()
    (last / checkpoint.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        checkpoint.check(last)


def test_the_last_and_the_best_are_kept(tmp_path):
    values = {}
    for step, value in enumerate([0.1, 0.9, 0.3, 0.9], start=1):
        checkpoint.save(tmp_path, step, Contents({"w": torch.ones(1)}, {}, {}, ""))
        values[step] = value
        checkpoint.mark_best(tmp_path, values)
        checkpoint.prune(tmp_path, 1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000002", "step-00000004"]
    assert checkpoint.find(tmp_path, "best").name == "step-00000002"
    with pytest.raises(UserError, match="no checkpoint '3'.*steps: 2, 4"):
        checkpoint.find(tmp_path, "3")
    checkpoint.mark_best(tmp_path, {1: 9.0, 2: 0.1, 4: 0.2})  # by another result; step 1 has no checkpoint any more
    assert checkpoint.find(tmp_path, "best").name == "step-00000004"


def test_a_trained_run_opens_and_embeds(config_file, corpus, tmp_path):
    assert train(config_file, *NO_EVALUATION, "train.steps=2").returncode == 0
    assert embed_shards(tmp_path / "runs/small", str(corpus / "val-*.tar"), tmp_path / "table", device="cpu", batch_size=10)
    table = EmbeddingTable.read(tmp_path / "table")
    assert len(table) == 24 and table.fields["image"].shape == (24, 16)
    torch.testing.assert_close(table.fields["text"].norm(dim=1), torch.ones(24))
    with pytest.raises(UserError, match="holds slices of another table"):
        embed_shards(tmp_path / "runs/small", str(corpus / "train-*.tar"), tmp_path / "table", device="cpu")
    with pytest.raises(UserError, match="not a run's folder"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluation.zero_shot.script.field=picture", "zero_shot.script: the model has no field 'picture'; it has audio"),
        ("evaluation.zero_shot.script.prompt_field=audio", "zero_shot.script: prompt_field 'audio' is not text"),
    ],
)
def test_a_zero_shot_task_that_cannot_work_is_refused_before_training(config_file, change, message):
    with pytest.raises(UserError, match=message):
        make_run_context(load_config(config_file, [change]))


def test_time_of_evaluation_is_not_in_the_rates(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 70.0, 70.0, 70.0])  # made; a pause begins, ends; a line is written
    monkeypatch.setattr("mmcontrast.training.log.time.perf_counter", lambda: next(clock))
    log = StepLog(tmp_path / "metrics.jsonl", 0, devices=2, peak_samples=20.0)
    log.samples = 100
    with log.paused():
        pass
    line = log.write({"step": 1, "loss": 1.0, "logit_scale": 2.0, "grad_norm": 0.5}, torch.device("cpu"))
    assert (line["samples_per_second"], line["samples_per_second_per_device"], line["mfu"]) == (10, 5, 0.25)
    assert "10 samples/s (5 a device)  mfu 25%" in log.note(line)


def test_the_most_that_a_device_could_do(config_file, monkeypatch):
    """The peak of a GPU is its data sheet's; the name is all that is asked of it."""
    model = make_run_context(load_config(config_file)).model
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    most = peak_samples(model, "bf16", torch.device("cuda"))
    assert most == pytest.approx(989.4e12 / flops_per_sample(model))
    assert (
        peak_samples(model, "fp32", torch.device("cuda")) is None and peak_samples(model, "bf16", torch.device("cpu")) is None
    )


def test_groups_of_the_optimizer(config_file):
    job = make_run_context(load_config(config_file, ["train.lr=1e-2", "train.tower_lr.text=1e-3", "train.weight_decay=0.2"]))
    optimizer = make_optimizer(job.model, job.options)
    found = {id(p): (group["peak_lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(job.model.parameters()))
    for name, parameter in job.model.named_parameters():
        lr = 1e-3 if ".text." in name else 1e-2
        decays = parameter.dim() > 1 and "position" not in name
        assert found[id(parameter)] == (lr, 0.2 if decays else 0.0), name
    with pytest.raises(UserError, match="no tower 'texts'; there is"):
        make_optimizer(job.model, job.options.model_copy(update={"tower_lr": {"texts": 1e-3}}))


def test_objectives_by_import_path(config_file, tmp_path, monkeypatch):
    (tmp_path / "my_lab.py").write_text(
        "from mmcontrast.objectives import InfoNCE\n"
        "class Scaled(InfoNCE):\n"
        "    def __init__(self, factor):\n"
        "        super().__init__()\n"
        "        self.factor = factor\n"
        "    def forward(self, d):\n"
        "        return self.factor * super().forward(d)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    job = make_run_context(load_config(config_file, ["objective={type: 'my_lab:Scaled', factor: 2.0}"]))
    assert type(job.objective).__name__ == "Scaled" and job.objective.factor == 2.0


def test_signals_and_a_scale_for_every_pair(config_file):
    overrides = ["model.scale_per_pair=true", "train.steps=6", "pairing.weights={image-text: 2.0}", "train.log_every=6"]
    done = train(config_file, *overrides)
    assert done.returncode == 0, done.stderr
    folder = load_config(config_file).folder
    (line,) = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    scales = [line[f"logit_scale/{pair}"] for pair in ("image-text", "audio-image", "audio-text")]
    assert len(set(scales)) == 3 and line["logit_scale"] == pytest.approx(sum(scales) / 3)
    losses = [line[f"signals/{pair}/loss"] for pair in ("image-text", "audio-image", "audio-text")]
    assert line["loss"] == pytest.approx((2 * losses[0] + losses[1] + losses[2]) / 4, rel=1e-5)
    for direction in ("image_to_text", "audio_to_image"):
        assert 0 <= line[f"signals/{direction}/accuracy"] <= 1
        assert 1 <= line[f"signals/{direction}/effective_negatives"] <= 16
    assert "effective negatives" in (folder / "report.html").read_text()


def test_a_run_is_trained_by_one_process_at_a_time(config_file, tmp_path):
    config = load_config(config_file)
    with lock_folder(config):
        for options in ((), ("--overwrite",)):
            done = train(config_file, *options)
            assert done.returncode == 2 and "another process is training" in " ".join(done.stderr.split())
        assert not (tmp_path / "runs" / "small").exists()
    assert train(config_file, *NO_EVALUATION, "train.steps=1").returncode == 0
