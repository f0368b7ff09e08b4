"""Hostile shards get nothing: no code run, no file read or written, no shell, no link followed."""

import io
import os
import pickle
import tarfile
import tracemalloc

import pytest

from mmcontrast.data import ShardDataset, all_batches, index_shard
from mmcontrast.data.verify import verify_shards
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality
from tests.data.samples import Harm

TEXT = {"text": TextModality(context_length=8)}


def tar_of(path, members):
    """Write a tar of (name, bytes) or of ready TarInfos."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                tar.addfile(entry, io.BytesIO(member[1]))


def test_pickles_are_never_opened(tmp_path):
    harm = pickle.dumps(Harm(tmp_path / "harmed"))
    members = [(f"a.{extension}", harm) for extension in ("pkl", "pyd", "pickle", "pth", "pt", "npy")]
    tar_of(tmp_path / "x.tar", [*members, ("a.txt", b"text")])
    (batch,) = all_batches(ShardDataset(str(tmp_path / "x.tar"), TEXT, {}), 4)
    verify_shards(str(tmp_path / "x.tar"), workers=1, progress=False)
    assert len(batch) == 1 and not (tmp_path / "harmed").exists()


def test_names_are_no_paths(tmp_path):
    """Members that climb out, or begin at the root, are read from the shard; nothing is written anywhere."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    names = ["../secret.txt", f"{tmp_path}/secret.txt", "a/../../secret2.txt"]
    tar_of(tmp_path / "inner" / "x.tar", [(name, b"from the shard") for name in names])
    before = sorted(path.name for path in tmp_path.rglob("*"))
    index = index_shard(tmp_path / "inner" / "x.tar")
    assert [index.read(row, ["txt"])["txt"] for row in range(len(index))] == [b"from the shard"] * 3
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_links_and_devices_are_left_out(tmp_path):
    entries = []
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
        entry = tarfile.TarInfo(f"{number}.txt")
        entry.type, entry.linkname = kind, "/etc/hostname"
        entries.append(entry)
    tar_of(tmp_path / "x.tar", [*entries, ("a.txt", b"text")])
    assert tuple(index_shard(tmp_path / "x.tar").keys) == ("a",)


@pytest.mark.parametrize("source", ["pipe:touch {0}/harmed", "pipe:cat {0}/x.tar", "$(touch {0}/harmed)", "|touch {0}/harmed"])
def test_no_shell_hears_of_a_source(tmp_path, source):
    with pytest.raises(UserError, match="no shard at"):
        ShardDataset(source.format(tmp_path), TEXT, {})
    assert not (tmp_path / "harmed").exists()


def test_a_member_beyond_the_cap_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mmcontrast.data.dataset.MAX_MEMBER_BYTES", 100)
    monkeypatch.setattr("mmcontrast.data.verify_worker.MAX_MEMBER_BYTES", 100)
    tar_of(tmp_path / "x.tar", [("a.txt", b"x" * 101), ("b.txt", b"fine"), ("b.mp4", b"of no field" * 99)])
    dataset = ShardDataset(str(tmp_path / "x.tar"), TEXT, {})
    assert "'a', member .txt: 101 bytes, more than 100" in dataset[0, 0].error
    assert dataset[0, 1].error is None and "text" in dataset[0, 1].values
    report = verify_shards(str(tmp_path / "x.tar"), workers=1, progress=False)
    assert [fault["sample"] for fault in report["faults"]] == ["a"] and "more than 100 bytes" in report["faults"][0]["error"]
    assert report["notes"] == ["1 members .mp4"]


def test_a_name_of_gigabytes_is_not_read(tmp_path):
    """Nor a sparse file's endless end: 3 GiB that take no room, and must not take memory."""
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 3 * 2**30
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.truncate(3 * 2**30 + 4096)
    tracemalloc.start()
    with pytest.raises(UserError, match="not a whole tar"):
        index_shard(tmp_path / "x.tar")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 2**20


def test_verify_reads_headers_again_whatever_the_cache_holds(tmp_path):
    tar_of(tmp_path / "x.tar", [("a.txt", b"text"), ("b.txt", b"x" * 9000), ("c.txt", b"text"), ("d.txt", b"y" * 9000)])
    assert len(index_shard(tmp_path / "x.tar")) == 4
    about, data = (tmp_path / "x.tar").stat(), bytearray((tmp_path / "x.tar").read_bytes())
    place = data.index(b"c.txt")
    data[place : place + 5] = b"C.TXT"  # the checksum is another now; size, time, first and last bytes are the same
    (tmp_path / "x.tar").write_bytes(data)
    os.utime(tmp_path / "x.tar", ns=(about.st_atime_ns, about.st_mtime_ns))
    (fault,) = verify_shards(str(tmp_path / "x.tar"), workers=1, progress=False)["faults"]
    assert "not a whole tar" in fault["error"]
