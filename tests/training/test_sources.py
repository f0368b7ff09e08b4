"""Check whole runs by where their samples come from: what is replaced, counted, refused, resumed."""

import json
import shutil

import pytest
import yaml

from data_pipelines.glyphs.glyphs import Glyphs
from mmcontrast.config import load_config
from mmcontrast.data import open_shards, write_shard
from mmcontrast.errors import UserError
from mmcontrast.runs import make_run_context
from mmcontrast.training.sample_log import warnings
from tests.command import NO_EVALUATION, train
from tests.data.web_server import serving
from tests.results import results_of


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def broken(corpus, tmp_path):
    """The three shards of training, two pictures of the first overwritten."""
    for source in corpus.glob("train-*.tar"):
        data = bytearray(source.read_bytes())
        for _ in range(2 if source.name == "train-00000.tar" else 0):
            start = data.index(b"\x89PNG")
            data[start : start + 8] = b"BROKEN!!"
        (tmp_path / source.name).write_bytes(data)
    return tmp_path / "train-*.tar"


def test_broken_pictures_are_replaced_and_listed(config_file, broken, tmp_path):
    """The same replacements with a worker, and on resume; the sample ids of every step are written down."""
    options = [f"data.train={broken}", "data.record_samples=true", *NO_EVALUATION]
    done = train(config_file, *options, "data.num_workers=1")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    bad = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert len(bad) == 2 and all("train-00000.tar" in b["error"] and "not a picture" in b["error"] for b in bad)
    assert "replaced: shard" in done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["bad_samples"] == 2
    seen = (run / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in seen] == [1, 2, 3, 4, 5, 6]
    assert all(len(json.loads(line)["ids"]) == 16 for line in seen)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert train(config_file, *options, "--resume").returncode == 0
    assert (run / "samples.jsonl").read_text().splitlines() == seen
    assert [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()] == bad
    stopped = train(config_file, *options, "data.max_bad_share=0.001", "run.name=strict")
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert "2 samples of" in " ".join(stopped.stderr.split()) and "member .png: not a picture" in stopped.stderr


def test_two_sources_train_and_resume(config_file, corpus, tmp_path):
    """One of them without sounds, with a transform of its own; weights as given, and the same steps after a resume."""
    items = [item for item in Glyphs().splits()["val"] if item[0].script == "Greek"][:20]
    samples = [Glyphs(side=24).make_sample("train", item) for item in items]
    for sample in samples:
        del sample["flac"]
    write_shard(tmp_path / "silent-00000.tar", samples)
    rotated = "modalities: {image: {augment: [{type: RandomRotation, degrees: 10}]}}"
    sources = f"data.train={{spoken: {{shards: '{corpus}/train-*.tar', weight: 3}}, "
    sources += f"silent: {{shards: '{tmp_path}/silent-*.tar', weight: 1, {rotated}}}}}"
    options = [sources, "data.record_samples=true", "train.steps=8", *NO_EVALUATION]
    done = train(config_file, *options)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    seen = (run / "samples.jsonl").read_text()
    ids = [i for line in seen.splitlines() for i in json.loads(line)["ids"]]
    silent = {sample["json"]["sample_id"] for sample in samples}
    assert 16 <= sum(i in silent for i in ids) <= 48 and len(ids) == 128
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    resumed = train(config_file, *options, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (run / "samples.jsonl").read_text() == seen
    refused = train(config_file, *options, "--resume", "train.steps=10", "data.batches=single")
    assert refused.returncode == 2 and "its data order had batches=mixed, now single" in refused.stderr
    refused = train(config_file, sources.replace("image: {aug", "picture: {aug"), "run.name=other")
    assert refused.returncode == 2 and "data.train.silent: no field 'picture'" in refused.stderr


def test_other_shards_are_refused_on_resume(config_file, broken):
    assert train(config_file, *NO_EVALUATION, "train.steps=2").returncode == 0
    done = train(config_file, *NO_EVALUATION, "--resume", f"data.train={broken}")
    assert done.returncode == 0, "overwritten bytes are the same samples in the same places"
    first = sorted(broken.parent.glob("train-*.tar"))[0]
    (broken.parent / "train-00009.tar").write_bytes(first.read_bytes())
    first.unlink()
    done = train(config_file, "--resume", f"data.train={broken}", "train.steps=8")
    assert done.returncode == 2 and "its data order had data=" in done.stderr


def test_bad_samples_are_counted_by_source_and_shards_come_from_a_server(config_file, corpus, broken, tmp_path):
    """A source at a URL whose server fails now and then, another with two broken pictures; the same again after a resume."""
    with serving(corpus) as server:
        server.plan = ["503", "drop", "", "truncate", ""] * 4
        sources = f"data.train={{far: {{shards: '{server.url}/train-0000{{1,2}}.tar'}}, near: {{shards: '{broken}'}}}}"
        options = [sources, "data.record_samples=true", "data.num_workers=1", "train.steps=12", *NO_EVALUATION]
        done = train(config_file, *options)
        assert done.returncode == 0, done.stderr
        assert "attempt 1 of 8 failed" in done.stderr and server.seen["503"] >= 1
        run = tmp_path / "runs" / "small"
        bad, seen = lines_of(run / "bad_samples.jsonl"), (run / "samples.jsonl").read_text()
        assert len(bad) >= 2 and all(b["source"] == "near" and "not a picture" in b["error"] for b in bad)
        last = lines_of(run / "metrics.jsonl")[-1]
        assert last["bad_samples"] == last["bad_samples/near"] == len(bad) and "bad_samples/far" not in last
        shutil.rmtree(run / "checkpoints" / "step-00000012")
        assert train(config_file, *options, "--resume").returncode == 0
        assert lines_of(run / "metrics.jsonl")[-1]["bad_samples/near"] == len(bad)
        assert (run / "samples.jsonl").read_text() == seen
        server.folder = tmp_path / "nowhere"
        gone = train(config_file, sources, "run.name=other")
    assert gone.returncode == 2 and "Traceback" not in gone.stderr
    assert "train-00001.tar cannot be read (ClientResponseError: 404" in " ".join(gone.stderr.split())


@pytest.mark.parametrize("kind", ["clusters", "bucket_by"])
def test_clusters_and_length_buckets_train_and_resume(config_file, corpus, tmp_path, kind):
    """The steps are what they should be, and the same after a resume; another table of clusters is refused."""
    shards = open_shards(str(corpus / "train-*.tar"))
    rows = [(shard, k) for shard in shards for k in range(len(shard))]
    ids = [json.loads(shard.read(k, ["json"])["json"])["sample_id"] for shard, k in rows]
    of = {"clusters": [place % 5 for place in range(len(rows))], "bucket_by": [shard.size(k, "txt") for shard, k in rows]}
    table = tmp_path / "clusters.csv"
    table.write_text("sample_id,cluster\n" + "\n".join(f"{i},{c}" for i, c in zip(ids, of["clusters"], strict=True)))
    option = f"data.clusters={table}" if kind == "clusters" else "data.bucket_by=text"
    options = [option, "data.record_samples=true", "train.batch_size=8", "train.steps=12", "data.lanes=2", *NO_EVALUATION]
    done = train(config_file, *options)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    seen, value_of = lines_of(run / "samples.jsonl"), dict(zip(ids, of[kind], strict=True))
    steps = [[value_of[i] for i in line["ids"]] for line in seen]
    if kind == "clusters":
        assert sum(len(set(step)) == 1 for step in steps) >= 10
    else:
        overall = max(of[kind]) - min(of[kind])
        assert sum(max(step) - min(step) for step in steps) / len(steps) < 0.6 * overall
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    assert train(config_file, *options, "--resume").returncode == 0
    assert lines_of(run / "samples.jsonl") == seen
    if kind == "clusters":
        table.write_text(table.read_text().replace(",4", ",3"))
        refused = train(config_file, *options, "--resume", "train.steps=14")
        assert refused.returncode == 2 and "its data order had table=" in refused.stderr


def test_a_sequential_run_says_what_it_does_not_promise(config_file, corpus, tmp_path):
    done = train(config_file, *NO_EVALUATION, "data.sequential=true", "train.steps=4")
    assert done.returncode == 0 and "no epoch shows each sample once" in " ".join(done.stderr.split())
    assert train(config_file, *NO_EVALUATION, "data.sequential=true", "--resume", "train.steps=6").returncode == 0
    assert [line["step"] for line in lines_of(tmp_path / "runs" / "small" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    refused = train(config_file, "--resume", "train.steps=8")
    assert refused.returncode == 2 and "its data order had" in refused.stderr


def test_all_captions_of_a_sample_in_one_batch(config_file, corpus, tmp_path):
    """Three fields for three lines, one tower; a sample with fewer lines lacks the last ones, and results say so."""
    (shard,) = open_shards(str(corpus / "val-*.tar"))
    samples = []
    for row in range(len(shard)):
        text = shard.read(row, ["txt"])["txt"].decode()
        captions = [text, f"once more: {text}", f"again: {text}"][: 1 + row % 3]
        about = json.loads(shard.read(row, ["json"])["json"])
        png = shard.read(row, ["png"])["png"]
        samples.append({"__key__": shard.keys[row], "png": png, "txt": "\n".join(captions), "json": about})
    write_shard(tmp_path / "captions.tar", samples)
    config = yaml.safe_load(config_file.read_text())
    del config["fields"]["text"], config["fields"]["audio"], config["towers"]["audio"], config["evaluation"]["zero_shot"]
    for k in range(3):
        modality = {"type": "text", "context_length": 24, "captions": k}
        config["fields"][f"caption{k}"] = {"modality": modality, "tower": "text"}
    config["pairing"] = {"type": "anchor", "field": "image"}
    config["data"]["train"] = config["evaluation"]["splits"]["val"] = str(tmp_path / "captions.tar")
    config_file.write_text(yaml.safe_dump(config))
    done = train(config_file, "train.steps=3")
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "runs" / "small")
    queries = [results[f"val/retrieval/caption{k}_to_image/num_queries"] for k in range(3)]
    assert queries == [24, 16, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.bucket_by=caption"], "data.bucket_by: no field 'caption'"),
        (["data.bucket_by=text", "data.clusters=x.csv"], "of one cluster, or of one length, not both"),
        (["data.sequential=true", "data.bucket_by=text"], "data.sequential: the order is that of the tars"),
        (["data.train={a: {shards: x.tar}}", "data.bucket_by=text"], "data.bucket_by: .* there are several"),
        (["data.train={a: {shards: x.tar, weight: 2}}", "data.clusters=x.csv"], "so there are no weights"),
        (["train.seed=-1"], "train.seed"),
        (
            ["data.train={a: {shards: '{corpus}/train-*.tar', modalities: {image: {mean: [0.1]}}}}"],
            "'mean' must be that of the model",
        ),
        (["data.train={a: {shards: '{corpus}/train-*.tar', keys: {text: [captoin]}}}"], "no sample has a member captoin"),
        (["data.clusters=x.csv"], "data.clusters: no file x.csv"),
        (["data.train=pipe:touch harmed"], "no shard at 'pipe:touch harmed'"),
        (["data.train=file:///etc/passwd"], "URLs of 'file' are not opened; there is: http, https, s3"),
    ],
)
def test_what_does_not_go_together_is_refused(config_file, corpus, options, message):
    with pytest.raises(UserError, match=message):
        make_run_context(load_config(config_file, [option.replace("{corpus}", str(corpus)) for option in options]))


def test_steps_that_never_come_are_told_of(vectors_file):
    options = ["train.steps=100", "train.freeze={a: 500, b: 50}", "train.profile_steps=[101, 102]", "data.negatives={field: b}"]
    options += ["train.mine_every=100", "train.mine={query: a, candidate: b}"]
    job = make_run_context(load_config(vectors_file, options))
    told = list(warnings(job))
    assert [line.partition(":")[0] for line in told] == ["train.mine_every", "train.profile_steps", "train.freeze, to train a"]
    assert all("and the run has 100 steps: it has no effect" in line for line in told)
    assert not list(warnings(make_run_context(load_config(vectors_file, [*options, "train.steps=1000"]))))


def test_a_cache_too_small_for_what_is_shuffled_is_told_of(config_file, corpus, monkeypatch):
    with serving(corpus) as server:
        job = make_run_context(load_config(config_file, [f"data.train={server.url}/train-0000{{0..2}}.tar"]))
    assert not list(warnings(job))
    monkeypatch.setenv("MMCONTRAST_CACHE_GIB", "0.0001")
    (warning,) = warnings(job)
    assert "the same bytes will be fetched many times; raise MMCONTRAST_CACHE_GIB" in warning
    monkeypatch.setenv("MMCONTRAST_CACHE_GIB", "0")
    assert not list(warnings(job))
