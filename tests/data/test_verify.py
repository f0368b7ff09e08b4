"""Every fault is made on purpose and found; a shard mutated at random is reported, or is whole."""

import io
import json
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmcontrast.data import ShardDataset, all_batches, write_shard
from mmcontrast.data.inspect import inspect_shards
from mmcontrast.data.shard import sample_of
from mmcontrast.data.verify import verify_shards, verify_sources
from mmcontrast.data.verify_worker import decode_rows, scan_shard
from mmcontrast.data_commands import _reading, _sources, verify
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, ImageModality, TextModality, VectorModality
from tests.command import mmcontrast
from tests.modalities.picture_files import files

ROOT = Path(__file__).parent.parent.parent


def picture(format="PNG", size=(8, 8)):
    target = io.BytesIO()
    Image.new("RGB", size, (200, 10, 0)).save(target, format)
    return target.getvalue()


RAMP = np.arange(800, dtype=np.int16)


def sound(samples=RAMP, format="FLAC", subtype=None):
    target = io.BytesIO()
    soundfile.write(target, samples, 16_000, format=format, subtype=subtype)
    return target.getvalue()


def samples(count=6):
    return [
        {"__key__": f"s{k}", "png": picture(), "txt": f"number {k}", "flac": sound(), "json": {"group_id": k}}
        for k in range(count)
    ]


BAD_MEMBERS = {
    "truncated picture": ("png", picture()[:50], "not a picture"),
    "PostScript by another name": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "a bomb": ("png", picture(size=(9000, 9000)), "9000×9000 pixels, more than max_pixels"),
    "truncated sound": ("flac", sound()[:60], "not a sound"),
    "empty text": ("txt", b" \n", "an empty text"),
    "Latin-1 text": ("txt", "café".encode("latin-1"), "not UTF-8"),
    "UTF-16 text": ("txt", "a cat".encode("utf-16-le"), "with NUL, as of UTF-16"),
    "no JSON": ("json", b"{", "not JSON"),
    "a JSON list": ("json", b"[1]", "a JSON list, not an object"),
    "a group without a number": ("json", b'{"group_id": [7]}', "group_id [7] is neither a whole number nor a text"),
    "a negative group": ("json", b'{"group_id": -4}', "group_id -4 is negative"),
    "an empty picture": ("png", b"", "not a picture"),
    "silence": ("flac", sound(np.zeros(800)), "a constant sound: each of its 800 samples is 0"),
    "a sound of NaN": ("wav", sound(np.full(800, np.nan), "WAV", "FLOAT"), "no numbers (NaN)"),
    "a sound of integers as floats": ("wav", sound(np.arange(800.0), "WAV", "FLOAT"), "where full scale is 1"),
}


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize("fault", BAD_MEMBERS)
def test_every_bad_member_is_found(tmp_path, fault):
    extension, data, message = BAD_MEMBERS[fault]
    good = [("a.png", picture()), ("a.txt", b"fine"), ("a.flac", sound()), ("a.json", b"{}")]
    tar_of(tmp_path / "x.tar", [*good, (f"b.{extension}", data), ("c.txt", b"fine")])
    report = verify_shards(str(tmp_path / "x.tar"), workers=1, progress=False)
    (reported,) = report["faults"]
    assert (reported["sample"], reported["member"]) == ("b", extension) and message in reported["error"]
    assert (report["shards"], report["samples"], report["members"]) == (1, 3, 6)


def test_the_command_lists_all_and_its_exit_code_tells(tmp_path):
    for name in ("a", "b", "c"):
        write_shard(tmp_path / f"{name}.tar", samples())
    command = ["data", "verify", tmp_path / "*.tar", "--json", tmp_path / "r.json"]
    done = mmcontrast(*command)
    assert done.returncode == 0 and "3 shards, 18 samples, 72 members: no faults in any sample" in done.stderr
    data = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(data[: len(data) // 2])
    tar_of(tmp_path / "c.tar", [("a.txt", b"x"), ("b.txt", b"x"), ("a.png", picture())])
    tar_of(tmp_path / "d.tar", [(f"s{k}.txt", b"") for k in range(30)])
    (tmp_path / "e.tar").write_bytes(b"\x1f\x8b" + b"\0" * 5000)
    done = mmcontrast(*command)
    assert done.returncode == 2 and "33 faults in 5 shards, 36 samples" in done.stderr and "and 13 more" in done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert [Path(fault["shard"]).name for fault in report["faults"]] == ["b.tar", "c.tar", "e.tar", *["d.tar"] * 30]
    assert "not a whole tar" in report["faults"][0]["error"] and "'a' are not adjacent" in report["faults"][1]["error"]


def test_a_manifest_tells_what_a_tar_cannot(tmp_path):
    """A shard from which a member was cut out is a whole tar; only the manifest remembers it."""
    (tmp_path / "all").mkdir()
    write_shard(tmp_path / "all" / "x.tar", samples())
    data = (tmp_path / "all" / "x.tar").read_bytes()
    entry = {"name": "x.tar", "samples": 6, "bytes": len(data), "crc32": zlib.crc32(data)}
    (tmp_path / "all" / "manifest.json").write_text(json.dumps({"splits": {"train": {"samples": 6, "shards": [entry]}}}))
    assert not verify_shards(str(tmp_path / "all" / "*.tar"), 1, progress=False)["faults"]
    (tmp_path / "all" / "x.tar").write_bytes(data[1024:])
    (fault,) = verify_shards(str(tmp_path / "all" / "*.tar"), 1, progress=False)["faults"]
    assert "is not as it was written" in fault["error"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_shard(folder / "whole.tar", samples())
    return folder


def mutated(data, kind, place, length, filler):
    start = int(place * len(data))
    stop = min(start + length, len(data))
    if kind == "cut":
        return data[:start]
    if kind == "remove":
        return data[:start] + data[stop:]
    if kind == "insert":
        return data[:start] + filler * (length // len(filler)) + data[start:]
    if kind == "flip":
        return data[:start] + bytes(b ^ filler[0] for b in data[start:stop]) + data[stop:]
    return data[:start] + (filler * length)[: stop - start] + data[stop:]  # overwrite


KINDS = ("cut", "remove", "insert", "flip", "overwrite")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            st.floats(0, 1),
            st.one_of(st.integers(0, 2000), st.sampled_from([512, 1024, 10_240])),
            st.binary(min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=2,
    )
)
def test_a_mutated_shard_is_reported_or_whole(whole, mutations):
    """Never a hang, nor an exception, nor silence: all that Python's tarfile finds up to the very end is there, or a fault
    is told. (A tar from which a whole member was cut out is whole.)"""
    data = (whole / "whole.tar").read_bytes()
    for mutation in mutations:
        data = mutated(data, *mutation)
    path = whole / f"{hash(data)}.tar"
    path.write_bytes(data)
    try:
        number, error, _ = scan_shard(str(path))
        if error:
            assert str(path) in error and "\n" not in error
            return
        decoded = decode_rows((str(path), 0))
        with tarfile.open(path, ignore_zeros=True) as tar:  # beyond holes too
            names = [entry.name for entry in tar if entry.isfile() and re.match(r"[^/.]+\.", entry.name)]
        members = decoded.members + decoded.untried.total()
        assert decoded.faults or (members == len(names) and number == len({sample_of(name)[0] for name in names}))
    finally:
        path.unlink()


NARROW = io.BytesIO()
Image.new("L", (40_000, 4)).save(NARROW, "PNG")
HUGE_SOUND = bytearray(sound())  # its header alone says so: 3,600 s at 655,350 Hz, 8 channels
HUGE_SOUND[18:26] = (655350 << 44 | 7 << 41 | 15 << 36 | 3600 * 655350).to_bytes(8, "big")
WORSE_MEMBERS = {
    "a picture so narrow that it grows": ("png", NARROW.getvalue(), "so narrow that scaled to 224"),
    "a sound that is huge by its header": ("flac", bytes(HUGE_SOUND), "values of sound, more than"),
    "an infinite number": ("json", b'{"sample_id": Infinity}', "sample_id inf is neither a whole number"),
    "a weight below 0": ("json", b'{"sample_weight": -1}', "sample_weight -1 is no finite number"),
    "a number beyond 64 bits": ("json", b'{"group_id": 1e30}', "beyond 64 bits"),
    "a deep nest": ("json", b"[" * 100_000, "not JSON as it should be"),
    "no array": ("npy", b"garbage", "not an array"),
    "a pickled array": (
        "npy",
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "not an array",
    ),
}


@pytest.mark.parametrize("fault", WORSE_MEMBERS)
def test_worse_members_are_found_and_survived(tmp_path, fault):
    """Found by verify with a reason; in training replaced."""
    extension, data, message = WORSE_MEMBERS[fault]
    good = [("a.png", picture()), ("a.txt", b"fine"), ("a.flac", sound()), ("a.json", b"{}")]
    tar_of(tmp_path / "x.tar", [*good, (f"b.{extension}", data), ("b.txt", b"fine")] if extension != "txt" else good)
    (reported,) = verify_shards(str(tmp_path / "x.tar"), workers=1, progress=False)["faults"]
    assert (reported["sample"], reported["member"]) == ("b", extension) and message in reported["error"]
    modalities = {"image": ImageModality(224), "text": TextModality(), "audio": AudioModality(), "vector": VectorModality(2)}
    if extension != "npy":
        del modalities["vector"]
    dataset = ShardDataset(str(tmp_path / "x.tar"), modalities, {}, training=True)
    sample = dataset[0, 1]
    assert sample.error is None and f"sample 'b', member .{extension}: " in sample.replaces[0]["error"]


def test_pictures_with_alpha_are_counted_and_endless_sounds_looked_into(tmp_path):
    pictures = [data for name, data in files().items() if data[1:4] == b"PNG"]
    endless = bytearray(sound())
    endless[18:26] = (int.from_bytes(endless[18:26], "big") >> 36 << 36).to_bytes(8, "big")
    members = [(f"p{k}.png", data) for k, data in enumerate(pictures)]
    tar_of(tmp_path / "x.tar", [*members, ("s.flac", bytes(endless)), ("t.flac", sound())])
    output = [line for line in inspect_shards([str(tmp_path / "x.tar")], tmp_path / "page.html") if isinstance(line, str)]
    alpha = sum(Image.open(io.BytesIO(data)).has_transparency_data for data in pictures)
    assert [line for line in output if f"{alpha} of {len(pictures)} pictures have alpha" in line] and 0 < alpha < len(pictures)
    assert not [line for line in output if "cannot be read" in line]
    assert not verify_shards(str(tmp_path / "x.tar"), workers=1, progress=False)["faults"]


def test_a_name_that_is_not_utf8_is_a_name(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        entry = tarfile.TarInfo("caf\xe9.txt")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"text"))
    (batch,) = all_batches(ShardDataset(str(tmp_path / "x.tar"), {"text": TextModality()}, {}), 1)
    assert len(batch) == 1 and batch.metadata[0]["key"] == "caf\\xe9"
    assert [*inspect_shards([str(tmp_path / "x.tar")], tmp_path / "page.html")] and (tmp_path / "page.html").exists()


def test_a_config_is_verified_as_it_is_read(config_file, corpus, tmp_path, capsys):
    """Its sources and splits, its fields with their keys and limits; in one report, by the command."""
    table = "photo,spoken,words\n"
    (tmp_path / "files").mkdir()
    for k in range(4):
        (tmp_path / "files" / f"{k}.png").write_bytes(picture() if k else b"no picture")
        (tmp_path / "files" / f"{k}.flac").write_bytes(sound())
        table += f"{k}.png,{k + 1}.flac,{'words' if k != 2 else ' '}\n"
    (tmp_path / "x.csv").write_text(table)
    keys = "{image: [photo], audio: [spoken], text: [words]}"
    source = f"{{shards: {tmp_path / 'x.csv'}, files: {tmp_path / 'files'}, keys: {keys}}}"
    options = [f"data.train={{table: {source}, tars: {{shards: {corpus / 'train-*.tar'}}}}}"]
    with pytest.raises(UserError, match="3 faults in 5 shards, 124 samples"):
        verify([str(config_file), *options], workers=1, json_file=tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    faults = [(fault["sample"], fault["member"]) for fault in report["faults"]]
    assert faults == [("x-0", "photo"), ("x-2", "words"), ("x-3", "spoken")]
    output = capsys.readouterr().err
    assert "row 0, sample 'x-0', member .photo (0.png)" in output and "4.flac cannot be read: No such file" in output


def test_what_training_would_suffer_is_found_of_a_config(config_file, tmp_path, capsys):
    write_shard(tmp_path / "x.tar", [{"__key__": f"k{k}", "png": picture(), "txt": "x", "dat": b"?"} for k in range(3)])
    lone = [{"__key__": "lone", "svg": b"<svg/>", "json": {}}]
    write_shard(tmp_path / "y.tar", lone)
    sources, shared = _sources(str(config_file), [f"data.train={tmp_path / '?.tar'}", "evaluation.splits={val: nowhere.tar}"])
    report = verify_sources(sources, shared, 1, progress=False)
    assert [fault["error"].partition(" (from")[0] for fault in report["faults"]] == ["no shard at 'nowhere.tar'"]
    assert {note.partition(", as ")[0] for note in report["notes"]} == {
        "data.train: 3 members .dat", "data.train: 1 members .svg", "data.train: 1 samples have no audio or image or text",
    }  # fmt: skip
    with pytest.raises(UserError, match="unknown key 'nonsense'"):
        _sources(str(config_file), ["nonsense=1"])
    verify([str(tmp_path / "?.tar")], workers=1)
    output = capsys.readouterr().err
    assert "not decoded: 3 members .dat" in output and "2 shards, 4 samples, 7 members: no faults in what was decoded" in output


def test_keys_that_are_wrong_are_refused(tmp_path):
    for wrong in ("image", "=x", "image=", "image=a,,b"):
        with pytest.raises(UserError, match="--keys .* is not of the form FIELD=COLUMN"):
            _reading([wrong], None)
    assert _reading(["speech=a,b", "speech=c"], None).keys == {"speech": ["a", "b", "c"]}
