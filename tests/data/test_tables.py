"""Parquet, CSV and Hugging Face datasets as shards: the same samples as a tar of them, wherever their pictures are."""

import csv
import io
import json
import pickle
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from mmcontrast.data import SampleOrder, ShardDataset, all_batches, open_shards, training_batches, write_shard
from mmcontrast.data.inspect import inspect_shards
from mmcontrast.data.verify import verify_shards
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, ImageModality, TextModality, VectorModality
from tests.command import call_on_ranks, train

COUNT = 30
OPENERS = 8
MODALITIES = {"image": ImageModality(8), "text": TextModality(context_length=8), "audio": AudioModality(seconds=0.05, hop=320)}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def picture(k):
    target = io.BytesIO()
    Image.new("RGB", (8, 8), (8 * k, 0, 255 - 8 * k)).save(target, "PNG")
    return target.getvalue()


def sound(k):
    target = io.BytesIO()
    soundfile.write(target, np.arange(100 * k, 100 * k + 800, dtype=np.int16), 16_000, format="FLAC")
    return target.getvalue()


def columns():
    """Sample 3 has no picture, 5 no text."""
    return {
        "key": [f"k{k:02d}" for k in range(COUNT)],
        "image": [None if k == 3 else picture(k) for k in range(COUNT)],
        "text": [None if k == 5 else f"number {k}" for k in range(COUNT)],
        "audio": [sound(k) for k in range(COUNT)],
        "sample_id": list(range(100, 100 + COUNT)),
        "group_id": [k // 2 for k in range(COUNT)],
        "label": ["even" if k % 2 == 0 else "odd" for k in range(COUNT)],
    }


def as_tar(folder):
    samples = []
    for row in map(dict, zip(*([(name, value) for value in values] for name, values in columns().items()), strict=True)):
        about = {name: row[name] for name in ("sample_id", "group_id", "label")}
        sample = {"__key__": row["key"], "png": row["image"], "txt": row["text"], "flac": row["audio"], "json": about}
        samples.append({name: value for name, value in sample.items() if value is not None})
    write_shard(folder / "x.tar", samples)
    return str(folder / "x.tar")


def as_parquet(folder):
    pq.write_table(pa.table(columns()), folder / "x.parquet", row_group_size=7)
    return str(folder / "x.parquet")


def as_csv(folder):
    """With paths; commas, quotes and new lines where there may be some."""
    (folder / "files").mkdir()
    with (folder / "x.csv").open("w", newline="") as file:
        names = ["key", "image", "text", "audio", "sample_id", "group_id", "label"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in zip(*columns().values(), strict=True):
            row = dict(zip(columns(), row, strict=True))
            for name, ending in (("image", "png"), ("audio", "flac")):
                if row[name]:
                    path = folder / "files" / f"{row['key']}.{ending}"
                    path.write_bytes(row[name])
                    row[name] = f"files/{path.name}" if name == "image" else str(path)
            writer.writerow(row)
    return str(folder / "x.csv")


def as_dataset(folder):
    features = {name: datasets.Value("string") for name in ("key", "text", "label")}
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}  # as datasets.Audio is
    features |= {"image": datasets.Image(), "audio": stored}
    features |= {name: datasets.Value("int64") for name in ("sample_id", "group_id")}
    made = columns() | {"audio": [{"bytes": data, "path": None} for data in columns()["audio"]]}
    made["image"] = [data and {"bytes": data, "path": None} for data in made["image"]]
    dataset = datasets.Dataset.from_dict(made, features=datasets.Features({name: features[name] for name in made}))
    dataset.save_to_disk(str(folder / "x"), num_shards=3)
    return str(folder / "x")


@pytest.mark.parametrize("make", [as_parquet, as_csv, as_dataset])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_a_tar(tmp_path, make, num_workers):
    """Pixels, tokens, sounds, ids and metadata, in evaluation and in the training order of forked workers."""

    def batches(shards):
        dataset = ShardDataset(shards, MODALITIES, {}, seed=2, training=True)
        order = SampleOrder(tuple(map(len, dataset.shards)), 6, 2, 2, 4, 10, "")
        train = training_batches(dataset, order, range(7), rank=0, world_size=1, num_workers=num_workers, pin_memory=False)
        return [*train, *all_batches(ShardDataset(shards, MODALITIES, {}), 8, num_workers)]

    for ours, tar in zip(batches(make(tmp_path)), batches(as_tar(tmp_path)), strict=True):
        for field in MODALITIES:
            assert torch.equal(ours.values[field], tar.values[field]) and torch.equal(ours.ids[field], tar.ids[field])
        assert torch.equal(ours.sample_ids, tar.sample_ids)
        for one, other in zip(ours.metadata, tar.metadata, strict=True):
            assert {name: one[name] for name in other} == other


def test_lists_of_captions_are_as_long_as_they_are_read(tmp_path):
    captions = [["a", "bcd"], ["ef"], [], None, [None, "g"]]
    pq.write_table(pa.table({"text": pa.array(captions, pa.list_(pa.string()))}), tmp_path / "t.parquet")
    (shard,) = open_shards(str(tmp_path / "t.parquet"))
    read = [shard.read(row, ["text"]).get("text") for row in range(5)]
    assert read[0] == b"a\nbcd"
    assert shard.sizes_of("text").tolist()[:2] == [5, 2] and shard.sizes_of("text")[3] == -1


def test_a_table_is_copied_once_and_again_when_it_changes(tmp_path):
    name = as_parquet(tmp_path)
    (first,) = open_shards(name)
    (copy,) = (tmp_path / "cache" / "tables").glob("*.arrow")
    before = copy.stat().st_ino
    (again,) = open_shards(name)
    assert again.digest == first.digest and copy.stat().st_ino == before
    assert pickle.loads(pickle.dumps(again)).read(4, ["text"]) == {"text": b"number 4"}
    pq.write_table(pa.table({"text": ["one", "two"]}), name)
    (other,) = open_shards(name)
    assert len(other) == 2 and other.digest != first.digest
    assert [other.keys[k] for k in range(2)] == ["x-0", "x-1"]


def test_captions_in_lists_and_vectors_in_lists(tmp_path):
    table = {"caption": [["one dog", "a dog"], ["a cat"]], "npy": [[1.0, 2.0], [3.0, 4.0]], "seconds": [1.5, None]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    dataset = ShardDataset(
        str(tmp_path / "x.parquet"),
        {
            "vector": VectorModality(2),
            "first": TextModality(context_length=8, captions=0),
            "second": TextModality(context_length=8, captions=1),
        },
        {},
    )
    (batch,) = all_batches(dataset, 2)
    assert batch.values["vector"].tolist() == [[1, 2], [3, 4]]
    assert batch.present["first"].tolist() == [True, True] and batch.present["second"].tolist() == [True, False]
    assert torch.equal(batch.values["second"][0], TextModality(context_length=8).tokens("a dog"))
    assert batch.metadata[0]["seconds"] == 1.5 and "seconds" not in batch.metadata[1]


def test_paths_stay_in_their_folder(tmp_path):
    """Only names under a table's own folder, or the one that is named, are opened; a link there may lead anywhere, as DVC's."""
    inner, other = tmp_path / "inner", tmp_path / "pictures"
    for folder in (inner, other):
        folder.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(1))
    (other / "fine.png").write_bytes(picture(2))
    (inner / "link.png").symlink_to(tmp_path / "secret.png")
    (inner / "x.csv").write_text("image,text\nlink.png,some words\n")
    assert len(list(all_batches(ShardDataset(str(inner / "x.csv"), {"image": MODALITIES["image"]}, {}), 1))) == 1
    for path in ("../secret.png", str(tmp_path / "secret.png"), str(other / "fine.png")):
        (inner / "x.csv").write_text(f"image,text\n{path},some words\n")
        with pytest.raises(UserError, match=r"is not in .*set `files` of this source"):
            list(all_batches(ShardDataset(str(inner / "x.csv"), MODALITIES, {"audio": ["text"]}), 1))
    dataset = ShardDataset(str(inner / "x.csv"), {"image": MODALITIES["image"]}, {}, files=str(other))
    assert len(list(all_batches(dataset, 1))) == 1
    (inner / "x.csv").write_text("image,text\nnowhere.png,some words\n")
    with pytest.raises(UserError, match=r"nowhere\.png cannot be read: No such file"):
        list(all_batches(ShardDataset(str(inner / "x.csv"), {"image": MODALITIES["image"]}, {}), 1))
    (inner / "x.csv").write_text("image,text\nhttps://example.org/a.png,some words\n")
    with pytest.raises(UserError, match="a URL: files of a table are read from a disk. Download them first"):
        list(all_batches(ShardDataset(str(inner / "x.csv"), {"image": MODALITIES["image"]}, {}), 1))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.parquet", b"not a table", "x.parquet cannot be read as a table"),
        ("x.csv", b"a,b\n1,2\n1\n", "x.csv cannot be read as a table"),
        ("x.csv", b"", "x.csv cannot be read as a table"),
        ("x/state.json", b"{}", "x cannot be read as a table"),
        ("x/state.json", b'{"_data_files": [{"filename": "../y.arrow"}], "_fingerprint": ""}', "cannot be read as a table"),
        ("x/state.json", b'{"_indices_files": [1]}', "save it after `flatten_indices"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, name, data, message):
    (tmp_path / "x").mkdir()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_shards(str(tmp_path / name.removesuffix("/state.json")))


def test_verify_and_inspect_know_tables(tmp_path):
    report = verify_shards(as_parquet(tmp_path), workers=1, progress=False)
    assert (report["samples"], report["faults"]) == (COUNT, [])
    broken = columns()
    broken["image"][7], broken["text"][9], broken["group_id"][11] = b"no picture", "  ", -4
    pq.write_table(pa.table(broken), tmp_path / "y.parquet")
    faults = verify_shards(str(tmp_path / "y.parquet"), workers=1, progress=False)["faults"]
    assert [(fault["sample"], fault["member"]) for fault in faults] == [("k07", "image"), ("k09", "text"), ("k11", "json")]
    parts = list(inspect_shards([as_parquet(tmp_path)], tmp_path / "page.html"))
    assert parts[0].startswith(f"1 shards, {COUNT} samples")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") >= 20 and page.count("<audio") == 24 and "number 0" in page


def test_a_training_run_of_a_table(config_file, corpus, tmp_path):
    """The corpus as Parquet trains to the same loss as its tars."""
    losses = []
    rows = [
        {"key": shard.keys[k], **shard.read(k, ["png", "txt", "flac"]), **json.loads(shard.read(k, ["json"])["json"])}
        for shard in open_shards(str(corpus / "train-*.tar"))
        for k in range(len(shard))
    ]
    for row in rows:
        row["txt"] = row["txt"].decode()
    for k in range(3):
        pq.write_table(pa.Table.from_pylist(rows[32 * k : 32 * k + 32]), tmp_path / f"train-{k}.parquet")
    for name, shards in (("tars", str(corpus / "train-*.tar")), ("table", str(tmp_path / "train-*.parquet"))):
        arguments = [f"run.name={name}", f"data.train={shards}", "train.steps=3"]
        done = train(config_file, *arguments)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def write_digest(rank, name):
    """Open a table once its other openers have started too, and write its digest beside it."""
    folder = Path(name).parent
    (folder / f"started-{rank}").touch()
    while len(list(folder.glob("started-*"))) < OPENERS:
        time.sleep(0.001)
    (folder / f"digest-{rank}").write_text(open_shards(name)[0].digest)


def test_many_processes_open_a_table_at_once(tmp_path):
    name = as_parquet(tmp_path)
    call_on_ranks(f"{__name__}:write_digest", OPENERS, str(name))
    digests = {file.read_text() for file in tmp_path.glob("digest-*")}
    assert len(list(tmp_path.glob("digest-*"))) == OPENERS and len(digests) == 1


def test_a_torn_copy_is_made_again(tmp_path):
    name = as_parquet(tmp_path)
    (first,) = open_shards(name)
    for suffix in ("arrow", "digest"):
        (kept,) = (tmp_path / "cache" / "tables").glob(f"*.{suffix}")
        kept.unlink() if suffix == "digest" else kept.write_bytes(b"")
        (again,) = open_shards(name)
        assert again.digest == first.digest and again.read(4, ["text"]) == {"text": b"number 4"}


@pytest.mark.parametrize("end", [2 * 10**9, -5, 3000])
def test_offsets_that_point_astray_are_refused(tmp_path, end):
    name = as_dataset(tmp_path)
    file = sorted((tmp_path / "x").glob("*.arrow"))[0]
    data, texts = file.read_bytes(), "".join(f"number {k}" for k in range(10) if k != 5).encode()
    place = data.index(np.cumsum([0, *(0 if k == 5 else 8 for k in range(10))], dtype=np.int32).tobytes())
    assert texts in data
    file.write_bytes(data[: place + 40] + np.int32(end).tobytes() + data[place + 44 :])
    with pytest.raises(UserError, match="cannot be read as a table"):
        open_shards(name)


def test_keys_of_every_kind_of_text(tmp_path):
    (tmp_path / "x.csv").write_text("key,text\n001,one\n002,two\n")
    large = pa.array(["a", "b"], pa.large_string())
    pq.write_table(pa.table({"key": large, "text": large}), tmp_path / "y.parquet")
    assert [*open_shards(str(tmp_path / "x.csv"))[0].keys] == ["001", "002"]
    assert [*open_shards(str(tmp_path / "y.parquet"))[0].keys] == ["a", "b"]


def test_odd_values_are_absent_or_bad_samples_not_tracebacks(tmp_path):
    rows = {"text": [[None, "a dog"], [], None, ["fine"]], "image": ["a\0b", "loop", None, "nowhere.png"]}
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    text = ShardDataset(str(tmp_path / "x.parquet"), {"text": MODALITIES["text"]}, {})
    (batch,) = all_batches(text, 4)
    assert batch.present["text"].tolist() == [True, False, False, True]
    image = ShardDataset(str(tmp_path / "x.parquet"), {"image": MODALITIES["image"]}, {})
    assert [bool(image[k].error) for k in range(4)] == [True, True, False, True]
    assert not any(image[k].lost for k in range(4))
    assert [*inspect_shards([str(tmp_path / "x.parquet")], tmp_path / "page.html")]
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="two columns have one name"):
        open_shards(str(tmp_path / "twice.parquet"))


@pytest.mark.parametrize("make", [as_parquet, as_csv, as_dataset])
def test_sizes_are_those_of_a_tar_and_measured_once(tmp_path, make):
    (table,), (tar,) = open_shards(make(tmp_path)), open_shards(as_tar(tmp_path))
    for column, member in (("image", "png"), ("text", "txt"), ("audio", "flac")):
        sizes = table.sizes_of(column)
        assert sizes.tolist() == tar.sizes_of(member).tolist() == [table.size(row, column) for row in range(COUNT)]
        assert table.sizes_of(column) is sizes
