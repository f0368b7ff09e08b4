"""Models that a run learns from: what they see, what the loss makes of it, what a checkpoint keeps, what is refused."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from mmcontrast import contrastive_loss, load
from mmcontrast.config import load_config
from mmcontrast.data import StoredEmbeddings, training_batches, write_shard
from mmcontrast.data.verify import verify_shards
from mmcontrast.data_commands import _sources
from mmcontrast.errors import UserError
from mmcontrast.runs import make_run_context
from mmcontrast.training.step import Learner
from tests.command import mmcontrast
from tests.models.open_clip_models import save
from tests.training.teaching import npy, run, write_config, write_vectors

DISTILLATION = {"type": "distillation", "alpha": 0.7}
GUIDED = {"type": "infonce", "guide": True, "false_negative_margin": 0.0}


def losses(job):
    return [json.loads(line)["loss"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


def weights(job, step=2):
    return load_file(job.folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def batches_of(job, steps):
    options = {"rank": 0, "world_size": 1, "num_workers": 0, "pin_memory": False}
    return list(training_batches(job.dataset, job.order, range(steps), **options))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_vectors(tmp_path_factory.mktemp("shards") / "a.tar")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, shards):
    """A run's folder."""
    options = {"seed": 9, "steps": 3, "lr": 0.1, "ema_decay": 0.5}
    return run(write_config(tmp_path_factory.mktemp("teacher"), shards, "teacher", train=options)).folder


def test_the_loss_of_a_step_is_that_of_the_teachers_embeddings(tmp_path, shards, teacher):
    """Two teachers, one with a scale of its own: as `load` opens them, without a trace in the model or its checkpoint."""
    given = [str(teacher), {"model": str(teacher), "checkpoint": "3", "scale": 30.0, "fields": {"a": "b", "b": "a"}}]
    path = write_config(tmp_path, shards, objective=DISTILLATION, train={"teacher": given})
    job = make_run_context(load_config(path))
    (batch, *_), model, opened = batches_of(job, 1), copy.deepcopy(job.model), load(teacher, device="cpu")
    rows = {field: opened.model.encode(field, batch.values[field]).detach() for field in "ab"}
    crossed = {field: opened.model.encode(own, batch.values[field]).detach() for field, own in (("a", "b"), ("b", "a"))}
    out = model(batch)
    want = contrastive_loss(
        out.fields,
        objective=DISTILLATION,
        logit_scale=out.logit_scale,
        ids=batch.ids,
        teacher=[rows, crossed],
        teacher_scale=[opened.model.log_logit_scale.exp().item(), 30.0],
    )
    job = run(path)
    assert losses(job)[0] == pytest.approx(want.item(), rel=1e-6)
    assert not any("teacher" in name for name in weights(job)) and weights(job).keys() == model.state_dict().keys()
    assert all(not p.requires_grad and p.grad is None for t in job.teachers for p in t.model.parameters())
    assert not any(t.model.training for t in job.teachers)
    assert torch.equal(job.teachers[0].model.log_logit_scale, opened.model.log_logit_scale)


@pytest.mark.parametrize("more", [{}, {"accumulation_steps": 2}, {"parallel": "fsdp", "ema_decay": 0.9}])
def test_gradient_caching_changes_nothing_and_asks_the_teacher_once(tmp_path, shards, teacher, more, monkeypatch):
    folders = []
    for name, micro in (("plain", None), ("cached", 3)):
        options = {"teacher": str(teacher), "micro_batch_size": micro, **more}
        path = write_config(tmp_path, shards, name, objective=DISTILLATION, train=options)
        job = make_run_context(load_config(path))
        seen = []
        hook = job.teachers[0].model.register_forward_hook(lambda _, given, __, seen=seen: seen.append(len(given[0])))
        monkeypatch.setattr("tests.training.teaching.make_run_context", lambda *_, job=job: job)
        folders.append(run(path))
        hook.remove()
        assert sum(seen) == 2 * 2 * 8, "two fields, two steps, eight samples: each once"
        assert max(seen) <= (micro or 8)
    # Adam divides a gradient by itself, so where one is near zero the second step shows what a CPU's rounding did.
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-5)
    for name, tensor in weights(folders[0]).items():
        torch.testing.assert_close(tensor, weights(folders[1])[name], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_goes_on_bitwise_with_the_same_teacher_alone(tmp_path, shards, teacher):
    def options(name, **more):
        return write_config(tmp_path, shards, name, objective=DISTILLATION, train={"teacher": str(teacher), **more})

    whole = run(options("whole", steps=4, schedule="constant"))
    run(options("parts", steps=2, schedule="constant"))
    parts = run(options("parts", steps=4, schedule="constant"), resume=True)
    assert all(torch.equal(tensor, weights(parts, 4)[name]) for name, tensor in weights(whole, 4).items())
    other = run(write_config(tmp_path, shards, "other", train={"seed": 5})).folder
    for change in (f"train.teacher={other}", "train.teacher=null"):
        without = ["objective=infonce"] if "null" in change else []
        with pytest.raises(UserError, match=r"its teacher was .*teacher .*, is .*: give train.teacher what it had"):
            run(options("parts", steps=5, schedule="constant"), change, *without, resume=True)


def test_two_ranks_learn_as_one(tmp_path, teacher):
    """Of samples with weights; the model in shards, its teacher whole, with gradient caching."""
    shards = write_vectors(tmp_path / "a.tar", about=lambda k: {"sample_weight": k % 5})
    path = write_config(tmp_path, shards, objective=DISTILLATION, train={"teacher": str(teacher)})
    done = mmcontrast("train", path, "run.name=two", "train.parallel=fsdp", "train.micro_batch_size=3", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one = run(path, "run.name=one")
    two = make_run_context(load_config(path, ["run.name=two"]))
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], rtol=1e-4, atol=1e-6)


def test_a_guide_says_which_candidates_are_no_negatives(tmp_path, shards, teacher):
    path = write_config(tmp_path, shards, objective=GUIDED, train={"teacher": str(teacher)})
    job = make_run_context(load_config(path))
    (batch,), model = batches_of(job, 1), load(teacher, device="cpu").model
    rows = {field: model.encode(field, batch.values[field]).detach() for field in "ab"}
    out = job.model(batch)
    want = contrastive_loss(out.fields, objective=GUIDED, logit_scale=out.logit_scale, ids=batch.ids, teacher=rows)
    assert want != contrastive_loss(out.fields, logit_scale=out.logit_scale, ids=batch.ids), "the guide matters here"
    learner = Learner(
        job.model, job.objective, job.pairing, None, Accelerator(cpu=True), job.options, {}, teachers=job.teachers
    )
    torch.testing.assert_close(learner.loss(out, batch.labels(), teacher_embeddings=learner.teacher_embeddings(batch)), want)


def test_a_teacher_of_another_library_reads_pictures_and_the_same_lines_by_its_own_preprocessing(corpus, tmp_path):
    """open_clip's model: pictures of another size than the model's, undistorted; of several captions the one that was drawn."""
    folder, samples = save(tmp_path / "clip", "clip"), []
    pictures = [data for data in (corpus / "train-00000.tar").read_bytes().split(b"\x89PNG") if b"IEND" in data]
    pictures = [b"\x89PNG" + data[: data.index(b"IEND") + 8] for data in pictures[:8]]
    for k, picture in enumerate(pictures):
        samples.append({"__key__": f"{k}", "png": picture, "txt": "\n".join(f"caption {k} {line}" for line in range(5))})
    write_shard(tmp_path / "a.tar", samples)
    text = {"type": "text", "context_length": 12, "captions": "lines"}
    bert = {"type": "open_clip_text", "width": 16, "layers": 1, "heads": 2, "context_length": 12}
    fields = {
        "picture": {"modality": {"type": "image", "size": 24, "channels": 1}, "tower": "image", "keys": ["png"]},
        "caption": {"modality": text, "tower": "text", "keys": ["txt"]},
    }
    resnet = {"type": "timm", "model": "resnet18", "in_chans": 1, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    given = {"model": str(folder), "fields": {"picture": "image", "caption": "text"}}
    groups = {"fields": fields, "towers": {"image": resnet, "text": bert}, "objective": DISTILLATION}
    path = write_config(tmp_path, tmp_path / "a.tar", **groups, train={"teacher": given}, data={"lanes": 1, "block": 8})
    job, opened = make_run_context(load_config(path)), load(folder, device="cpu")
    (batch,) = batches_of(job, 1)
    embeddings = job.teachers[0].embed(batch.views[0], 3, torch.device("cpu"))
    places = [int(entry["key"]) for entry in batch.metadata]
    want = opened.embed(images=[pictures[place] for place in places])
    torch.testing.assert_close(embeddings["picture"], want, rtol=1e-5, atol=1e-6)
    lines = []
    for place, row in zip(places, batch.values["caption"], strict=True):
        texts = [f"caption {place} {line}" for line in range(5)]
        ids = [job.model.modality("caption").tokens(one).tolist() for one in texts]
        lines.append(texts[ids.index([token for token in row.tolist() if token >= 0])])
    assert len({line[-1] for line in lines}) > 1
    torch.testing.assert_close(embeddings["caption"], opened.embed(texts=lines), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused_at_the_door(tmp_path, shards, teacher):
    path = write_config(tmp_path, shards, objective=DISTILLATION, train={"teacher": str(teacher)})
    for changes, message in (
        (["train.teacher=null"], "objective Distillation learns from a teacher: name a model in train.teacher"),
        (["objective=infonce"], "train.teacher: objective InfoNCE takes no teacher"),
        (["train.queue_size=9"], "train.teacher: Distillation: the teacher's softmax .*queue_size"),
        (["pairing={type: all_pairs, same_field: true}"], "train.teacher: Distillation: the teacher's softmax"),
        (["train.teacher=nothing/of-the-kind"], "train.teacher: nothing/of-the-kind"),
        ([f"train.teacher={{model: {teacher}, fields: {{x: a}}}}"], "train.teacher.fields: no field 'x'"),
        ([f"train.teacher={{model: {teacher}, fields: {{a: x}}}}"], "train.teacher.fields.a: .*no field 'x'"),
        ([f"train.teacher={{model: {teacher}, pooling: mean}}"], "train.teacher: .*is a run: it takes neither"),
        ([f"train.teacher={{model: {teacher}, stored: {{a: a.npy}}}}"], "unknown key 'train.teacher.stored'"),
        (["train.teacher={stored: {a: a.npy}}"], "train.teacher.stored lacks the field 'b'"),
        (["train.teacher={stored: {a: a.npy, b: t.npy}}"], "train.teacher: no sample of .* has a member .t.npy"),
        ([f"objective={json.dumps(GUIDED)}", f"train.teacher=[{teacher}, {teacher}]"], "a guide is one model, there are 2"),
    ):
        with pytest.raises(UserError, match=message):
            make_run_context(load_config(path, changes))
    fields = {f: {"modality": {"type": "vector", "width": 6}, "tower": t, "keys": [f"{t}.npy"]} for f, t in ("aa", "cb")}
    path = write_config(tmp_path, shards, fields=fields, objective=DISTILLATION, train={"teacher": str(teacher)})
    with pytest.raises(UserError, match=r"has no field 'c', which the loss scores; it has a, b: say which sees it"):
        make_run_context(load_config(path))


def test_stored_embeddings_are_a_teacher(tmp_path):
    """One array of a sample, or one row of several drawn by (seed, epoch, id), the same for every teacher of as many."""

    def more(k, random):
        return {
            "teacher.a.npy": npy(random.normal(size=(3, 5))), "other.a.npy": npy(random.normal(size=(3, 4))),
            "teacher.b.npy": npy(random.normal(size=5)), "other.b.npy": npy(random.normal(size=4)),
        }  # fmt: skip

    shards = write_vectors(tmp_path / "a.tar", more)
    given = [
        {"stored": {"a": "teacher.a.npy", "b": "teacher.b.npy"}},
        {"stored": {"a": "other.a.npy", "b": "other.b.npy"}, "scale": 50.0},
    ]
    path = write_config(tmp_path, shards, objective=DISTILLATION, train={"teacher": given, "steps": 6, "lr": 0.0})
    job = make_run_context(load_config(path))
    assert [t.scale for t in job.teachers] == [100.0, 50.0]
    assert [v.blank().shape for v in job.teachers[1].view.modalities.values()] == [(4,), (4,)]
    batches, drawn = batches_of(job, 6), {}
    for batch in batches:
        for number, sample_id in enumerate(batch.sample_ids.tolist()):
            rows = []
            for view, key in zip(batch.views, ("teacher.a.npy", "other.a.npy"), strict=True):
                stored = job.dataset.members(sample_id, [key])[key]
                array = StoredEmbeddings().decode(stored)
                rows.append([torch.equal(row, view.values["a"][number]) for row in array].index(True))
            assert rows[0] == rows[1]
            drawn.setdefault(sample_id, []).append(rows[0])
    assert {row for rows in drawn.values() for row in rows} == {0, 1, 2} and any(len(set(rows)) > 1 for rows in drawn.values())
    with pytest.raises(UserError, match=r"\.teacher\.a\.npy has 5 numbers, \.other\.b\.npy has 4 numbers"):
        make_run_context(load_config(path, ["train.teacher={stored: {a: teacher.a.npy, b: other.b.npy}}"]))
    batch, out = batches[0], job.model(batches[0])
    want = contrastive_loss(
        out.fields,
        objective=DISTILLATION,
        logit_scale=out.logit_scale,
        ids=batch.ids,
        teacher=[{field: view.values[field] for field in "ab"} for view in batch.views],
        teacher_scale=[100.0, 50.0],
    )
    assert losses(run(path))[0] == pytest.approx(want.item(), rel=1e-6)


def test_verify_reads_what_a_teacher_would(tmp_path):
    """And a weight: all that training would find bad, but for members that are missing."""

    def more(k, random):
        return {"t.npy": npy(np.zeros(3) if k == 7 else np.ones(3))}

    shards = write_vectors(tmp_path / "a.tar", more, lambda k: {"sample_weight": -1} if k == 3 else {})
    teacher = {"stored": {"a": "t.npy", "b": "t.npy"}}
    path = write_config(tmp_path, shards, objective=DISTILLATION, train={"teacher": teacher})
    sources, _ = _sources(str(path), [])
    patterns, reading = sources["data.train"]
    faults = verify_shards(patterns, 1, False, reading)["faults"]
    assert [(fault["sample"], fault["member"]) for fault in faults] == [("003", "json"), ("007", "t.npy")], faults
