"""Indexing, reading and refusing tars; samples with and without all their members."""

import io
import multiprocessing
import os
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from mmcontrast.data import ShardDataset, all_batches, expand_shards, files, index_shard, write_corpus, write_shard
from mmcontrast.data.verify import verify_shards
from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality, TextModality
from tests.data.samples import png

MODALITIES = {"image": ImageModality(8), "text": TextModality(context_length=8)}


@pytest.fixture
def shard(tmp_path):
    """Four samples; 1 lacks its picture, 2 its text."""
    samples = [
        {"__key__": f"s{k}", "png": png(k), "txt": f"number {k}", "json": {"sample_id": 10 + k, "group_id": k // 2}}
        for k in range(4)
    ]
    del samples[1]["png"], samples[2]["txt"]
    write_shard(tmp_path / "a.tar", samples)
    return tmp_path / "a.tar"


def test_the_index_reads_what_webdataset_reads(corpus):
    for path in expand_shards(str(corpus / "*.tar")):
        index = index_shard(path)
        for row, sample in enumerate(webdataset.WebDataset(str(path), shardshuffle=False)):
            assert index.keys[row] == sample["__key__"]
            members = {name: data for name, data in sample.items() if not name.startswith("__")}
            assert index.read(row, index.extensions) == members


def test_long_names_and_folders(tmp_path):
    names = ["folder/" + "n" * 180 + ".txt", "./plain.seg.png", "folder/" + "é" * 60 + ".txt"]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "t.tar", "w", format=format) as tar:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = 3
                tar.addfile(entry, io.BytesIO(b"abc"))
        index = index_shard(tmp_path / "t.tar")
        assert tuple(index.keys) == ("folder/" + "n" * 180, "plain", "folder/" + "é" * 60)
        assert index.extensions == ("seg.png", "txt")


def test_absent_members_are_absent_fields(shard):
    dataset = ShardDataset(str(shard), MODALITIES, {})
    (batch,) = all_batches(dataset, 4)
    assert batch.ids["image"].tolist() == [0, -1, 1, 1] and batch.ids["text"].tolist() == [0, 0, -1, 1]
    assert len(batch.values["image"]) == 3 and batch.sample_ids.tolist() == [10, 11, 12, 13]
    lonely = dataset.collate([dataset[1]])
    assert not lonely.present["image"].any() and len(lonely.values["image"]) == 1  # a blank stands in


def test_a_file_that_leaves_the_cache_while_it_is_read(tmp_path, monkeypatch):
    """As by another thread that opens many."""
    (tmp_path / "a").write_bytes(b"0123456789")
    file, pread = files.open_file(str(tmp_path / "a")), os.pread

    def read(number, count, start):
        files._open_descriptor.cache_clear()
        return pread(number, count, start)

    monkeypatch.setattr(files.os, "pread", read)
    assert file.read(2, 5) == b"234"


def test_a_truncated_tar_is_refused(shard):
    data = shard.read_bytes()
    content = len(data.rstrip(b"\0"))  # then come the last block's padding and the end mark
    for cut in (0, 100, 512, 5000, content - 200, content, -(-content // 512) * 512, -(-content // 512) * 512 + 512):
        shard.write_bytes(data[:cut])
        with pytest.raises(UserError, match="not a whole tar"):
            index_shard(shard)


def test_overwritten_and_scattered_tars_are_refused(shard, tmp_path):
    data = bytearray(shard.read_bytes())
    data[600:5000] = b"x" * 4400
    shard.write_bytes(data)
    with pytest.raises(UserError, match="not a whole tar"):
        index_shard(shard)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in ("a.txt", "b.txt", "a.png"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match="'a' are not adjacent"):
        index_shard(tmp_path / "b.tar")


def test_missing_shards_and_fields_are_named(shard):
    with pytest.raises(UserError, match=r"no shard at .*nowhere-1\.tar"):
        expand_shards(str(shard.parent / "nowhere-{1..3}.tar"))
    with pytest.raises(UserError, match=r"field 'text': no sample .* has a member .caption"):
        ShardDataset(str(shard), MODALITIES, {"text": ["caption"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"png": b"not a picture"}, r"sample 'bad', member .png: not a picture"),
        ({"png": png()[:45]}, "member .png: not a picture"),
        ({"png": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, "member .png: not a picture"),
        ({"txt": b"\xff\xfe"}, "member .txt: not UTF-8"),
        ({"txt": b"  "}, "member .txt: an empty text"),
        ({"json": b"{"}, "member .json"),
        ({"json": b'{"group_id": -4}'}, "group_id -4 is negative"),
    ],
)
def test_a_bad_sample_is_one_clear_error(tmp_path, change, message):
    good = {"__key__": "good", "png": png(), "txt": "fine"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for sample in (good, {**good, "__key__": "bad", **change}):
            for extension in ("png", "txt", "json"):
                if extension in sample:
                    data = sample[extension].encode() if isinstance(sample[extension], str) else sample[extension]
                    entry = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=message):
            list(all_batches(ShardDataset(str(tmp_path / "a.tar"), MODALITIES, {}), 2, num_workers))


def test_a_huge_picture_is_refused_by_its_header():
    modality = ImageModality(8, max_pixels=1000)
    with pytest.raises(Exception, match="1600 pixels|40×40"):
        modality.decode(png(size=(40, 40)))


def test_augmentation_is_a_function_of_seed_epoch_and_sample(shard):
    dataset = ShardDataset(str(shard), {"image": ImageModality(4)}, {}, seed=5, training=True)
    first, again, later = dataset[(0, 0)], dataset[(0, 0)], dataset[(1, 0)]
    assert torch.equal(first.values["image"], again.values["image"])
    assert first.sample_id == later.sample_id == 10


def test_a_half_written_shard_never_has_its_name(tmp_path):
    with pytest.raises(AttributeError, match="encode"):  # webdataset, on the second sample
        write_shard(tmp_path / "a.tar", [{"__key__": "a", "txt": "fine"}, {"__key__": "b", "txt": object()}])
    assert not (tmp_path / "a.tar").exists()


def test_a_folder_of_files_is_read_like_a_shard(tmp_path):
    """One sample in a folder within; a capital extension, a file of no sample, names that sorting would mix."""
    for name, data in {
        "a.PNG": png(3), "a.txt": b"first", "a.json": b'{"group_id": 5}', "a.b/x.txt": b"deep", "README": b"no sample",
        "a!.txt": b"odd",
    }.items():  # fmt: skip
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
    dataset = ShardDataset(str(tmp_path / "files"), MODALITIES, {})
    (batch,) = all_batches(dataset, 8)
    texts = {
        entry["key"]: shard.read(row, ["txt"])["txt"] for shard in dataset.shards for row, entry in enumerate(batch.metadata)
    }
    assert texts == {"a": b"first", "a!": b"odd", "a.b/x": b"deep"}
    here = [entry["key"] for entry in batch.metadata].index("a")
    assert batch.present["image"].tolist() == [k == here for k in range(3)] and batch.group_ids[here] == 5
    report = verify_shards(str(tmp_path / "files"), workers=1, progress=False)
    assert (report["samples"], report["members"], report["faults"]) == (3, 5, [])
    before = dataset.digest
    (tmp_path / "files" / "a.txt").write_bytes(b"another first")
    assert ShardDataset(str(tmp_path / "files"), MODALITIES, {}).digest != before


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_a_long_name_of_a_folder_or_link_is_not_the_next_files(tmp_path, format, kind):
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        other = tarfile.TarInfo("é" + "n" * 120 + ".png")
        other.type, other.linkname = kind, "é" + "m" * 120
        tar.addfile(other)
        for name in ("a.txt", "b.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    index = index_shard(tmp_path / "x.tar")
    assert tuple(index.keys) == ("a", "b") and index.extensions == ("txt",)


def test_names_that_are_no_keys_and_extensions_are_refused(tmp_path):
    def tar(names):
        with tarfile.open(tmp_path / "x.tar", "w") as file:
            for name in names:
                file.addfile(tarfile.TarInfo(name))
        return index_shard(tmp_path / "x.tar")

    with pytest.raises(UserError, match="sample 'a' has two members of one name"):
        tar(["a.txt", "a.png", "a.txt", "b.txt"])
    with pytest.raises(UserError, match=r"2000 different extensions, as \.e1999; what follows the first dot"):
        tar([f"{k:05d}_0.e{k}" for k in range(2000)])
    with pytest.raises(UserError, match="braces of .* do not match"):
        expand_shards("train-{0..3.tar")
    for name in ("a/b/2.tar", "a/1.tar", "0.tar"):
        (tmp_path / "deep" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "deep" / name).touch()
    assert [name.removeprefix(f"{tmp_path}/deep/") for name in expand_shards(f"{tmp_path}/deep/**/*.tar")] == [
        "0.tar", "a/1.tar", "a/b/2.tar"
    ]  # fmt: skip


def test_sixteen_bits_of_grey_are_scaled():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    target = io.BytesIO()
    Image.fromarray(ramp).save(target, "PNG")
    picture = ImageModality(8, channels=1).decode(target.getvalue())
    assert picture.shape == (1, 64, 64) and abs(picture.float().mean() - 127.5) < 1 and picture.max() == 255


def test_an_overwritten_corpus_leaves_nothing_of_the_last(tmp_path, monkeypatch):
    forks = multiprocessing.get_context("fork")  # tests/test_glyphs.py has new interpreters write
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: forks)
    for count, each in ((20, 5), (12, 10)):
        write_corpus(tmp_path, Numbers(count), samples_per_shard=each, workers=1)
    assert sum(map(len, map(index_shard, expand_shards(str(tmp_path / "train-*.tar"))))) == 12
    write_shard(tmp_path / "train-00009.tar", [{"__key__": "old", "txt": "x"}])
    (fault,) = verify_shards(str(tmp_path / "train-*.tar"), 1, progress=False)["faults"]
    assert "train-00009.tar is not named in the manifest.json beside it" in fault["error"]


class Numbers:
    def __init__(self, count):
        self.count = count

    def splits(self):
        return {"train": range(self.count)}

    def make_sample(self, split, item):
        return {"__key__": f"k{item:03d}", "txt": str(item)}


def test_many_samples_are_read_as_each_of_them(tmp_path):
    """Also where members are missing, empty, or far apart in the tar."""
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for row in range(40):
            sample = {
                "__key__": f"{row:04d}",
                "a.bin": bytes([row]) * (row % 7),
                "b.bin": bytes(row * 9000),
                "c.txt": f"text {row}",
            }
            if row % 3 == 0:
                del sample["b.bin"]
            if row % 5 == 0:
                del sample["a.bin"], sample["c.txt"]
                sample["d.bin"] = b"alone"
            writer.write(sample)
    shard = index_shard(path)
    rows = np.array([3, 5, 0, 15, 39, 38, 38, 20])
    for names in ([*shard.extensions], ["a.bin", "c.txt"], ["c.txt"], ["b.bin"]):
        assert list(shard.read_many(rows, names)) == [shard.read(row, names) for row in rows.tolist()]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="has changed since it was indexed"):
        list(shard.read_many(rows, ["a.bin", "c.txt"]))
