"""Texts through towers: the features of the source library's own call on the same text, whatever stands beside it."""

import json

import open_clip
import pytest
import torch
import transformers as hf

from mmcontrast.components import build
from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality
from mmcontrast.models import TOWERS, make_model
from mmcontrast.models.options import FieldOptions, ModelOptions
from tests.tokenizers import CAPTIONS, LONG, TOKENIZERS

FNET = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 400}  # without attention
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 400}
LENGTH = 24
TEXTS = [*CAPTIONS, LONG, "<|endoftext|> in the middle <|endoftext|> and at the end </s> <pad> [SEP] [PAD]<|endoftext|>"]
OPEN_CLIP_TEXTS = [*CAPTIONS, "", LONG, "<end_of_text> in the middle", "!<end_of_text>", "&amp; ﬁ"]
NETWORKS = {
    "bert": ("bert", SMALL),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 400}),
    "gpt2 padded by its end": ("qwen2", SMALL | {"num_key_value_heads": 2}),
    "llama padded before": ("llama", SMALL),
    "roberta": ("roberta", SMALL | {"max_position_embeddings": LENGTH + 2, "pad_token_id": 1}),
    "t5": ("t5", {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 400}),
}


def made(folder, spec, length=LENGTH, tokenizer=None, dim=16):
    """A tower of a field of texts, as a config makes it."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    modality = {"type": "text", "context_length": length, "tokenizer": "open_clip" if tokenizer is None else str(folder)}
    fields = {name: FieldOptions(modality=modality, tower="text") for name in ("text", "mined")}
    return make_model(fields, {"text": spec}, ModelOptions(embed_dim=dim, projection="linear"), 0).eval()


def features(model, texts):
    modality = model.modality("text")
    with torch.no_grad():
        return model.towers["text"](modality.collate([modality.transform(text, False) for text in texts]))


@pytest.mark.parametrize("kind", NETWORKS)
def test_hugging_face_models(kind, tmp_path):
    """The tokenizer's own call on one text, the model's own on its ids, pooled by hand."""
    words, (name, config) = TOKENIZERS[kind](), NETWORKS[kind]
    if name == "t5":
        hf.T5EncoderModel(hf.T5Config(**config)).save_pretrained(tmp_path)
        spec = {"type": "transformers", "model": hf.T5EncoderModel.from_pretrained(tmp_path)}
    else:
        spec = {"type": "transformers", "model": name, "config": config}
    for pooling in ("mean", "first", "last"):
        for chunks in (1, 3):
            model = made(tmp_path / "words", {**spec, "pooling": pooling, "length_chunks": chunks}, tokenizer=words)
            found, network = features(model, TEXTS), model.towers["text"].network
            for row, text in zip(found, TEXTS, strict=True):
                with torch.no_grad():
                    inputs = words(text, return_tensors="pt", truncation=True, max_length=LENGTH, return_token_type_ids=False)
                    hidden = network(**inputs).last_hidden_state[0]
                expected = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
                torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
    if kind != "gpt2":
        return
    embedder = Embedder(model, "mine", "cpu")  # the last one: its padding is nothing
    with pytest.raises(UserError, match=r"texts\[1\]: a text without tokens"):
        embedder.embed(texts=["a", ""])
    together = embedder.embed(texts=CAPTIONS)
    torch.testing.assert_close(together, torch.cat([embedder.embed(texts=[text]) for text in CAPTIONS]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool_type": "eos", "eos_id": 49407},
        {"pool_type": "last", "no_causal_mask": True},
        {"pool_type": "first", "no_causal_mask": True, "use_pad_mask": True},
        {"embed_cls": True, "output_tokens": True},
    ],
)
def test_open_clips_transformer_by_its_tokenizer(options, tmp_path):
    spec = {"type": "open_clip_text", "width": 16, "layers": 2, "heads": 2, "context_length": LENGTH, **options}
    for length in (LENGTH, 9):
        model = made(tmp_path, spec, length)
        with torch.no_grad():
            tokens = open_clip.SimpleTokenizer(context_length=length)(OPEN_CLIP_TEXTS)
            whole = model.towers["text"].network(torch.nn.functional.pad(tokens, (0, LENGTH - length)))
            whole = whole[0] if isinstance(whole, tuple) else whole
        found = features(model, OPEN_CLIP_TEXTS)
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
        assert len(torch.unique(found[:8].round(decimals=4), dim=0)) == 8, "different texts have different features"


@pytest.mark.parametrize("kind", ["bert", "llama padded before", "roberta"])
def test_open_clips_transformer_by_hugging_faces_tokenizers(kind, tmp_path):
    """On the tokenizer's own side, to the whole context, as open_clip's HFTokenizer pads."""
    words = TOKENIZERS[kind]()
    spec = {"type": "open_clip_text", "width": 16, "layers": 2, "heads": 2, "context_length": LENGTH, "vocab_size": 400}
    model = made(tmp_path, {**spec, "no_causal_mask": True, "pool_type": "last"}, LENGTH, words)
    texts = [" ".join(text.split()) for text in CAPTIONS]
    tokens = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=LENGTH)(texts)
    with torch.no_grad():
        torch.testing.assert_close(features(model, texts), model.towers["text"].network(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_open_clips_hugging_face_towers(kind, tmp_path):
    words, config = TOKENIZERS[kind](), SMALL | {"max_position_embeddings": LENGTH + 2 * (kind == "roberta")}
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model(kind, **config, pad_token_id=words.pad_token_id))
    network.save_pretrained(tmp_path / "text")
    words.save_pretrained(tmp_path)
    names = {"hf_model_name": str(tmp_path / "text"), "hf_tokenizer_name": str(tmp_path), "hf_proj_type": "mlp"}
    whole = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {**names, "hf_pooler_type": "mean_pooler", "context_length": LENGTH},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": whole}))
    spec = {"type": "open_clip", "model": f"local-dir:{tmp_path}", "part": "text"}
    model = made(tmp_path, spec, LENGTH, words)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(features(model, CAPTIONS), model.towers["text"].network(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=rf"fields.text: context_length={LENGTH + 1} for a tower that takes texts of {LENGTH}"):
        made(tmp_path, spec, LENGTH + 1, words)
    with pytest.raises(UserError, match="fields.text: its tower is the image half of a model"):
        made(tmp_path, {**spec, "part": "image"}, LENGTH, words)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        (None, {"type": "transformers", "model": "bert", "config": SMALL}, "ids up to 49407, for a tower of vocab_size=400"),
        ("bert", {"model": "bert", "config": SMALL | {"max_position_embeddings": 16}}, "that takes texts of 16 tokens: set"),
        ("gpt2", {"model": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}}, "texts of 8 tokens"),
        ("roberta", {"model": "roberta", "config": SMALL | {"max_position_embeddings": 25, "pad_token_id": 1}}, "texts of 23"),
        ("bert", {"model": "fnet", "config": FNET}, "takes no attention_mask"),
        (None, {"type": "open_clip_text", "context_length": 16}, "context_length=24 for a tower that takes texts of 16 tokens"),
        ("bert", {"type": "open_clip_text", "vocab_size": 400}, r"highest id of a text for its end \(pool_type argmax\)"),
        ("gpt2", {"type": "open_clip_text", "vocab_size": 400, "pool_type": "last"}, "has no padding token"),
        (
            "roberta",
            {"type": "open_clip_text", "vocab_size": 400, "embed_cls": True},
            "pads with id 1, the tower leaves out id 0",
        ),
        ("bert", {"type": "open_clip_text", "vocab_size": 400, "pool_type": "eos", "eos_id": 7}, "takes id 7 for the end"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(kind, spec, message, tmp_path):
    sizes = {"width": 16, "layers": 1, "heads": 2} if spec.get("type") == "open_clip_text" else {}
    with pytest.raises(UserError, match=message):
        made(tmp_path, {"type": "transformers"} | sizes | spec, LENGTH, kind and TOKENIZERS[kind]())


def test_fields_of_one_tower_have_one_tokenizer(tmp_path):
    TOKENIZERS["bert"]().save_pretrained(tmp_path)
    modalities = [{"type": "text", "context_length": 8, "tokenizer": name} for name in ("open_clip", str(tmp_path))]
    fields = {name: FieldOptions(modality=one, tower="text") for name, one in zip("ab", modalities, strict=True)}
    spec = {"type": "transformers", "model": "bert", "config": SMALL | {"vocab_size": 49408}}
    with pytest.raises(UserError, match="fields.b: its tokenizer is .*, that of another field of its tower open_clip"):
        make_model(fields, {"text": spec}, ModelOptions(), 0)


def test_lengths_are_of_texts_alone():
    config = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    with pytest.raises(UserError, match="length_chunks is for texts"):
        build({"type": "transformers", "model": "vit", "config": config, "length_chunks": 2}, TOWERS, "tower")


def test_a_batch_of_texts_is_any_librarys_padding_away():
    """Check that a tower of one's own gets ids, and −1 as padding."""
    modality = TextModality(context_length=6)
    assert modality.collate([modality.tokens("!"), modality.tokens("a ! b")]).tolist() == [
        [49406, 256, 49407, -1, -1],
        [49406, 320, 256, 321, 49407],
    ]
