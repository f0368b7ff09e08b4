"""Exact duplicates: of the same bytes, of the same pixels and samples; which of them stays."""

import io
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from mmcontrast.cli import app
from mmcontrast.curation.exact_duplicates import ExactDuplicates
from mmcontrast.curation.run_stage import run_stage
from mmcontrast.errors import UserError
from tests.curation.pairs import bytes_of, jpeg, pair, write_pairs


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def deduplicated(pattern, out, *by, select=None, workers=1, **options):
    outcome = run_stage(ExactDuplicates(by, **options), str(pattern), out, select=select and str(select), workers=workers)
    assert outcome.complete
    parts = sorted((out / "parts").iterdir())
    return pd.concat([pq.read_table(part).to_pandas() for part in parts], ignore_index=True), outcome.summary


def dropped(frame):
    return {k: reason for k, reason in enumerate(frame["reason"].tolist()) if isinstance(reason, str)}


def planted(folder):
    """Two shards of six: pictures 0 = 4 = 7 = 9, 2 = 8; captions 0 = 7; scores rise within a shard."""
    pictures = [0, 1, 2, 3, 0, 5, 6, 0, 2, 0, 10, 11]
    captions = {0: "same words", 7: "same words"}
    samples = [
        pair(k // 6, k % 6, captions.get(k), jpeg(picture), similarity=round(0.1 * (k % 6), 1), sha256=f"{picture:x}")
        for k, picture in enumerate(pictures)
    ]
    return write_pairs(folder, samples=[samples[:6], samples[6:]])


def test_the_same_bytes(tmp_path):
    folder = planted(tmp_path / "data")
    frame, summary = deduplicated(folder / "*.tar", tmp_path / "out", "image")
    first = "duplicate (row 0 of shard 0)"
    assert dropped(frame) == {4: first, 7: first, 8: "duplicate (row 2 of shard 0)", 9: first}
    assert summary["reasons"] == {"duplicate": 4} and summary["kept"] == 8 and summary["not compared"] == 0
    by_hash, _ = deduplicated(folder / "*.tar", tmp_path / "sha", "json:sha256")
    assert dropped(by_hash) == dropped(frame)
    both, _ = deduplicated(folder / "*.tar", tmp_path / "both", "image", "text")
    assert dropped(both) == {7: first}
    best, _ = deduplicated(folder / "*.tar", tmp_path / "best", "image", best="json:similarity")
    keeper = "duplicate (row 4 of shard 0)"  # 0.4, before 0.1 and 0.3 of the second shard; 2 and 8 tie
    assert dropped(best) == {0: keeper, 7: keeper, 8: "duplicate (row 2 of shard 0)", 9: keeper}
    for workers in (2, 3):
        deduplicated(folder / "*.tar", tmp_path / f"{workers}", "image", workers=workers)
        assert bytes_of(tmp_path / f"{workers}") == bytes_of(tmp_path / "out")


def test_a_score_that_no_sample_has_is_refused_and_those_without_are_counted(tmp_path):
    folder = write_pairs(tmp_path / "data", samples=[[pair(0, 0, "a", similarity=None), pair(0, 1, "a", similarity=0.2)]])
    frame, summary = deduplicated(folder / "*.tar", tmp_path / "out", "text", best="json:similarity")
    assert dropped(frame) == {0: "duplicate (row 1 of shard 0)"} and summary["without json:similarity"] == 1
    with pytest.raises(UserError, match="--best json:similarty: no sample has a number of this name"):
        deduplicated(folder / "*.tar", tmp_path / "typo", "text", best="json:similarty")


def test_a_shard_that_is_named_twice_is_refused(tmp_path):
    folder = planted(tmp_path / "data")
    with pytest.raises(UserError, match=r"00000.tar is named twice"):
        run_stage(ExactDuplicates(("image",)), [str(folder / "*.tar"), str(folder / "00000.tar")], tmp_path / "out", workers=1)


def test_what_was_dropped_before_is_no_duplicate(tmp_path):
    folder = planted(tmp_path / "data")
    (tmp_path / "own.csv").write_text("sample_id\n" + "\n".join(str(k // 6 * 100 + k % 6) for k in range(1, 12)))
    frame, _ = deduplicated(folder / "*.tar", tmp_path / "out", "image", select=tmp_path / "own.csv")
    keeper = "duplicate (row 4 of shard 0)"
    assert dropped(frame) == {0: "not in own.csv", 7: keeper, 8: "duplicate (row 2 of shard 0)", 9: keeper}
    again, _ = deduplicated(folder / "*.tar", tmp_path / "again", "text", select=tmp_path / "out")
    assert dropped(again) == dropped(frame)


def test_the_same_once_decoded(tmp_path):
    image = Image.open(io.BytesIO(jpeg(1)))
    files = {}
    for name, options in {"a.png": {"compress_level": 1}, "b.png": {"compress_level": 9}, "c.webp": {"lossless": True}}.items():
        target = io.BytesIO()
        image.save(target, name.rpartition(".")[2], **options)
        files[name] = target.getvalue()
    wave = (np.sin(np.arange(16_000) * 0.1) * 9000).astype(np.int16)
    for name, form in (("d.wav", "WAV"), ("e.flac", "FLAC")):
        target = io.BytesIO()
        soundfile.write(target, wave, 16_000, format=form)
        files[name] = target.getvalue()
    files["f.png"] = files["a.png"][:60]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    frame, summary = deduplicated(folder, tmp_path / "bytes", "image")
    assert not dropped(frame) and summary["not compared"] == 2
    frame, _ = deduplicated(folder, tmp_path / "pixels", "image", decoded=True)
    assert dropped(frame).keys() == {1, 2, 5} and dropped(frame)[5].startswith("image unreadable (")
    frame, _ = deduplicated(folder, tmp_path / "sounds", "audio", decoded=True)
    assert dropped(frame) == {4: "duplicate (row 3 of shard 0)"}


def test_rows_of_a_table(tmp_path):
    frame = pd.DataFrame({"caption": ["a", "b", "a", None, None], "score": [1.0, 2.0, 3.0, 4.0, 5.0]})
    frame.to_parquet(tmp_path / "t.parquet")
    found, summary = deduplicated(tmp_path / "t.parquet", tmp_path / "out", "caption", best="score")
    assert dropped(found) == {0: "duplicate (row 2 of shard 0)"} and summary["not compared"] == 2


def test_the_command(tmp_path, capsys):
    folder = planted(tmp_path / "data")
    words = ["data", "dedup", str(folder / "*.tar"), str(tmp_path / "out"), "--by", "image", "--by", "text", "--workers", "1"]
    app(words, standalone_mode=False)
    assert "11 of 12 samples are kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]["by"] == ["image", "text"]
    with pytest.raises(SystemExit):
        app([*words[:3], str(tmp_path / "other"), "--by", "image", "--keys", "text=json:caption"])
    assert "keys are of the fields" in " ".join(capsys.readouterr().err.split())
