"""Archives and names as other people write them: GNU tar, Python's tarfile, webdataset; dots, comments, links, holes."""

import io
import logging
import os
import subprocess
import tarfile

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmcontrast.data import ShardDataset, StreamDataset, all_batches, index_shard
from mmcontrast.data.shard import KNOWN
from mmcontrast.data.verify import Reading, verify_shards
from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality, TextModality
from tests.data.samples import png

TEXT = {"text": TextModality(context_length=8)}
FIELDS = {"image": ImageModality(8), **TEXT}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def tar_of(path, names, data=b"text", **options):
    with tarfile.open(path, "w", **options) as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


def members(shard):
    return {shard.keys[row]: shard.read(row, shard.extensions) for row in range(len(shard))}


DOTTED = ["photo v1.0 final", "J.Smith", "St. Ives, 3.5 miles", "a..b", "IMG_0001 (1.2)", "Dr. No"]


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("plain", [0, 1, 30])
def test_names_with_dots_are_names(tmp_path, as_folder, plain):
    """Alone, and among others without dots."""
    stems = [f"p{k:02d}" for k in range(plain)] + DOTTED
    names = [f"{stem}.{extension}" for stem in stems for extension in ("txt", "JPG")]
    if as_folder:
        (tmp_path / "x").mkdir()
        for name in names:
            (tmp_path / "x" / name).write_bytes(name.encode())
        shard = index_shard(tmp_path / "x")
    else:
        shard = index_shard(tar_of(tmp_path / "x.tar", names))
    assert set(shard.keys) == set(stems) and set(shard.extensions) == {"txt", "jpg"}
    assert all(set(found) == {"txt", "jpg"} for found in members(shard).values())
    if as_folder:
        assert members(shard)["J.Smith"]["jpg"] == b"J.Smith.JPG"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sets(st.sampled_from(["jpg", "txt", "json", "seg.png", "left.jpg", "0.jpg", "1.jpg", "en.txt", "mp4"]), min_size=1),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(["", "dir/", "a.b/c/"]),
)
def test_shards_of_webdataset_are_read_as_it_reads_them(tmp_path, samples, folder):
    """Whatever members its samples have, but for lone ones whose extension with a dot nobody else has."""
    first = {"jpg", "txt", "seg.png", "left.jpg", "0.jpg", "1.jpg", "en.txt"}
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for k, extensions in enumerate([first, *samples]):
            writer.write({"__key__": f"{folder}{k:05d}", **dict.fromkeys(sorted(extensions), b"{}")})
    theirs = {
        sample["__key__"]: {name for name in sample if not name.startswith("__")}
        for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    }
    assert {key: set(found) for key, found in members(index_shard(tmp_path / "x.tar")).items()} == theirs


def test_members_of_webdataset_with_dots_alone_stay_so(tmp_path):
    names = [f"{k:03d}.{view}.jpg" for k in range(9) for view in ("left", "right")]
    shard = index_shard(tar_of(tmp_path / "x.tar", names))
    assert len(shard) == 9 and shard.extensions == ("left.jpg", "right.jpg")
    one = index_shard(tar_of(tmp_path / "y.tar", names[:2]))
    assert len(one) == 1 and one.extensions == ("left.jpg", "right.jpg")


def test_samples_with_a_single_field_are_counted_and_told(tmp_path, caplog):
    path = tar_of(tmp_path / "x.tar", ["a.txt", "a.png", "b.png", "c.txt", "c.png"])
    ShardDataset(path, TEXT | {"image": ImageModality(8)}, {}, training=True)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("1 of 3 samples have a single one of the fields text, image, so they are in no pair, as shard")
    assert "sample 'b', which has .png" in told


def test_samples_without_a_field_that_their_source_lacks_are_refused(tmp_path):
    """As in a mixture, in which a source may lack a field: nothing could be learnt of this one."""
    fields = TEXT | {"image": ImageModality(8)}
    dataset = ShardDataset(tar_of(tmp_path / "x.tar", ["a.png", "b.png"]), fields, {}, partial=True)
    assert list(dataset.keys) == ["image"]
    training = ShardDataset(tar_of(tmp_path / "x.tar", ["a.png", "b.png"]), fields, {}, training=True, partial=True)
    assert "x.tar: no sample has two of the fields text, image, so nothing can be learnt, as shard" in training.pairless


def test_samples_without_a_field_are_counted_and_told(tmp_path, caplog):
    names = [f"a{k}.{e}" for k in range(5) for e in ("txt", "png")] + [f"b{k}.final.txt" for k in range(4)] + ["c.mp4"]
    path = tar_of(tmp_path / "x.tar", names)
    ShardDataset(path, TEXT, {}, training=True)
    (told,) = [record.getMessage() for record in caplog.records if "none of the fields" in record.getMessage()]
    assert "5 of 10 samples have none of the fields text, as shard" in told
    assert "sample 'b0', which has .final.txt" in told
    report = verify_shards(path, 1, progress=False, reading=Reading(TEXT, as_training=True))
    assert "5 samples have no text, as" in report["notes"][-1] and "sample 'b0'" in report["notes"][-1]
    assert set(report["notes"][:-1]) == {"4 members .final.txt", "5 members .png", "1 members .mp4"}


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax", "ustar", "v7", "posix"])
def test_tars_of_gnu_tar(tmp_path, format):
    """Long names, comments that look like records, folders, links."""
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    long = "n" * (80 if format in ("v7", "ustar") else 230)
    names = ["a.txt", "deep/b.txt", f"deep/{long}.txt", "été.txt"]
    for name in names:
        (source / name).write_text(name)
    (source / "link.txt").symlink_to("a.txt")
    os.link(source / "a.txt", source / "z.txt")
    command = ["tar", f"--format={format}", "--sort=name", "-cf", str(tmp_path / "x.tar"), "-C", str(source), "."]
    if format in ("pax", "posix"):
        command.insert(2, "--pax-option=comment=12 path=evil.txt,mmcontrast.path=worse.txt")
    subprocess.run(command, check=True, capture_output=True)
    shard = index_shard(tmp_path / "x.tar")
    found = {key: data["txt"].decode() for key, data in members(shard).items()}
    assert found == {name.removesuffix(".txt"): name for name in names}
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert sorted(entry.name.removeprefix("./") for entry in tar if entry.isreg()) == sorted(names)
    links = "\n".join(shard.notes)
    assert "1 links have no bytes in a tar, as 'link.txt'" in links and "1 hard links have no bytes" in links


@pytest.mark.parametrize("version", [None, "0.0", "0.1", "1.0"])
def test_sparse_members_are_refused_by_name(tmp_path, version):
    with (tmp_path / "holes.txt").open("wb") as file:
        file.write(b"start")
        file.seek(4 * 2**20)
        file.write(b"end")
    (tmp_path / "a.txt").write_text("fine")
    options = ["--format=pax", f"--sparse-version={version}"] if version else ["--format=gnu"]
    command = ["tar", *options, "--sparse", "-cf", "x.tar", "a.txt", "holes.txt"]
    subprocess.run(command, check=True, cwd=tmp_path)
    with pytest.raises(UserError, match=r"x\.tar: member '.*holes\.txt' is sparse: write the shard again without"):
        index_shard(tmp_path / "x.tar")
    (fault,) = verify_shards(str(tmp_path / "x.tar"), 1, progress=False)["faults"]
    assert "holes.txt" in fault["error"]
    stream = StreamDataset(str(tmp_path / "x.tar"), TEXT, {}, 0)
    sample = next(iter(stream))
    errors = [bad["error"] for one, _ in zip(stream, range(20), strict=False) for bad in one.replaces]
    assert sample.error is None and any("is sparse" in error for error in errors)


def pax_header(records):
    """As tarfile writes one; `records` may repeat keys and hold anything."""
    data = b""
    for key, value in records:
        record = b" " + key + b"=" + value + b"\n"
        length = len(record) + 1
        while len(str(length)) + len(record) != length:
            length += 1
        data += str(length).encode() + record
    return data


def tar_with(path, kind, data, then="plain.txt", size=None):
    """A header of a kind with its data, and a member."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        entry = tarfile.TarInfo("header")
        entry.type, entry.size = kind, len(data)
        tar.fileobj.write(entry.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
        tar.offset = tar.fileobj.tell()
        entry = tarfile.TarInfo(then)
        entry.size = 4 if size is None else size
        tar.addfile(entry, io.BytesIO(b"text") if size is None else None)
        if size is not None:
            tar.fileobj.write(b"text" + bytes(508))
            tar.offset = tar.fileobj.tell()
    return path


@pytest.mark.parametrize(
    ("kind", "records", "name"),
    [
        (tarfile.XHDTYPE, [(b"path", b"real.txt")], "real"),
        (tarfile.SOLARIS_XHDTYPE, [(b"path", b"real.txt")], "real"),
        (tarfile.XHDTYPE, [(b"comment", b"see path=other.txt"), (b"mtime", b"1.5")], "plain"),
        (tarfile.XHDTYPE, [(b"comment", b"line\n21 path=other.txt\n")], "plain"),
        (tarfile.XHDTYPE, [(b"linkpath", b"other.txt"), (b"mypath", b"no.txt")], "plain"),
        (tarfile.XHDTYPE, [(b"path", b"a=b.txt")], "a=b"),
        (tarfile.XHDTYPE, [(b"path", b"first.txt"), (b"path", b"last.txt")], "last"),
        (tarfile.XHDTYPE, [(b"path", "é\n5.txt".encode())], "é\n5"),
        (tarfile.XGLTYPE, [(b"comment", b"0 path=other.txt")], "plain"),
        (tarfile.XGLTYPE, [(b"path", b"all.txt")], "all"),
        (tarfile.GNUTYPE_LONGNAME, b"long.txt\0", "long"),
    ],
)
def test_records_are_read_by_their_length(tmp_path, kind, records, name):
    path = tar_with(tmp_path / "x.tar", kind, records if isinstance(records, bytes) else pax_header(records))
    assert [*members(index_shard(path))] == [name]
    with tarfile.open(path) as tar:
        assert [entry.name for entry in tar] == [f"{name}.txt"], "as Python's tarfile reads it"


def test_a_size_may_be_in_a_record(tmp_path):
    path = tar_with(tmp_path / "x.tar", tarfile.XHDTYPE, pax_header([(b"size", b"4")]), size=0)
    assert members(index_shard(path)) == {"plain": {"txt": b"text"}}
    for data in (b"9 path", b"x path=a\n", pax_header([(b"size", b"-4")]), pax_header([(b"path", b"a")])[:-1], b"5 a\n\n"):
        with pytest.raises(UserError, match="not a whole tar"):
            index_shard(tar_with(tmp_path / "y.tar", tarfile.XHDTYPE, data))


def test_contiguous_members_are_read_and_others_are_told(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (
            ("a.txt", tarfile.CONTTYPE),
            ("b.txt", tarfile.AREGTYPE),
            ("c.txt", tarfile.FIFOTYPE),
            ("d.txt", b"Q"),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = kind, 4 if kind in (tarfile.CONTTYPE, tarfile.AREGTYPE) else 0
            tar.addfile(entry, io.BytesIO(b"text"))
    for _ in range(2):  # the second time from the cache
        shard = index_shard(tmp_path / "x.tar")
        assert [*shard.keys] == ["a", "b"] and shard.notes == ("2 members are no regular files, as 'c.txt'",)
    assert any("no regular files" in note for note in verify_shards(str(tmp_path / "x.tar"), 1, progress=False)["notes"])


def test_streams_tell_what_no_field_reads(tmp_path, caplog):
    tar_of(tmp_path / "x.tar", ["a.txt", "photo v1.0 final.txt", "b.final.txt"])
    stream = StreamDataset(str(tmp_path / "x.tar"), TEXT, {}, 0)
    with caplog.at_level(logging.WARNING, "mmcontrast"):
        keys = {sample.metadata["key"] for sample, _ in zip(stream, range(30), strict=False)}
    assert keys == {"a", "photo v1.0 final"}
    assert [record.getMessage().count("'b.final.txt' is left out") for record in caplog.records] == [1]


def test_a_picture_with_dots_trains_beside_others(tmp_path):
    """End to end: fields, keys, batches."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for stem in ("one", "photo v1.0 final", "two"):
            for extension, data in (("png", png(9)), ("txt", stem.encode())):
                entry = tarfile.TarInfo(f"{stem}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    (batch,) = all_batches(ShardDataset(str(tmp_path / "x.tar"), FIELDS, {}), 8)
    assert len(batch) == 3 and all(present.all() for present in batch.present.values())
    assert {"jpg", "png", "txt", "flac", "npy", "json", "cls"} <= KNOWN
