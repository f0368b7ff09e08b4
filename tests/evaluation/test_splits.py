"""Splits with columns and files of their own; splits in which there is nothing to evaluate."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from mmcontrast.cli import main
from mmcontrast.config import load_config, load_suite
from mmcontrast.data import ShardOptions, open_dataset, write_shard
from mmcontrast.embedder import load
from mmcontrast.embedding_job import embed_shards
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, EvaluationOptions, embed_dataset, evaluate, open_splits
from mmcontrast.evaluation.classification_tasks import LabelledRows
from mmcontrast.evaluation.labels import MatchedLabels
from mmcontrast.modalities import ImageModality, TextModality
from mmcontrast.run_folder import prepare_folder
from mmcontrast.runs import make_run_context
from mmcontrast.suites import open_suite, run_suite
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from tests.conftest import write_config
from tests.evaluation.text_model import WORDS, text_model


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Pictures, and tables that name them in different ways: (folder, the names of the words by picture)."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "pictures").mkdir()
    for number, word in enumerate(WORDS):
        noise = random.Random(number)
        Image.new("L", (24, 24)).save(folder / "pictures" / f"{word}.png")
        pixels = bytes(noise.randrange(256) for _ in range(24 * 24))
        Image.frombytes("L", (24, 24), pixels).save(folder / "pictures" / f"{word}.png")
    absolute = [str(folder / "pictures" / f"{word}.png") for word in WORDS]
    (folder / "elsewhere").mkdir()
    pd.DataFrame({"photo": absolute, "words": WORDS}).to_csv(folder / "elsewhere" / "absolute.csv", index=False)
    relative = [f"{word}.png" for word in WORDS]
    pd.DataFrame({"picture": relative, "title": WORDS}).to_parquet(folder / "elsewhere" / "relative.parquet")
    pd.DataFrame({"picture": [f"pictures/{name}" for name in relative], "title": WORDS}).to_csv(folder / "own.csv", index=False)
    samples = [{"__key__": w, "png": (folder / "pictures" / f"{w}.png").read_bytes(), "txt": w} for w in WORDS]
    write_shard(folder / "usual.tar", samples)
    return folder


@pytest.fixture(scope="module")
def run(tables, tmp_path_factory):
    """A run of a table's own column names, as if trained on `own.csv`."""
    folder = tmp_path_factory.mktemp("run")
    path = write_config(tables, folder)
    tree = yaml.safe_load(path.read_text())
    del tree["fields"]["audio"], tree["towers"]["audio"]
    tree["fields"]["image"]["keys"], tree["fields"]["text"]["keys"] = ["picture"], ["title"]
    tree["data"]["train"] = str(tables / "own.csv")
    tree["train"]["batch_size"] = 4
    given = {"keys": {"image": ["photo"], "text": ["words"]}, "files": str(tables / "pictures")}
    tree["evaluation"] = {
        "splits": {
            "own": str(tables / "own.csv"),
            "absolute": {"shards": str(tables / "elsewhere" / "absolute.csv"), **given},
            "relative": {"shards": str(tables / "elsewhere" / "relative.parquet"), "files": str(tables / "pictures")},
            "usual": str(tables / "usual.tar"),
        },
        "geometry": False,
        "resamples": 0,
    }
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    prepare_folder(config, overwrite=False)
    job = make_run_context(config)
    for weights in job.model.parameters():
        weights.data += 0.3 * torch.randn_like(weights)
    checkpoint.save(config.folder / "checkpoints", 6, Contents(job.model.state_dict(), {}, {}, config.to_yaml()))
    found = evaluate(job.model, job.eval_datasets, job.evaluation, "cpu")
    for split in ("absolute", "relative", "usual"):  # the same pictures and words
        assert torch.equal(found.tables[split].fields["image"], found.tables["own"].fields["image"]), split
        assert torch.equal(found.tables[split].fields["text"], found.tables["own"].fields["text"]), split
    return config.folder


def test_a_run_of_own_column_names_is_evaluated_on_other_tables(run, tables, tmp_path):
    """By a suite, and by `embed`; results say which columns and files it was."""
    splits = {
        "other": {
            "shards": str(tables / "elsewhere" / "absolute.csv"), "files": "/", "keys": {"image": ["photo"], "text": ["words"]},
        },
        "usual": {"shards": [str(tables / "usual.tar")]},
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"splits": splits, "resamples": 0, "geometry": False}))
    found = run_suite(str(run), open_suite(str(run), str(tmp_path / "suite.yaml"), [], tmp_path / "out"), device="cpu")
    assert torch.equal(found.tables["other"].fields["image"], found.tables["usual"].fields["image"])
    data = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    assert data["other"]["shards"] == splits["other"] and data["usual"]["shards"] == splits["usual"]["shards"]
    assert embed_shards(str(run), ShardOptions(**splits["other"]), tmp_path / "table", device="cpu")
    assert torch.equal(EmbeddingTable.read(tmp_path / "table").fields["text"], found.tables["usual"].fields["text"])
    manifest = json.loads((tmp_path / "table" / "manifest.json").read_text())
    assert manifest["shards"] == splits["other"]
    assert len(load(run, device="cpu").dataset(manifest["shards"])) == len(WORDS)  # as the searcher opens it


def test_the_command_takes_columns_and_files(run, tables, tmp_path, monkeypatch, capsys):
    command = [
        "mmcontrast",
        "embed",
        str(run),
        str(tables / "elsewhere" / "absolute.csv"),
        str(tmp_path / "table"),
        "--device",
        "cpu",
    ]
    columns = ["--keys", "image=photo", "--keys", "text=words", "--files", str(tables / "pictures")]
    for more, code in ((columns, 0), ([*columns, "--keys", "image"], 2)):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    assert list(EmbeddingTable.read(tmp_path / "table").fields) == ["image", "text"]
    assert "--keys 'image' is not of the form FIELD=COLUMN, as text=caption" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"keys": {"image": ["foto"]}}, "keys of the field 'image': no sample has foto"),
        ({"keys": {"imago": ["photo"]}}, "keys of a field 'imago'; did you mean 'image'?"),
        ({"keys": {"image": ["photo"]}}, "is not in .*elsewhere: set `files`"),
        ({"keys": {"image": ["photo"]}, "files": "/nowhere"}, "is not in /nowhere: set `files`"),
    ],
)
def test_columns_and_files_that_are_not_there(run, tables, split, message):
    embedder, split = load(run, device="cpu"), {"shards": str(tables / "elsewhere" / "absolute.csv"), **split}
    with pytest.raises(UserError, match=message):
        embed_dataset(embedder.model, embedder.dataset(split), batch_size=6)


def keys_of(folder, keys, training=False):
    modalities = {"image": ImageModality(24), "text": TextModality(), "german": TextModality()}
    return open_dataset(str(folder), modalities, keys, training=training, partial=True).keys


def test_usual_extensions_stand_in_for_keys_that_mean_nothing_else(tables, tmp_path):
    """Never in training, never for another field's text, never for one of two fields that could both be meant."""
    assert keys_of(tables / "usual.tar", {"image": ["photo"], "german": ["de"]}) == {
        "image": ("png",),
        "text": ("txt", "caption", "text"),
    }
    assert keys_of(tables / "usual.tar", {"image": ["photo"], "text": ["en"], "german": ["de"]}) == {"image": ("png",)}
    assert keys_of(tables / "usual.tar", {"text": ["title"], "german": ["title"]})["german"] == ("txt",)  # both are one text
    assert set(keys_of(tables / "usual.tar", {"image": ["photo"]}, training=True)) == {"text", "german"}
    pd.DataFrame({"en": WORDS, "caption": WORDS}).to_csv(tmp_path / "t.csv", index=False)
    assert keys_of(tmp_path / "t.csv", {"text": ["en"], "german": ["de"]}) == {"text": ("en",), "german": ("caption",)}


def test_options_of_splits(tmp_path):
    def read(split):
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"splits": {"val": split}}))
        return load_suite(tmp_path / "suite.yaml").splits["val"]

    assert read("a.tar") == "a.tar" and read(["a.tar", "b.csv"]) == ["a.tar", "b.csv"]
    assert read({"shards": "a", "keys": {"text": ["b"]}}) == ShardOptions(shards="a", keys={"text": ["b"]})
    for split, message in (
        ({"shard": "a"}, "unknown key 'splits.val.shard'; did you mean 'shards'"),
        ({"shards": "a", "key": {}}, "unknown key 'splits.val.key'; did you mean 'keys'"),
        ({"shards": "a", "keys": {"text": "b"}}, "splits.val.keys.text: input should be a valid list"),
        ({"files": "a"}, "splits.val.shards: field required"),
    ):
        with pytest.raises(UserError, match=message):
            read(split)


def opened(table, embedder, **options):
    tree = {"splits": {"val": table if isinstance(table, dict) else str(table)}, "resamples": 0, "geometry": False} | options
    return open_splits(EvaluationOptions.model_validate(tree), embedder.model, embedder.dataset)


def evaluated(table, embedder, **options):
    full, datasets = opened(table, embedder, **options)
    return evaluate(embedder.model, datasets, full, "cpu")


def test_splits_with_nothing_to_evaluate(tmp_path):
    embedder = text_model("txt", "caption")
    for suffix, content in ((".csv", ""), (".csv", "txt,caption\n"), (".tsv", ""), (".tsv", "txt\tcaption\n")):
        (tmp_path / f"empty{suffix}").write_text(content)
        with pytest.raises(UserError, match=f"empty{suffix}"):
            opened(tmp_path / f"empty{suffix}", embedder)
    pd.DataFrame({"txt": []}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty.parquet"):
        opened(tmp_path / "empty.parquet", embedder)


def test_scoring_without_candidates(tmp_path):
    embedder = text_model("txt", "caption")
    for modality, own in zip(embedder.model.modalities.values(), ("txt", "caption"), strict=True):
        modality.extensions = (own,)
    table = tmp_path / "apart.csv"
    pd.DataFrame({"txt": ["red", "green", None, None], "caption": [None, None, "blue", "king"]}).to_csv(table, index=False)
    for scoring in (None, "csls", "inverted_softmax", "margin"):
        found = evaluated(table, embedder, scoring=scoring)
        assert not any("recall" in name for name in found.values), scoring
        assert "val/retrieval: no sample has both txt and caption: neither is retrieved by the other" in found.notes
        task = {"pairs": False, "scoring": scoring, "retrieval": {"t": {"query": "txt", "candidate": "caption"}}}
        with pytest.raises(
            UserError, match="val/retrieval/t: there is nothing to retrieve: 2 samples have txt, 2 have caption"
        ):
            evaluated(table, embedder, **task)
    languages = {"pairs": False, "languages": {"l": {"fields": ["txt", "caption"], "candidate": "caption"}}}
    with pytest.raises(UserError, match="val/languages/l: no sample has all of txt, caption, caption"):
        evaluated(table, embedder, **languages)
    for option in ({"scoring": "csls"}, {"whiten": True}):
        with pytest.raises(UserError, match=f"evaluation.{next(iter(option))}: it is of retrieval, and none is asked for"):
            opened(table, embedder, pairs=False, **option)


def test_text_fields_that_read_the_same_members_are_told_of(tmp_path, caplog):
    pd.DataFrame({"txt": WORDS, "named": WORDS}).to_csv(tmp_path / "t.csv", index=False)
    embedder = text_model("english", "french")
    opened(tmp_path / "t.csv", embedder)
    assert "english and french are all read from .txt or .caption or .text, and hold the same texts: set their" in caplog.text
    caplog.clear()
    opened({"shards": str(tmp_path / "t.csv"), "keys": {"french": ["named"]}}, embedder)
    assert "same texts" not in caplog.text


def test_the_same_fields_written_otherwise_are_one_side(tmp_path):
    """A sample is no candidate for itself, and `once` is refused."""
    embedder = text_model("txt", "caption")
    pd.DataFrame({"txt": WORDS, "group_id": [1, 1, 2, 2, 3, 3]}).to_csv(tmp_path / "t.csv", index=False)
    ways = [("txt", "txt"), ("txt", ["txt"]), (["txt", "caption"], ["caption", "txt"])]
    tasks = {str(number): {"query": query, "candidate": candidate} for number, (query, candidate) in enumerate(ways)}
    found = evaluated(tmp_path / "t.csv", embedder, pairs=False, retrieval=tasks).values
    alone, listed, both = (found[f"val/retrieval/{number}/recall_at_1"] for number in range(3))
    assert alone == listed < 1 and both < 1
    with pytest.raises(UserError, match="evaluation.retrieval.1: once is of groups"):
        opened(tmp_path / "t.csv", embedder, retrieval={"1": tasks["1"] | {"once": True}})


@pytest.mark.parametrize("grouped", [True, False])
def test_zero_shot_draws_groups(tmp_path, grouped):
    """Copies of a few texts are not independent: intervals are those of as many samples as there are groups."""
    texts = [word for word in WORDS for _ in range(20)]
    rows = pd.DataFrame({"txt": texts, "label": [k % 2 for k in range(6) for _ in range(20)]})
    if grouped:
        rows["group_id"] = [k for k in range(6) for _ in range(20)]
    rows.to_csv(tmp_path / "t.csv", index=False)
    classes = {"classes": {"0": ["a ship"], "1": ["a tree"]}, "label": "label", "field": "txt", "prompt_field": "txt"}
    probe = {"train": str(tmp_path / "t.csv"), "label": "label", "field": "txt", "kinds": ["knn"]}
    full, datasets = opened(
        tmp_path / "t.csv", text_model("txt"), pairs=False, zero_shot={"z": classes}, probes={"p": probe}, resamples=200
    )
    found = evaluate(text_model("txt").model, datasets, full, "cpu")
    low, high = found.intervals["val/zero_shot/z/top1"]
    assert 0 < found.values["val/zero_shot/z/top1"] < 1 and (high - low > 0.3) == grouped
    assert "val/probe/p/knn/top1" in found.intervals


def test_classes_that_are_groups_are_not_drawn():
    """As those of templates, whose samples of a class are one group."""
    numbers, matched = torch.tensor([0, 0, 1, 1]), MatchedLabels(torch.tensor([0, 0, 1, 1]), 0, Counter())
    for groups, drawn in (([5, 5, 9, 9], False), ([5, 6, 9, 9], True), ([5, 5, 5, 9], True)):
        rows = LabelledRows(torch.ones(4, 2), numbers, torch.tensor(groups), matched)
        assert (rows.clusters is not None) == drawn


def test_captions_of_a_split_that_is_not_there_are_refused(tmp_path):
    pd.DataFrame({"txt": WORDS}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(UserError, match="evaluation.captions: no split 'vall'; did you mean 'val'"):
        opened(tmp_path / "t.csv", text_model("txt"), captions={"vall": ["txt"]})


def test_relevant_pairs_without_their_field_are_told_of(tmp_path):
    embedder = text_model("txt", "caption")
    captions = ["a", None, "b", "c", "d", "e"]
    pd.DataFrame({"txt": WORDS, "named": captions, "key": WORDS}).to_csv(tmp_path / "t.csv", index=False)
    table = {"shards": str(tmp_path / "t.csv"), "keys": {"caption": ["named"]}}
    (tmp_path / "qrels.txt").write_text(f"{WORDS[0]} 0 {WORDS[1]} 1\n{WORDS[0]} 0 {WORDS[2]} 1\n{WORDS[3]} 0 {WORDS[1]} 0\n")
    task = {"query": "txt", "candidate": "caption", "relevance": str(tmp_path / "qrels.txt")}
    found = evaluated(table, embedder, pairs=False, retrieval={"r": task})
    assert found.values["val/retrieval/r/num_queries"] == 1
    assert any("val/retrieval/r: 1 of 2 relevant pairs in" in note and "no caption to be found" in note for note in found.notes)


def test_relevance_that_is_not_utf8_or_no_number(tmp_path):
    embedder = text_model("txt")
    pd.DataFrame({"txt": WORDS, "key": WORDS}).to_csv(tmp_path / "t.csv", index=False)
    task = {"query": "txt", "candidate": "txt", "relevance": str(tmp_path / "qrels.txt")}
    for content, message in (
        ("red 0 green 1\nred 0 caf\u00e9 1\n".encode("latin-1"), "qrels.txt, line 2: byte 0xe9 is not UTF-8: save the file as"),
        (b"red 0 green nan\n", "qrels.txt, line 1: 'red 0 green nan' is not"),
        (b"red 0 green 0\n", "there is nothing to retrieve: 6 samples have txt, .* a gain above 0 in"),
        (b"red 0 red 1\n", "there is nothing to retrieve"),
    ):
        Path(task["relevance"]).write_bytes(content)
        with pytest.raises(UserError, match=message):
            evaluated(tmp_path / "t.csv", embedder, pairs=False, retrieval={"r": task})
    Path(task["relevance"]).write_bytes("\ufeffred 0 green 1\r\n".encode())
    found = evaluated(tmp_path / "t.csv", embedder, pairs=False, retrieval={"r": task})
    assert found.values["val/retrieval/r/num_queries"] == 1
