"""Suites of every kind of task, on shards of ours."""

import json
import os
import re
import sys
import tarfile

import numpy as np
import pytest
import torch
import yaml

from mmcontrast.cli import main
from mmcontrast.config import load_config
from mmcontrast.data import write_shard
from mmcontrast.embedder import load
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.cache import fingerprint, table_folder
from mmcontrast.evaluation.gallery import comparable
from mmcontrast.models import make_model
from mmcontrast.run_folder import prepare_folder
from mmcontrast.runs import make_run_context
from mmcontrast.suites import open_suite, run_suite
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from tests.command import mmcontrast, run_script
from tests.evaluation.layouts import pictures, retrieval
from tests.results import results_of


@pytest.fixture
def run(config_file):
    """A run of three fields whose weights are so random that samples differ."""
    config = load_config(config_file)
    prepare_folder(config, overwrite=False)
    model = make_model(config.fields, config.towers, config.model, 0)
    for weights in model.parameters():
        weights.data += 0.3 * torch.randn_like(weights)
    checkpoint.save(config.folder / "checkpoints", 6, Contents(model.state_dict(), {}, {}, config.to_yaml()))
    return config.folder


@pytest.fixture
def suite_file(corpus, tmp_path):
    relevance = tmp_path / "relevance.txt"
    with relevance.open("w") as file:
        from mmcontrast.data import open_shards

        keys = list(open_shards(str(corpus / "val-*.tar"))[0].keys)
        file.writelines(f"{query} 0 {keys[(k + step) % 24]} {step - 1}\n" for k, query in enumerate(keys) for step in (1, 2, 3))
    tree = {
        "splits": {"val": str(corpus / "val-*.tar")},
        "retrieval": {
            "both_to_audio": {"query": ["image", "text"], "candidate": "audio"},
            "same_script": {"query": "image", "candidate": "image", "by": "script"},
            "graded": {"query": "text", "candidate": "image", "relevance": str(relevance)},
        },
        "languages": {"names": {"fields": ["text", "audio"], "candidate": "image"}},
        "probes": {
            "script": {"train": str(corpus / "train-*.tar"), "label": "script", "shots": [2], "seeds": 3, "neighbours": 5}
        },
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_every_kind_of_task(run, suite_file):
    suite = open_suite(str(run), str(suite_file), ["resamples=50"], None)
    found = run_suite(str(run), suite, device="cpu")
    assert (
        suite.out.parent == run / "evaluations"
        and suite.out.name.startswith("suite-")
        and results_of(suite.out) == pytest.approx(found.values, nan_ok=True)
    )
    for name in (
        "retrieval/both_to_audio/recall_at_1", "retrieval/same_script/map", "retrieval/graded/ndcg_at_5",
        "languages/names/to_image/mean_rank_variance", "languages/names/text_to_image/recall_at_1",
        "probe/script/linear/top1", "probe/script/knn/macro_f1", "probe/script/few_shot_2/top1",
        "geometry/image_text/modality_gap", "geometry/audio/effective_rank", "geometry/text_to_image/hubness",
    ):  # fmt: skip
        low, high = found.intervals[f"val/{name}"]
        assert low <= found.values[f"val/{name}"] + 1e-9 and high >= low, name
    data = json.loads((suite.out / "results.json").read_text())["data"]
    assert data.keys() == {"val", "probe script"} and data["probe script"]["samples"] == 96 and data["probe script"]["digest"]
    table = found.tables["val"]
    scripts = np.array([entry["script"] for entry in table.metadata])
    rows = table.fields["image"].double()
    scores = (rows @ rows.T).fill_diagonal_(-9)
    first = scripts[scores.argmax(1).numpy()] == scripts
    assert found.values["val/retrieval/same_script/recall_at_1"] == pytest.approx(first.mean())
    together = torch.nn.functional.normalize(table.fields["image"] + table.fields["text"], dim=1)
    hits = (together @ table.fields["audio"].T).argmax(1) == torch.arange(24)
    assert found.values["val/retrieval/both_to_audio/recall_at_1"] == pytest.approx(hits.double().mean().item())
    best = (table.fields["text"] @ table.fields["image"].T).topk(5).indices
    gains = torch.zeros(24, 24)
    for step in (2, 3):
        gains[torch.arange(24), (torch.arange(24) + step) % 24] = step - 1
    discounts = 1 / (torch.arange(5) + 2.0).log2()
    ndcg = (gains.gather(1, best) * discounts).sum(1) / (2 * discounts[0] + discounts[1])
    assert found.values["val/retrieval/graded/ndcg_at_5"] == pytest.approx(ndcg.mean().item(), rel=1e-5)


def test_a_table_is_evaluated_as_its_model_is(run, suite_file, corpus, tmp_path):
    suite = open_suite(str(run), str(suite_file), ["probes={}", "resamples=50", "widths=[4]", "scoring=csls"], None)
    want = run_suite(str(run), suite, device="cpu")
    assert mmcontrast("embed", run, corpus / "val-*.tar", tmp_path / "val").returncode == 0
    tree = yaml.safe_load(suite_file.read_text())
    options = {
        "retrieval": tree["retrieval"],
        "languages": tree["languages"],
        "resamples": 50,
        "widths": [4, 64],
        "scoring": "csls",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(options))
    done = mmcontrast("evaluate", tmp_path / "val", "--suite", tmp_path / "own.yaml")
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "val/evaluation") == pytest.approx(want.values, nan_ok=True, abs=1e-6)
    assert "recall at 1" in (tmp_path / "val/evaluation/report.html").read_text()
    done = mmcontrast("evaluate", tmp_path / "val", "--out", tmp_path / "plain", "resamples=0")
    assert done.returncode == 0 and "val/retrieval/image_to_audio/recall_at_1" in results_of(tmp_path / "plain")
    for overrides, message in (
        (["zero_shot.script={label: script, classes: [a, b]}"], "zero_shot: .* is a table, of which retrieval and geometry"),
        (["scoring={type: bridge, bank: words.txt}"], "index .* --bridge"),
        (["retrieval.x={query: video, candidate: image}"], "has no field 'video'"),
        (["pairs=false", "geometry=false"], "nothing to evaluate"),
    ):
        done = mmcontrast("evaluate", tmp_path / "val", *overrides)
        assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


def test_post_processing_changes_retrieval_alone(run, suite_file):
    plain = run_suite(str(run), open_suite(str(run), str(suite_file), ["resamples=0", "geometry=false"], None), device="cpu")
    for option in ("scoring=csls", "scoring=inverted_softmax", "scoring=margin", "whiten=true"):
        suite = open_suite(str(run), str(suite_file), ["resamples=0", "geometry=false", option], None)
        found = run_suite(str(run), suite, device="cpu").values
        changed = {name for name, value in plain.values.items() if found[name] != pytest.approx(value, abs=1e-6, nan_ok=True)}
        assert changed and all("/retrieval/" in name or "/languages/" in name for name in changed), option


def captions_in(shard):
    with tarfile.open(shard) as tar:
        return [tar.extractfile(member).read() for member in tar.getmembers() if member.name.endswith(".txt")]


@pytest.mark.parametrize("rows", ["exact", "expected"])
def test_fields_are_compared_through_a_bank(run, suite_file, corpus, tmp_path, rows):
    """Banks of words, of a table, and of the captions of shards; pairs with the bank's own field keep their cosines."""
    words, plainly = tmp_path / "words.txt", ["resamples=0", "geometry=false", "probes={}"]
    words.write_text("black chess king\n\ngreek small letter alpha\ndigit one\ndigit one\nplus sign\n")
    plain = run_suite(str(run), open_suite(str(run), str(suite_file), plainly, None), device="cpu")
    table, embedder = plain.tables["val"], load(str(run), device="cpu")
    table.write(tmp_path / "table")
    scale = embedder.model.log_logit_scale.exp().item()
    lines = list(dict.fromkeys(words.read_text().split("\n")))
    banks = {words: embedder.embed(texts=[line for line in lines if line]), tmp_path / "table": table.fields["text"]}
    for source, bank in banks.items():
        scoring = f"scoring={{type: bridge, bank: {source}, rows: {rows}}}"
        suite = open_suite(str(run), str(suite_file), [*plainly, scoring], None)
        found = run_suite(str(run), suite, device="cpu").values
        p, q = ((scale * table.fields[field] @ bank.T).double().softmax(1) for field in ("image", "audio"))
        expected = [torch.nn.functional.normalize(of @ bank.double(), dim=1) for of in (p, q)]
        scores = p.sqrt() @ q.sqrt().T if rows == "exact" else expected[0] @ expected[1].T
        hits = (scores.argmax(1) == torch.arange(24)).double().mean().item()
        assert found["val/retrieval/image_to_audio/recall_at_1"] == pytest.approx(hits, abs=1e-6)
        for name in ("image_to_text", "text_to_audio"):
            name = f"val/retrieval/{name}/median_rank"
            assert found[name] == plain.values[name]
    shards = f"scoring={{type: bridge, bank: {corpus}/train-*.tar, rows: {rows}}}"
    by_shards = run_suite(str(run), open_suite(str(run), str(suite_file), [*plainly, shards], None), device="cpu")
    texts = sorted({text.decode() for file in corpus.glob("train-*.tar") for text in captions_in(file)})
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    texts = f"scoring={{type: bridge, bank: {tmp_path / 'texts.txt'}, rows: {rows}}}"
    by_texts = run_suite(str(run), open_suite(str(run), str(suite_file), [*plainly, texts], None), device="cpu")
    assert by_shards.values == pytest.approx(by_texts.values, nan_ok=True)
    everything = torch.arange(24)
    shown = comparable("image", "audio", everything, everything, embedder.model, table, by_shards.bank)
    bridge = by_shards.bank.between(embedder.model, ["image"], ["audio"])
    rows_of_pages = [bridge.expected(table.fields[field]) for field in ("image", "audio")]
    torch.testing.assert_close(shown, tuple(rows_of_pages))
    table.write(tmp_path / "others", {"model": "ViT-B-32", "pretrained": "openai"})
    with pytest.raises(UserError, match="of other weights than those that learn here"):
        make_run_context(
            load_config(run / "config.yaml", [f"evaluation.scoring={{type: bridge, bank: {tmp_path / 'others'}}}"])
        )
    refused = {
        f"bank: {tmp_path / 'others'}": "its model is 'ViT-B-32', here it is .*: embed both with one model",
        f"bank: {tmp_path / 'none.txt'}": "none.txt: No such file",
        f"bank: {words}, field: image": "field 'image' reads no texts; those that do: text",
        f"bank: {tmp_path / 'table'}, field: name": "field 'name' is not of the table and the model; of both are audio, image",
    }
    for options, message in refused.items():
        suite = open_suite(str(run), str(suite_file), [*plainly, f"scoring={{type: bridge, {options}}}"], None)
        with pytest.raises(UserError, match=message):
            run_suite(str(run), suite, device="cpu")


def test_embeddings_are_kept_until_the_weights_or_the_data_change(run, suite_file, corpus, monkeypatch):
    suite = open_suite(str(run), str(suite_file), ["resamples=0"], None)
    before = run_suite(str(run), suite, device="cpu").values
    embedded = []
    monkeypatch.setattr("mmcontrast.suites.embed_split", lambda *given: embedded.append(given[-2]) or again.tables["val"])
    again = run_suite(str(run), suite, device="cpu")
    assert again.values == pytest.approx(before, nan_ok=True) and not embedded
    assert isinstance(again.tables["val"], EmbeddingTable)
    file = next(corpus.glob("val-*.tar"))
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    run_suite(str(run), suite, device="cpu")
    assert embedded == ["val"]
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_fingerprint_is_the_same_in_every_process(run, model):
    """Strings have other hashes there. And after use: a tokenizer remembers what it has seen."""
    script = (
        "import sys, mmcontrast; from mmcontrast.evaluation.cache import fingerprint\n"
        "for name in sys.argv[1:]:\n    m = mmcontrast.load(name, device='cpu')\n    before = fingerprint(m.model)\n"
        "    m.embed(texts=['a queen of many colours']); assert fingerprint(m.model) == before; print(before)\n"
        "print(hash('a queen'))"
    )
    there = run_script(script, run, model)
    assert there.returncode == 0, there.stderr
    *prints, a_hash = there.stdout.split()[-3:]
    assert int(a_hash) != hash("a queen") or "PYTHONHASHSEED" in os.environ
    assert prints == [fingerprint(load(name, device="cpu").model) for name in (run, model)]
    changed = load(run, device="cpu")
    before = fingerprint(changed.model)
    next(changed.model.parameters()).data[0] += 1
    assert fingerprint(changed.model) != before
    changed = load(run, device="cpu")
    changed.model.modality("image").scaled_decode = True
    assert fingerprint(changed.model) != before


def test_in_half_precision(run, suite_file):
    suite = open_suite(str(run), str(suite_file), ["resamples=0", "probes={}"], None)
    whole = run_suite(str(run), suite, device="cpu").tables["val"]
    for precision in ("bf16", "fp16"):
        half = run_suite(str(run), suite, device="cpu", precision=precision, cached=False).tables["val"]
        difference = (whole.fields["image"] - half.fields["image"]).abs().max()
        assert 0 < difference < 0.2 and half.fields["image"].dtype == torch.float32, precision


def test_results_of_a_checkpoint_are_not_written_into_it(run):
    name = str(run / "checkpoints" / "step-00000006")
    assert open_suite(name, None, [], None).out == run / "evaluations" / "checkpoint-00000006"
    assert open_suite(str(run), None, [], None).out == run
    own, other = (open_suite(str(run), None, [option], None).out for option in ("resamples=0", "scoring=csls"))
    assert own.parent == run / "evaluations" and own.name.startswith("own-") and own != other  # the training's own stay
    suite = open_suite(name, None, ["resamples=0"], None)
    assert suite.out == own.with_name(f"{own.name}-checkpoint-00000006")
    run_suite(name, suite, device="cpu")
    run_suite(name, suite, device="cpu")  # it can still be read


def test_suites_of_one_name_have_folders_of_their_own(run, suite_file, corpus, tmp_path, monkeypatch):
    others = []
    for name in ("coco", "flickr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "suite.yaml").write_text(
            f"{{splits: {{{name}: '{corpus}/val-*.tar'}}, resamples: 0, geometry: false}}"
        )
        suite = open_suite(str(run), str(tmp_path / name / "suite.yaml"), [], None)
        run_suite(str(run), suite, device="cpu")
        others.append(suite.out)
    assert others[0] == run / "evaluations" / "suite" and others[1].name.startswith("suite-")
    for name, out in zip(("coco", "flickr"), others, strict=True):  # again, and from elsewhere
        monkeypatch.chdir(tmp_path / name)
        assert open_suite(str(run), "suite.yaml", [], None).out == out
        assert all(result.startswith(f"{name}/") for result in results_of(out))
    retrieval(tmp_path / "wds_captions")
    monkeypatch.chdir(tmp_path / "wds_captions")
    suite = open_suite(str(run), ".", [], None)
    assert suite.out.name == "wds_captions" and list(suite.options.splits) == ["wds_captions"]


def test_data_in_a_layout_leaves_other_splits_as_they_are(run, suite_file, tmp_path):
    options = ["resamples=0", "geometry=false"]
    options += [f"{task}.splits=[val]" for task in ("retrieval.graded", "retrieval.same_script", "probes.script")]
    before = run_suite(str(run), open_suite(str(run), str(suite_file), options, None), device="cpu").values
    options.append(f"splits.captions={retrieval(tmp_path / 'wds_captions')}")
    after = run_suite(str(run), open_suite(str(run), str(suite_file), options, None), device="cpu").values
    assert {name: after[name] for name in before} == pytest.approx(before, nan_ok=True)
    assert after["captions/retrieval/text_to_image/num_queries"] == sum(2 + k % 4 for k in range(24))


def test_what_cannot_be_written(run, suite_file, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/x: no folder for results"):
        run_suite(str(run), open_suite(str(run), str(suite_file), [], tmp_path / "file" / "x"), device="cpu")
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "file"))
    found = run_suite(str(run), open_suite(str(run), str(suite_file), ["resamples=0"], None), device="cpu")
    assert found.values and "embeddings are not kept" in caplog.text


def test_two_ranks_find_what_one_finds(run, suite_file):
    command = ["evaluate", run, "--suite", suite_file, "--no-cache", "resamples=20", "--out", run / "two"]
    done = mmcontrast(*command, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = run_suite(
        str(run), open_suite(str(run), str(suite_file), ["resamples=20"], run / "one"), device="cpu", cached=False
    )
    assert results_of(run / "two") == pytest.approx(found.values, nan_ok=True, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["retrieval.x={query: image, candidate: smell}"], "evaluation.retrieval.x: the model has no field 'smell'"),
        (["retrieval.x={query: image, candidate: text, by: colour}"], "no sample has the label 'colour'"),
        (["zero_shot.z={label: script, classes: imagenet2}"], "no classes of the name 'imagenet2'"),
        (["zero_shot.z={label: script, classes: [a, b], splits: [vall]}"], "no split 'vall'; did you mean 'val'"),
        (["probes.script.train=nowhere.tar"], "no shard at 'nowhere.tar'"),
        (["retrieval.x={query: image, candidate: image, once: true}"], "once is of groups"),
        (["captions=[image]"], "evaluation.captions: 'image' is not text"),
        (["retrieval_att=[1]"], "unknown key 'retrieval_att'; did you mean 'retrieval_at'"),
    ],
)
def test_mistakes_are_told_in_a_line(run, suite_file, options, message, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["mmcontrast", "evaluate", str(run), "--suite", str(suite_file), "--device", "cpu", *options]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_picture_in_several_rows_is_one_candidate(model, tmp_path):
    """As Flickr's in a table with a row a caption: wrong answers count once, as in CLIP_benchmark's layout."""
    few, rows = list(pictures(6)), []
    for number, picture in enumerate(few):
        for k in range(3):
            text = f"number {number} {'abc'[k]}"
            rows.append({"__key__": f"{number}-{k}", "png": picture, "txt": text, "json": {"group_id": number}})
    write_shard(tmp_path / "rows.tar", rows)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"splits": {"v": str(tmp_path / "rows.tar")}, "resamples": 0}))
    found = run_suite(str(model), open_suite(str(model), str(tmp_path / "s.yaml"), [], tmp_path / "o"), device="cpu")
    assert found.values["v/retrieval/text_to_image/num_candidates"] == 6
    assert found.values["v/retrieval/text_to_image/num_queries"] == 18
    assert any("18 samples have 6 different image values" in note for note in found.notes)
    embedder = load(model, device="cpu")
    images, texts = embedder.embed(images=few), embedder.embed(texts=[row["txt"] for row in rows])
    ranks = ((texts @ images.T).argsort(1, descending=True) == torch.arange(18)[:, None] // 3).float().argmax(1)
    assert found.values["v/retrieval/text_to_image/recall_at_1"] == pytest.approx((ranks == 0).double().mean().item())
    for row in rows:
        row["__key__"] = row["__key__"][-1]
    write_shard(tmp_path / "rows.tar", rows[:3])
    write_shard(tmp_path / "more.tar", rows[3:6])
    (tmp_path / "qrels").write_text("a 0 b 1\n".replace("a", "0").replace("b", "1"))
    task = {"retrieval": {"r": {"query": "text", "candidate": "image", "relevance": str(tmp_path / "qrels")}}}
    shards = [str(tmp_path / name) for name in ("rows.tar", "more.tar")]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"splits": {"v": shards}, "resamples": 0, **task}))
    with pytest.raises(UserError, match="2 samples have the key '0': give each its own"):
        run_suite(str(model), open_suite(str(model), str(tmp_path / "s.yaml"), [], tmp_path / "o"), device="cpu")


def test_relevance_that_is_none(run, suite_file, tmp_path):
    (tmp_path / "relevance.txt").write_text("a b c\n")
    with pytest.raises(UserError, match="relevance.txt, line 1: 'a b c' is not"):
        run_suite(str(run), open_suite(str(run), str(suite_file), [], None), device="cpu")
    (tmp_path / "relevance.txt").write_text("a 0 b 1\n")
    with pytest.raises(UserError, match="no sample has the key 'a'"):
        run_suite(str(run), open_suite(str(run), str(suite_file), [], None), device="cpu")


def test_a_folder_whose_files_have_changed_is_embedded_again(model, tmp_path):
    """By texts of the same lengths, which leave the folder's own time, its names and its sizes."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"number {number}")
    opened = load(str(model), device="cpu")
    before = table_folder("m", opened.dataset(str(folder)))
    assert table_folder("m", opened.dataset(str(folder))) == before
    (folder / "2.txt").write_text("number 7")
    assert table_folder("m", opened.dataset(str(folder))) != before
