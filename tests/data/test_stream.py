"""The sequential mode: all samples come, from shards that break, from servers that know no ranges; nothing harmful does."""

import gzip
import io
import logging
import pickle
import tarfile
import tracemalloc
from collections import Counter

import pytest

from mmcontrast.data import StreamDataset, StreamOrder, files, stream, training_batches, write_shard
from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality, TextModality
from tests.data.samples import Harm, png
from tests.data.web_server import serving

MODALITIES = {"image": ImageModality(8), "text": TextModality(context_length=8)}


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(files, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(stream, "BUFFER", 20)


@pytest.fixture
def folder(tmp_path):
    for shard in range(3):
        samples = [
            {"__key__": f"k{shard}{k}", "png": png(k), "txt": f"number {k}", "json": {"sample_id": 10 * shard + k}}
            for k in range(10)
        ]
        write_shard(tmp_path / f"{shard}.tar", samples)
    return tmp_path


def batches(shards, steps, num_workers=0, rank=0, world_size=1, batch_size=8, start=0):
    dataset = StreamDataset(shards, MODALITIES, {}, seed=3)
    order = StreamOrder(batch_size, 3)
    steps = range(start, start + steps)
    common = {"num_workers": num_workers, "pin_memory": False}
    return list(training_batches(dataset, order, steps, rank=rank, world_size=world_size, **common))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_samples_come_in_the_end(folder, num_workers):
    found = batches(str(folder / "*.tar"), 40, num_workers)
    assert len(found) == 40 and all(len(batch) == 8 for batch in found)
    seen = Counter(i for batch in found for i in batch.sample_ids.tolist())
    assert set(seen) == {10 * shard + k for shard in range(3) for k in range(10)}
    first = [batch.sample_ids.tolist() for batch in found]
    assert first == [batch.sample_ids.tolist() for batch in batches(str(folder / "*.tar"), 40, num_workers)]
    for other in ({"start": 40}, {"rank": 1, "world_size": 2}):
        assert [batch.sample_ids.tolist() for batch in batches(str(folder / "*.tar"), 5, num_workers, **other)] != first[:5]
    assert {len(batch) for batch in batches(str(folder / "*.tar"), 3, num_workers, world_size=2)} == {4}
    with pytest.raises(UserError, match="3 ranks cannot share train.batch_size=8"):
        batches(str(folder / "*.tar"), 1, world_size=3)


@pytest.mark.parametrize("fault", ["", "503", "drop", "truncate"])
def test_from_a_server_without_ranges(folder, fault, caplog):
    with serving(folder) as server:
        server.with_ranges = False
        server.plan = [fault, fault, ""] * 10
        found = batches(f"{server.url}/{{0..2}}.tar", 30)
    assert {i for batch in found for i in batch.sample_ids.tolist()} == {10 * s + k for s in range(3) for k in range(10)}
    assert not fault or server.seen[fault] >= 2
    assert ("breaks off" in caplog.text) == (fault in ("drop", "truncate"))


def test_bad_samples_are_left_out_and_reported(folder):
    write_shard(folder / "3.tar", [{"__key__": "bad", "png": b"no picture", "txt": "x"}, {"__key__": "good", "txt": "fine"}])
    found = batches(str(folder / "*.tar"), 30)
    errors = [bad["error"] for batch in found for bad in batch.replaced]
    assert len(errors) >= 2 and all("3.tar" in e and "sample 'bad', member .png: not a picture" in e for e in errors)
    keys = {entry["key"] for batch in found for entry in batch.metadata}
    assert "good" in keys and "bad" not in keys


def test_a_truncated_shard_is_told_of(folder, caplog):
    data = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(data[: len(data) * 2 // 3])
    (folder / "2.tar").write_bytes(data[: data.rindex(b"ustar") - 257 + 1024])  # at a member's end, without the mark
    batches(str(folder / "*.tar"), 20)
    for name in ("1.tar", "2.tar"):
        assert any(name in record.message and "breaks off" in record.message for record in caplog.records)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_without_anything_end_the_run(folder, num_workers, caplog):
    for shard in range(3):
        (folder / f"{shard}.tar").write_bytes(gzip.compress((folder / f"{shard}.tar").read_bytes()))
    with caplog.at_level(logging.CRITICAL), pytest.raises(UserError, match="no member came of 8 shards in turn"):
        batches(str(folder / "*.tar"), 1, num_workers)


def test_nothing_of_a_hostile_shard_does_harm(tmp_path, monkeypatch):
    """Pickles stay closed, names are no paths, links are left out, large members are not read, shells are not opened."""
    monkeypatch.setattr(stream, "MAX_MEMBER_BYTES", 1000)
    (tmp_path / "inner").mkdir()
    with tarfile.open(tmp_path / "inner" / "x.tar", "w") as tar:
        harm = pickle.dumps(Harm(tmp_path / "harmed"))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        members = [("a.pkl", harm), ("a.pth", harm), ("a.txt", b"fine"), ("../c.txt", b"climbing"), ("d.txt", b"x" * 1001)]
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        tar.addfile(link)
    found = batches(str(tmp_path / "inner" / "x.tar"), 10)
    assert {entry["key"] for batch in found for entry in batch.metadata} == {"a", "../c"}
    assert any("member d.txt: 1001 bytes" in bad["error"] for batch in found for bad in batch.replaced)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inner", "x.tar"]
    with pytest.raises(UserError, match="no shard at"):
        batches(f"pipe:touch {tmp_path}/harmed", 1)


def test_samples_that_all_fail_end_the_run(tmp_path):
    write_shard(tmp_path / "x.tar", [{"__key__": f"k{k}", "png": b"no picture"} for k in range(5)])
    with pytest.raises(UserError, match="20 samples in turn could not be decoded; the last: .*not a picture"):
        batches(str(tmp_path / "x.tar"), 1)


def test_members_that_no_field_wants_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MAX_MEMBER_BYTES", 1000)
    write_shard(tmp_path / "x.tar", [{"__key__": f"k{k}", "txt": "fine", "mp4": b"x" * 2000} for k in range(5)])
    assert not any(batch.replaced for batch in batches(str(tmp_path / "x.tar"), 5))


def test_a_name_of_gigabytes_is_not_read(tmp_path, caplog):
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 2**30
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**30 + 2048)
    tracemalloc.start()
    with pytest.raises(UserError, match="no member came of"):
        batches(str(tmp_path / "x.tar"), 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20 and "a name of 1073741824 bytes" in caplog.text
