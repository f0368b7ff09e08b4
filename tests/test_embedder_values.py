"""Values to embed are whatever has an order, from any library; the rest is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import mmcontrast
from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError, ImageModality, TextModality, VectorModality
from mmcontrast.models import ContrastiveModel, LinearTower, OpenClipTextTower

TEXTS = ["a queen", "two kings", "noise", "a small village near the sea", "a"]


@pytest.fixture(scope="module")
def model() -> Embedder:
    modalities = {"text": TextModality(context_length=8), "vector": VectorModality(3)}
    towers = {"text": OpenClipTextTower(16, 1, 2, 8, vocab_size=49408), "vector": LinearTower(3, 4)}
    return Embedder(ContrastiveModel(modalities, towers, {f: f for f in towers}, 4), "a model", "cpu")


def test_a_text_is_read_whole_by_a_model_of_captions():
    """A field whose members list captions, a line each; a query is no list."""
    torch.manual_seed(0)
    modalities = {"text": TextModality(context_length=16, captions="lines"), "vector": VectorModality(3)}
    towers = {"text": OpenClipTextTower(16, 1, 2, 16, vocab_size=49408), "vector": LinearTower(3, 4)}
    captions = Embedder(ContrastiveModel(modalities, towers, {f: f for f in towers}, 4), "captions", "cpu")
    one, both, joined = captions.embed(texts=["a queen", "a queen\nof chess", "a queen of chess"])
    torch.testing.assert_close(both, joined)
    assert not torch.allclose(one, both)


def test_whatever_has_an_order_is_a_list(model):
    want = model.embed(texts=TEXTS)
    for texts in (
        (text for text in TEXTS),
        iter(TEXTS),
        map(str, TEXTS),
        tuple(TEXTS),
        dict.fromkeys(TEXTS).keys(),
        np.array(TEXTS),
        pd.Series(TEXTS, index=[7, 5, 3, 1, 0]),
        pd.Series(TEXTS)[::1].values,
        pd.Index(TEXTS),
    ):
        torch.testing.assert_close(model.embed(texts=texts, batch_size=2), want)
    rows = torch.randn(5, 3)
    want = model.embed(vectors=list(rows.numpy()))
    for vectors in (rows.numpy(), (row for row in rows.numpy()), iter(rows.numpy().tolist())):
        torch.testing.assert_close(model.embed(vectors=vectors, batch_size=2), want)
    assert model.embed(texts=iter(())).shape == (0, 4)


@pytest.mark.parametrize("texts", [set(TEXTS), frozenset(TEXTS), dict.fromkeys(TEXTS), "a queen", b"a queen", 5, object()])
def test_what_has_none_is_told(model, texts):
    with pytest.raises(UserError, match="embed: texts is a list, not "):
        model.embed(texts=texts)


def test_a_wrong_checkpoint_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing of a checkpoint")
    missing, wrong = tmp_path / "none.pt", tmp_path / "notes.txt"
    for name in ("resnet18", "ViT-B-32"):
        for pretrained in (missing, str(missing), tmp_path):
            with pytest.raises(UserError, match=f"{name}.*pretrained='{pretrained}': no such file"):
                mmcontrast.load(name, pretrained=pretrained)
        with pytest.raises(UserError, match=f"{name}: pretrained='{wrong}': "):
            mmcontrast.load(name, pretrained=wrong)
    with pytest.raises(UserError, match="no such tag.*did you mean 'laion2b_s34b_b79k'"):
        mmcontrast.load("ViT-B-32", pretrained="laion2b_s34b_b79")


@pytest.mark.parametrize("size", [-1, 0, None, 1.5])
def test_a_batch_has_a_size(model, size):
    with pytest.raises(UserError, match=f"batch_size {size}: a whole number of at least 1"):
        model.embed(texts=["a", "b"], batch_size=size)


def test_one_picture_is_no_list_of_its_rows(model):
    for picture in (np.zeros((24, 24, 3), np.uint8), torch.zeros(24, 24, 4, dtype=torch.uint8)):
        with pytest.raises(UserError, match=r"is one picture: give \[picture\]"):
            model.embed(images=picture)


def test_an_unknown_device_is_named(model):
    with pytest.raises(UserError, match="device nope"):
        Embedder(model.model, "a model", "nope")


def test_lists_of_texts_and_pictures_of_unknown_range_are_refused(model):
    with pytest.raises(UserError, match=r"texts\[1\]: a list, not a text"):
        model.embed(texts=["a", ["b", "c"]])
    with pytest.raises(DecodeError, match="a picture of mode F"):
        ImageModality(32).encode(Image.new("F", (40, 40)))
