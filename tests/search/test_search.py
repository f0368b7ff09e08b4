"""Search by texts, pictures and sounds with a trained run, from Python and by the command."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmcontrast.errors import UserError
from mmcontrast.search import Searcher
from tests.search.conftest import HOSTILE, NO_PICTURE, NO_TEXT, command


@pytest.fixture(scope="module")
def searcher(small_index) -> Searcher:
    return Searcher.open(small_index, "cpu")


def test_several_things_become_one_vector(searcher):
    picture, sound = searcher.media(5, "image"), searcher.media(6, "audio")
    one = {
        name: searcher.vector(**{name: value}) for name, value in (("text", "a letter"), ("image", picture), ("audio", sound))
    }
    torch.testing.assert_close(one["image"], searcher.index.vector(5, "image"), atol=1e-4, rtol=0)
    torch.testing.assert_close(one["audio"], searcher.index.vector(6, "audio"), atol=1e-4, rtol=0)
    for words in (0.0, 0.3, 1.0):
        mixed = searcher.vector(text="a letter", image=picture, like=(7, "text"), words=words)
        rest = (one["image"] + searcher.index.vector(7, "text")) / 2
        torch.testing.assert_close(mixed, F.normalize(words * one["text"] + (1 - words) * rest, dim=0))
    torch.testing.assert_close(searcher.vector(image=picture, audio=sound), F.normalize(one["image"] + one["audio"], dim=0))
    for query, message in (
        ({}, "nothing to search for"), ({"text": " "}, "nothing to search for"), ({"image": b"?"}, "the picture: not a"),
        ({"text": "a", "words": 2}, "from 0 to 1"), ({"like": (99, "image")}, "no row 99"),
        ({"like": (NO_PICTURE, "image")}, "has no 'image'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            searcher.vector(**query)


def test_captions_come_from_the_text_or_the_json(searcher):
    captions = [searcher.caption(searcher.index.hit(row, 1.0)) for row in range(len(searcher.index))]
    assert captions[0] == HOSTILE
    assert captions[NO_TEXT] == searcher.index.hit(NO_TEXT, 1.0).metadata["name"]
    assert captions[9] == (searcher.media(9, "text") or b"").decode()
    assert set(searcher.examples()) <= set(captions)


def test_the_command(small_index, searcher, tmp_path):
    (tmp_path / "own.png").write_bytes(searcher.media(5, "image"))
    (tmp_path / "own.flac").write_bytes(searcher.media(5, "audio"))
    for options, field in (
        (["--image", tmp_path / "own.png"], "image"),
        (["--audio", tmp_path / "own.flac", "--in", "audio"], "audio"),
    ):
        done = command("search", small_index, *options, "--json", "--k", 30)
        assert done.exit_code == 0, done.stderr
        hits = json.loads(done.stdout)
        (own,) = (hit for hit in hits if hit["row"] == 5)
        assert len(hits) == 29 and own["score"] == pytest.approx(1, abs=1e-4) and own["metadata"]["key"] == own["key"], field
        assert own["caption"] == searcher.caption(searcher.index.hit(5, 1.0))
    done = command("search", small_index, "--text", "letter", "--image", tmp_path / "own.png", "--words", 0.1, "--in", "text")
    assert done.exit_code == 0 and done.stdout.startswith("in text") and len(done.stdout.splitlines()) == 12
    assert all(hit.key in done.stdout for hit in searcher.search("text", text="letter", image=tmp_path / "own.png", words=0.1))

    (tmp_path / "drawing.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    for options, message in (
        (["--image", tmp_path / "drawing.jpg"], "the picture: not a picture that can be decoded"),
        (["--image", tmp_path / "none.png"], "none.png"),
        (["--text", "a", "--in", "txt"], "no index of a field 'txt'; did you mean 'text'?"),
        ([], "nothing to search for: give a text, a picture or a sound"),
    ):
        done = command("search", small_index, *options)
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.stderr


def test_the_index_command(small_index, tmp_path):
    done = command("index", small_index.parent, tmp_path / "out", "--field", "text", "--kind", "hnsw")
    assert done.exit_code == 0, done.stderr
    assert "hnsw: asked for by --kind" in done.stderr and "of text" not in done.stderr
    about = json.loads((tmp_path / "out" / "index.json").read_text())
    assert list(about["fields"]) == ["text"] and about["fields"]["text"]["recall"]["queries"] != "text"
    assert Path(about["table"]).samefile(small_index.parent)
    done = command("index", small_index.parent)
    assert done.exit_code == 2 and "exists: remove it" in " ".join(done.stderr.split())


def test_samples_that_are_others_than_those_of_the_index(small_index, tmp_path):
    index = json.loads((small_index / "index.json").read_text())
    (tmp_path / "index").mkdir()
    for file in small_index.glob("*.faiss"):
        os.link(file, tmp_path / "index" / file.name)
    index |= {"table": str(small_index.parent)}
    for shards, message in ((str(tmp_path / "gone.tar"), "gone.tar"), (index["shards"], "not those of the index")):
        (tmp_path / "index" / "index.json").write_text(json.dumps(index | {"shards": shards, "data": "0"}))
        searcher = Searcher.open(tmp_path / "index", "cpu")
        with pytest.raises(UserError, match=message):
            searcher.media(0, "image")
    done = command("search", tmp_path / "index", "--text", "a letter")
    assert done.exit_code == 0 and "captions are left out" in done.stderr and len(done.stdout.splitlines()) == 12
