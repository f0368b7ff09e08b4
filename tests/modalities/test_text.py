"""Captions through real tokenizers: as their own call gives them, with the end kept, and nothing read from an id."""

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmcontrast import libraries
from mmcontrast.modalities import DecodeError, TextModality
from tests.tokenizers import CAPTIONS, LONG, TOKENIZERS

LENGTH = 12
FRAGMENTS = st.sampled_from(
    ["!", "!!", " ", "<end_of_text>", "<|endoftext|>", "</s>", "<pad>", "[PAD]", "[SEP]", "0", *CAPTIONS]
)
ANY_TEXT = st.lists(st.one_of(FRAGMENTS, st.text(max_size=6)), max_size=6).map("".join)
OPEN_CLIP = TextModality(context_length=LENGTH)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=TOKENIZERS)
def read(request, tmp_path_factory):
    """(a tokenizer, the modality of its folder)."""
    words, folder = TOKENIZERS[request.param](), tmp_path_factory.mktemp("words")
    words.save_pretrained(folder)
    return words, TextModality(str(folder), context_length=LENGTH)


def kept(modality, texts):
    """The ids of every text of a batch."""
    batch = modality.collate([modality.transform(text, False) for text in texts])
    assert batch.dtype == torch.int64
    rows = [row[row >= 0].tolist() for row in batch]
    assert all(row[: len(ids)].tolist() == ids for row, ids in zip(batch, rows, strict=True)), "nothing stands before a text"
    return rows


@given(text=ANY_TEXT)
@MANY
def test_a_caption_keeps_its_end_by_any_tokenizer(read, text):
    words, modality = read
    alone = words(text, truncation=True, max_length=LENGTH)
    if not alone["input_ids"]:
        with pytest.raises(DecodeError, match="without tokens"):
            modality.transform(text, False)
        return
    short, whole = kept(modality, [text, LONG])
    assert short == alone["input_ids"] and len(short) == sum(alone["attention_mask"])
    assert whole == words(LONG, truncation=True, max_length=LENGTH)["input_ids"] and len(whole) == LENGTH


@given(text=ANY_TEXT)
@MANY
def test_a_caption_keeps_its_end_by_open_clips_tokenizer(text):
    modality = OPEN_CLIP
    theirs = open_clip.tokenizer._tokenizer([text, LONG], context_length=LENGTH)
    ours = kept(modality, [text, LONG])
    for row, ids in zip(theirs, ours, strict=True):
        assert row[: len(ids)].tolist() == ids and not row[len(ids) :].any() and ids[-1] == 49407
    assert len(ours[1]) == LENGTH


def test_a_context_must_hold_something():
    with pytest.raises(ValueError, match="context_length is 0"):
        TextModality(context_length=0)
    assert TextModality(context_length=1).ids("a") == [49407]


def test_several_lines_that_are_read_as_one_text_are_told_of(monkeypatch, caplog):
    monkeypatch.setattr(libraries, "_logged", set())
    TextModality(captions="lines").transform("a cat\na dog", False)
    assert not caplog.text
    TextModality().transform("a cat\na dog", False)
    assert "if each is a caption, set captions: lines" in caplog.text


def test_a_byte_order_mark_is_no_text_and_utf_16_none_either():
    assert TextModality().decode("\ufeffa cat".encode()) == "a cat"
    with pytest.raises(DecodeError, match="NUL"):
        TextModality().decode("a cat".encode("utf-16-le"))
