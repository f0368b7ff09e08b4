"""Balancing by entries: matches are those of a search for each entry, shares those of the paper's formula."""

import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mmcontrast.cli import app
from mmcontrast.curation.balance import Entries, limit_of_tail, read_entries, shares
from mmcontrast.data import write_shard
from mmcontrast.data.dataset import ShardDataset
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality

WORDS = st.lists(st.sampled_from(["a", "b", "c", "ab", "St", "Louis", ".", ",", " ", "\n", "!", "é"]), max_size=12)
PHRASES = st.lists(st.lists(st.sampled_from(["a", "b", "ab", "St", "Louis", ".", "é"]), min_size=1, max_size=3), max_size=8)


def spaced(text):
    """The paper's: marks between spaces, other white space a space, a space before and behind."""
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for white in "\t\n\r":
        text = text.replace(white, " ")
    return f" {text} "


@settings(max_examples=300, deadline=None)
@given(words=WORDS, phrases=PHRASES, joint=st.sampled_from(["", " ", "  "]))
def test_what_is_found_is_what_a_search_for_each_entry_finds(words, phrases, joint):
    entries = list(dict.fromkeys(" ".join(phrase) for phrase in phrases))
    text = joint.join(words)
    assert Entries(entries).found_in(text) == [k for k, entry in enumerate(entries) if f" {entry} " in spaced(text)]


def test_phrases_marks_and_what_is_no_entry():
    entries = Entries(["dog", "dog house", "St. Louis", "hot dog"])
    assert entries.found_in("A dog house, a hot dog!") == [0, 1, 3]
    assert entries.found_in("Dogs in St. Louis") == []  # capitals count; marks are set apart in texts alone
    assert entries.count(["dog dog", "a dog", "hot dog"]).tolist() == [3, 0, 0, 1]
    with pytest.raises(ValueError, match="entry 1 is empty"):
        Entries(["dog", " "])
    with pytest.raises(ValueError, match="entry 2, 'dog', is entry 0 already"):
        Entries(["dog", "cat", "dog"])


def test_a_frequent_entry_keeps_about_its_limit_and_a_rare_one_all(tmp_path):
    """Two shards have a dog in 3,000 texts, a gnu in 40, both in 20; and what matches nothing, or is no text."""
    texts = ["a dog"] * 2980 + ["a gnu"] * 20 + ["a gnu, a dog"] * 20 + ["a cat"] * 10
    random.Random(0).shuffle(texts)
    samples = [{"__key__": f"{k:05d}", "txt": text} for k, text in enumerate(texts)]
    samples += [{"__key__": "90000", "txt": b"\xff\xfe"}, {"__key__": "90001", "cls": "1"}]
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", samples[number::2])
    (tmp_path / "entries.txt").write_text("dog\ngnu\nwolf\n")
    shards, command = str(tmp_path / "{0..1}.tar"), ["data", "balance", "--entries", str(tmp_path / "entries.txt")]
    done = CliRunner().invoke(app, [*command, "--limit", "300", "--workers", "1", shards, str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["reasons"].keys() == {"of frequent entries alone", "matches no entry", "text unreadable", "no text"}
    assert summary["reasons"]["matches no entry"] == 10 and summary["counts"] == {"texts that match an entry": 3020}
    table = pq.read_table(tmp_path / "out" / "parts")
    kept = {key for key, keep in zip(table["key"].to_pylist(), table["keep"].to_pylist(), strict=True) if keep}
    assert {f"{k:05d}" for k, text in enumerate(texts) if "gnu" in text} <= kept
    dogs = len(kept) - 40
    assert abs(dogs - 298) < 5 * 298**0.5  # each of 2,980 with 300 / 3,000
    dataset = ShardDataset(shards, {"text": TextModality()}, {}, select=str(tmp_path / "out"))
    assert {dataset.key(k) for k in range(len(dataset))} == kept

    two = CliRunner().invoke(app, [*command, "--limit", "300", "--workers", "2", shards, str(tmp_path / "two")])
    assert two.exit_code == 0, two.output
    for part in (tmp_path / "out" / "parts").iterdir():
        assert part.read_bytes() == (tmp_path / "two" / "parts" / part.name).read_bytes()
    neither = CliRunner().invoke(app, [*command, shards, str(tmp_path / "three")])
    assert neither.exit_code == 2 and "--limit" in neither.output
    tail = CliRunner().invoke(app, [*command, "--tail", "0.01", shards, str(tmp_path / "tail")])
    assert tail.exit_code == 0 and json.loads((tmp_path / "tail" / "summary.json").read_text())["kept"] < 130  # 40 and 40


def test_texts_are_where_the_keys_say(tmp_path):
    """Texts are in a usual member that the shard has, in entries of the json as img2dataset writes them, or nowhere."""
    shards = {"captions": {"caption": "a gnu"}, "entries": {"json": {"caption": "a gnu"}}, "pictures": {"cls": "1"}}
    (tmp_path / "entries.txt").write_text("gnu\n")
    for name, members in shards.items():
        write_shard(tmp_path / f"{name}.tar", [{"__key__": "0", **members}])

    def kept(name, *options):
        arguments = ["data", "balance", "--entries", str(tmp_path / "entries.txt"), "--limit", "10", "--workers", "1", *options]
        done = CliRunner().invoke(
            app, [*arguments, str(tmp_path / f"{name}.tar"), str(tmp_path / f"out {name} {len(options)}")]
        )
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / f"out {name} {len(options)}" / "summary.json").read_text())["kept"]

    assert (kept("captions"), kept("entries"), kept("pictures")) == (1, 0, 0)
    assert kept("entries", "--keys", "text=json:caption") == 1
    wrong = [str(tmp_path / "captions.tar"), str(tmp_path / "wrong"), "--limit", "10", "--keys", "image=jpg"]
    done = CliRunner().invoke(app, ["data", "balance", "--entries", str(tmp_path / "entries.txt"), *wrong])
    assert done.exit_code == 2 and "--keys image=" in done.output


def test_files_of_entries(tmp_path):
    (tmp_path / "list.json").write_text('["dog", "St. Louis"]')
    assert read_entries(str(tmp_path / "list.json")).names == ["dog", "St. Louis"]
    (tmp_path / "spaces.txt").write_text("dog \n\n gnu\t\r\n")
    assert read_entries(str(tmp_path / "spaces.txt")).names == ["dog", "gnu"]
    for text, message in (('["dog", 3]', "no text"), ("dog\ndog\n", "is entry 0 already")):
        (tmp_path / f"{len(text)}.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            read_entries(str(tmp_path / f"{len(text)}.txt"))


def test_the_limit_of_a_share_of_the_tail():
    counts = np.array([1, 2, 3, 4, 90])
    assert limit_of_tail(counts, 0.1) == 4 and limit_of_tail(counts, 0.03) == 2 and limit_of_tail(counts, 1.0) == 90
    assert shares(counts, 4).tolist() == [1, 1, 1, 1, 4 / 90]
    with pytest.raises(ValueError, match="no text matches"):
        limit_of_tail(np.zeros(3, dtype=np.int64), 0.1)
