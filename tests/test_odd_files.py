"""Files as others have them: names and texts that are no UTF-8, half an emoji, links, brackets in names, a shared cache."""

import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from PIL import Image

from mmcontrast.curation.filter import Filter
from mmcontrast.curation.rules import parse_rules
from mmcontrast.curation.run_stage import run_stage
from mmcontrast.data import arrow_copies, open_shards
from mmcontrast.data.files import expand_shards
from mmcontrast.data.folder import index_folder
from mmcontrast.data.ids import ids_of, read_json, shown
from mmcontrast.data.tables import open_table
from mmcontrast.embedding_job import embed_shards
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.clip_benchmark_layout import names_in
from mmcontrast.modalities import TextModality
from mmcontrast.text_files import lines_of
from tests.command import mmcontrast, train
from tests.results import results_of

HALF = b'{"title": "cut \\ud83d", "deep": [{"\\uDE00": "whole \\ud83d\\ude00"}], "sample_id": "\\ud83d"}'


def png():
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8)).save(target, "PNG")
    return target.getvalue()


def flac():
    target = io.BytesIO()
    soundfile.write(target, np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 16_000, format="FLAC")
    return target.getvalue()


def test_half_an_emoji_is_a_replacement_character():
    read = read_json(HALF)
    assert read == {"title": "cut \ufffd", "deep": [{"\ufffd": "whole 😀"}], "sample_id": "\ufffd"}
    assert read_json(b'{"a": "\xed\xa0\xbd"}') == {"a": "\ufffd"}  # as some write it in UTF-8
    assert read_json(HALF.decode().encode("utf-16")) == read
    assert ids_of(read, 0)[0] == ids_of(read_json(HALF), 1)[0] > 0
    assert (shown("caf\udce9"), shown("café"), shown("plain")) == ("caf\\xe9", "café", "plain")


def test_a_tar_with_names_and_texts_that_are_no_utf8_is_embedded_trained_on_and_filtered(config_file, tmp_path):
    """As `tar` packs files with Latin-1 names, and crawlers cut captions."""
    with tarfile.open(tmp_path / "odd.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for number in range(16):
            about = json.dumps({"title": "cut \ud83d", "sample_id": number}).encode()
            for extension, data in (("png", png()), ("flac", flac()), ("txt", b"a letter"), ("json", about)):
                member = tarfile.TarInfo(f"caf\xe9{number:02d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shards = str(tmp_path / "odd.tar")
    options = [f"data.train={shards}", f"evaluation.splits={{val: {shards}}}", "evaluation.zero_shot={}", "train.steps=1"]
    done = train(config_file, *options, "data.record_samples=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert embed_shards(tmp_path / "runs" / "small", shards, tmp_path / "table", device="cpu")
    table = EmbeddingTable.read(tmp_path / "table")
    assert table.metadata[0]["key"] == "caf\\xe900" and table.metadata[0]["title"] == "cut \ufffd"
    rules = parse_rules({"rules": [{"type": "words", "key": ["json:title"], "min": 2}]}, "rules")
    assert run_stage(Filter(rules), shards, tmp_path / "kept", workers=1).complete
    assert pq.read_table(tmp_path / "kept" / "parts")["keep"].to_pylist() == [True] * 16


def test_linked_folders_are_followed_once(tmp_path):
    for folder in ("store/cat", "data/dog"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.txt").write_text("x")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "data" / "kitty").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "store" / "cat" / "up").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "data" / "dog" / "all").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    assert list(index_folder(str(tmp_path / "data")).keys) == ["cat/1", "dog/1", "kitty/1"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(folder):  # as anyone but root is refused
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="closed cannot be read: Permission denied"):
        index_folder(str(tmp_path))


def test_a_table_of_linked_files(tmp_path):
    """As DVC and git-annex lay them out: in the folder of the table, links to a store outside it."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "abc").write_bytes(png())
    (tmp_path / "data" / "img").mkdir(parents=True)
    (tmp_path / "data" / "img" / "1.png").symlink_to(tmp_path / "store" / "abc")
    (tmp_path / "data" / "t.csv").write_text("image,text\nimg/1.png,a\n../store/abc,b\n")
    table = open_table(str(tmp_path / "data" / "t.csv"))
    assert table.read(0, ["image"])["image"] == png()
    with pytest.raises(Exception, match="is not in .*data: set `files`"):
        table.read(1, ["image"])


def test_a_name_with_brackets_or_braces_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a[1].csv", "a1.csv", "b{1,2}.csv", "b1.csv", "c[2024] x.csv", "back\\slash.csv"]
    for name in names:
        (tmp_path / name).touch()
    for name in names:
        assert expand_shards(name) == [name]
    assert expand_shards("a?.csv") == ["a1.csv"] and expand_shards("{a1,b1}.csv") == ["a1.csv", "b1.csv"]


def test_lines_are_those_of_a_file(tmp_path):
    text = "one caf\x85 two\nthr\u2028ee\x0c\r\nfour\rfive\n"
    assert lines_of(text) == [line.rstrip("\n") for line in io.StringIO(text, newline=None)]
    assert lines_of(text) == ["one caf\x85 two", "thr\u2028ee\x0c", "four", "five"]
    assert lines_of("") == [] and lines_of("a\n\n") == ["a", ""]
    (tmp_path / "classnames.txt").write_text("a\x0cb\nc\u2028d\ne\n")
    assert names_in(tmp_path / "classnames.txt") == ["a\x0cb", "c\u2028d", "e"]
    assert TextModality.lines("one caf\x85 two\n\nthree") == ["one caf\x85 two", "three"]


def test_captions_of_more_than_two_gibibytes_are_measured(tmp_path, monkeypatch):
    """An Arrow list of texts in chunks, which together have no room in one."""
    rows = pa.chunked_array([pa.array([["a", "bc"], None, []]), pa.array([["défg", None]])])
    monkeypatch.setattr(arrow_copies, "ROWS", 3)
    pq.write_table(pa.table({"caption": rows, "text": ["x"] * 4}), tmp_path / "t.parquet", row_group_size=3)
    table = open_table(str(tmp_path / "t.parquet"))
    assert table.table["caption"].num_chunks == 2
    members = [table.read(row, ["caption"]).get("caption") for row in range(4)]
    assert members == [b"a\nbc", None, None, "défg".encode()]
    assert table.sizes_of("caption").tolist() == [4, -1, 0, 5]


def test_a_cache_that_users_and_machines_share(tmp_path, monkeypatch):
    """Others may read what it holds; a copy that another machine's file of that path is read from stays for a day."""
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "t.csv"
    file.write_text("text\na\n")
    table = open_table(str(file))
    before = os.umask(0o022)
    try:
        file.write_text("text\nb\nc\n")
        newer = open_table(str(file))
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in newer.arrow} == {"0o644"}
    assert table.__getstate__()["arrow"] != newer.arrow and all(path.exists() for path in (*table.arrow, *newer.arrow))
    long_ago = time.time() - 2 * arrow_copies.UNUSED
    os.utime(table.arrow[0], (long_ago, long_ago))
    file.write_text("text\nd\ne\nf\n")
    newest = open_table(str(file))
    assert not table.arrow[0].exists() and newer.arrow[0].exists() and len(newest) == 3
    newest.__dict__.pop("table", None)
    newest.arrow[0].unlink()
    with pytest.raises(UserError, match=r"t.csv: its Arrow copy is gone"):
        newest.read(0, ["text"])
    assert len(open_shards(str(file))[0]) == 3


@pytest.mark.slow
def test_a_run_in_a_locale_without_utf8(vectors_file, tmp_path):
    """ASCII, in which Python opens files that are given no encoding: the config of a checkpoint is UTF-8 all the same."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    tree = yaml.safe_load(vectors_file.read_text())
    tree["data"]["train"] = {"café 猫": {"shards": str(tmp_path / "train.tar")}}
    tree["evaluation"] = {"splits": {"välid": str(tmp_path / "train.tar")}}
    vectors_file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    done = mmcontrast("train", vectors_file, real=True, env=locale)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = mmcontrast("train", vectors_file, "train.steps=8", "--resume", real=True, env=locale)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    last = tmp_path / "runs" / "small" / "checkpoints" / "step-00000008" / "config.yaml"
    assert "café 猫" in last.read_text(encoding="utf-8")
    assert any(name.startswith("välid/") for name in results_of(tmp_path / "runs" / "small"))
