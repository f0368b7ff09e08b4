"""Folders of sentence-transformers: unit embeddings, as the model's, by its own encode."""

import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from PIL import Image
from sentence_transformers import SentenceTransformer, models

import mmcontrast
from mmcontrast.errors import UserError
from mmcontrast.export.folder import export_model
from mmcontrast.models.sentence_transformers import SentenceSettings, sentence_settings
from tests.export.models import TIMM, changed, perturbed, run
from tests.models.samples import TEXTS, pictures, sounds, tokenizer
from tests.models.transformers_models import DUAL, WORDS, saved


def pads_alike(extractor) -> bool:
    """Tell whether short sounds are padded in the extractor's way when a batch is asked for, as sentence-transformers does.

    Older versions of transformers did not: their features were others.
    """
    short, options = np.array([0.1, -0.2] * 200), {"sampling_rate": 8000, "return_tensors": "pt"}
    return torch.equal(*(extractor(short, **options, **more)["input_features"] for more in ({}, {"padding": True})))


@pytest.mark.parametrize("kind", ["clip", "siglip", "clap"])
def test_dual_encoders_are_normalised(kind, tmp_path):
    made = DUAL[kind]()
    perturbed(made[0], 0.02)
    source, out = saved(made, tmp_path / "source"), tmp_path / "out"
    if kind == "clap" and not pads_alike(made[1].feature_extractor):
        with pytest.raises(UserError, match="differ from the model's by up to .*: it was not written"):
            export_model(source, out, "sentence-transformers")
        return
    export_model(source, out, "sentence-transformers")
    theirs, model = SentenceTransformer(str(out), device="cpu"), mmcontrast.load(source)
    texts = theirs.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(texts, model.embed(texts=TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(mmcontrast.load(out).embed(texts=TEXTS), texts, atol=1e-5, rtol=0)
    if kind == "clap":
        files = sounds(tmp_path, 8000, (0.4, 0.7))
        given = [{"array": model.model.modality("audio").decode(f.read_bytes()).numpy(), "sampling_rate": 8000} for f in files]
        torch.testing.assert_close(theirs.encode(given, convert_to_tensor=True), model.embed(audio=files), atol=1e-5, rtol=0)
    else:
        files = pictures(tmp_path)
        rows = theirs.encode([Image.open(file) for file in files], convert_to_tensor=True)
        torch.testing.assert_close(rows, model.embed(images=files), atol=1e-5, rtol=0)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-5, rtol=0)


def test_text_encoders_with_their_pooling_and_projection(tmp_path):
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model("bert", **WORDS))
    perturbed(network)
    network.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    long = [*TEXTS, " ".join(TEXTS)]
    for pooling in ("mean", "first", "last"):
        export_model(tmp_path / "bert", tmp_path / pooling, "sentence-transformers", pooling=pooling)
        theirs = SentenceTransformer(str(tmp_path / pooling), device="cpu")
        expected = mmcontrast.load(tmp_path / "bert", pooling=pooling).embed(texts=long)
        torch.testing.assert_close(theirs.encode(long, convert_to_tensor=True), expected, atol=1e-5, rtol=0)
        opened = mmcontrast.load(tmp_path / pooling)  # as what it says that it is
        torch.testing.assert_close(opened.embed(texts=long), expected, atol=1e-5, rtol=0)
    module = SentenceTransformer(str(tmp_path / "first"), device="cpu")
    module.prompts, module.default_prompt_name = {"q": "a photo of "}, "q"
    module.save(str(tmp_path / "settings"))  # and, as most models on the hub have it:
    (tmp_path / "settings" / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": false}')
    module = SentenceTransformer(str(tmp_path / "settings"), device="cpu")
    assert module.max_seq_length == 6
    with pytest.warns(match="sentence-transformers begins each text with 'a photo of ', which is not done here"):
        settings = sentence_settings(str(tmp_path / "settings"))
    assert settings == SentenceSettings("first", 6)
    with pytest.warns(match="sentence-transformers begins each text with 'a photo of '"):
        assert sentence_settings(str(tmp_path / "settings"), "mean") == SentenceSettings("mean", 6)
    expected = module.encode(long, convert_to_tensor=True, prompt="")
    torch.testing.assert_close(mmcontrast.load(tmp_path / "settings").embed(texts=long), expected, atol=1e-5, rtol=0)
    text = {"type": "text", "tokenizer": str(tmp_path / "bert"), "context_length": 12}
    tower = {"type": "transformers", "model": str(tmp_path / "bert"), "pretrained": True}
    source = run(tmp_path / "run", changed(towers__text=tower, fields__text__modality=text))
    export_model(source, tmp_path / "out", "sentence-transformers", fields=["text"])
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    expected = mmcontrast.load(source).embed(texts=long)
    torch.testing.assert_close(theirs.encode(long, convert_to_tensor=True), expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="with Dense, which is not read here"):
        mmcontrast.load(tmp_path / "out")
    with pytest.raises(UserError, match="VisionTextDualEncoderModel"):
        export_model(source, tmp_path / "whole", "sentence-transformers")
    with pytest.raises(UserError, match="takes text encoders of transformers"):
        export_model(run(tmp_path / "timm", TIMM), tmp_path / "whole", "sentence-transformers", fields=["image"])


def test_settings_are_those_of_the_hub_too(tmp_path, monkeypatch):
    """A name in the hub's cache, as its own library lays it out; a name that is not there has none."""
    modules = [models.Transformer(str(saved_bert(tmp_path)), max_seq_length=9), models.Pooling(WORDS["hidden_size"], "cls")]
    snapshot = tmp_path / "hub" / "models--lab--bge" / "snapshots" / ("a" * 40)
    SentenceTransformer(modules=modules, device="cpu").save(str(snapshot))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert sentence_settings("lab/bge").pooling == sentence_settings(str(snapshot)).pooling == "first"
    assert sentence_settings("lab/other") == sentence_settings("not a name") == SentenceSettings()


def saved_bert(folder):
    hf.AutoModel.from_config(hf.AutoConfig.for_model("bert", **WORDS)).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    return folder / "bert"
