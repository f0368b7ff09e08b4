"""Every adapter gives features [N, width] with gradients, equals what its library computes, and names mistakes."""

import json

import pytest
import torch
import transformers

from mmcontrast import libraries
from mmcontrast.components import build
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, TextModality
from mmcontrast.models import TOWERS, make_modalities, make_model
from mmcontrast.models.open_clip import open_open_clip, quick_gelu
from mmcontrast.models.options import FieldOptions, ModelOptions

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CASES = {
    "timm resnet": ({"type": "timm", "model": "resnet18", "in_chans": 1}, torch.randn(3, 1, 32, 32)),
    "timm vit": ({"type": "timm", "model": "test_vit", "img_size": 32}, torch.randn(3, 3, 32, 32)),
    "transformers bert": ({"type": "transformers", "model": "bert", "config": SMALL | {"vocab_size": 49408}}, "text"),
    "transformers vit": (
        {"type": "transformers", "model": "vit", "pooling": "first",
         "config": SMALL | {"image_size": 32}},
        torch.randn(3, 3, 32, 32),
    ),
    "open_clip text": ({"type": "open_clip_text", "width": 16, "layers": 1, "heads": 2, "context_length": 12}, "text"),
    "linear": ({"type": "linear", "inputs": 5, "width": 7}, torch.randn(3, 5)),
}  # fmt: skip


def tokens():
    modality = TextModality(context_length=12)
    texts = ["a", "greek small letter alpha", "latin capital letter e"]
    return modality.collate([modality.transform(text, False) for text in texts])


@pytest.mark.parametrize("case", CASES)
def test_features_have_the_towers_width(case):
    spec, batch = CASES[case]
    tower = build(spec, TOWERS, "tower")
    features = tower(tokens() if batch == "text" else batch)
    assert features.shape == (3, tower.width)
    features.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in tower.parameters())


@pytest.mark.parametrize("part", ["image", "text"])
def test_halves_of_open_clip_models_are_open_clips(part, architectures):
    import open_clip

    torch.manual_seed(0)
    whole = open_clip.create_model("tiny-resnet", force_custom_text=True).eval()
    torch.manual_seed(0)
    tower = build({"type": "open_clip", "model": "tiny-resnet", "part": part}, TOWERS, "tower").eval()
    with torch.no_grad():
        if part == "image":
            batch = torch.randn(1, 3, 64, 64)
            torch.testing.assert_close(tower(batch), whole.encode_image(batch))
        else:
            torch.testing.assert_close(
                tower(tokens()),
                whole.encode_text(open_clip.tokenize(["a", "greek small letter alpha", "latin capital letter e"], 24)),
            )


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_does_not_change_text_features(pooling):
    spec = {"type": "transformers", "model": "bert", "config": SMALL | {"vocab_size": 49408}, "pooling": pooling}
    tower = build(spec, TOWERS, "tower").eval()
    batch = tokens()
    alone = tower(batch[:1, : int((batch[0] >= 0).sum())])
    torch.testing.assert_close(tower(batch)[:1], alone)
    chunked = build({**spec, "length_chunks": 2}, TOWERS, "tower").eval()
    chunked.load_state_dict(tower.state_dict())
    torch.testing.assert_close(chunked(batch), tower(batch))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "timm", "model": "resnet1b"}, "timm has no model 'resnet1b'; did you mean"),
        ({"type": "timm", "model": "resnet18", "colour": 1}, "refuses an option"),
        ({"type": "open_clip", "model": "ViT-B-33", "part": "image"}, "open_clip has no model 'ViT-B-33'"),
        ({"type": "open_clip", "model": "ViT-B-32", "part": "sound"}, "part must be 'image' or 'text'"),
        ({"type": "transformers", "model": "brt"}, "transformers tower 'brt'"),
        ({"type": "open_clip_text", "width": 16, "layers": 1}, "missing a required argument: 'heads'"),
        ({"type": "timm", "model": "test_vit", "patch_size": 0}, "timm's 'test_vit' refuses an option.*ZeroDivisionError"),
        ({"type": "timm", "model": "test_vit", "num_heads": 7}, "timm's 'test_vit' refuses an option"),
        ({"type": "timm", "model": "test_vit", "embed_dim": -4}, "timm's 'test_vit' refuses an option"),
        ({"type": "timm", "model": "test_vit", "pretrained": True}, "timm's 'test_vit' .* has no weights"),
        ({"type": "timm", "model": "test_vit", "pretrained": "/no/such.pt"}, "timm's 'test_vit' .*: no file /no/such.pt"),
        (
            {"type": "open_clip", "model": "RN50", "part": "image", "pretrained_image_path": "/no/such.pt"},
            "no file /no/such.pt",
        ),
        ({"type": "transformers", "model": "bert", "pretrained": "/no/such"}, "name the folder in model"),
        ({"type": "transformers", "model": "bert", "length_chunks": 0}, "length_chunks=0 must be 1 or more"),
        ({"type": "linear", "inputs": 3, "width": 0}, "inputs=3, width=0"),
        ({"type": "open_clip_text", "width": 16, "layers": 1, "heads": 3}, "open_clip's text transformer refuses an option"),
        ({"type": "open_clip_text", "width": 16, "layers": 1, "heads": 2, "pool_type": "x"}, "transformer refuses an option"),
        ({"type": "open_clip", "model": "RN50", "part": "image", "pretrained": "/no/such.pt"}, "'/no/such.pt': .*known tag"),
        ({"type": "open_clip", "model": "RN50", "part": "image", "vision_cfg": {"patch_size": 0}}, "open_clip's 'RN50'"),
        ({"type": "transformers", "model": "vit", "config": SMALL | {"patch_size": 0}}, "tower 'vit': ZeroDivisionError"),
        ({"type": "transformers", "model": "/no/such", "pretrained": True}, "transformers tower '/no/such'"),
        ({"type": "tim"}, "unknown tower type 'tim'; did you mean 'timm'"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        build(spec, TOWERS, "tower")


@pytest.fixture
def tagged(tmp_path):
    """An architecture of open_clip's without QuickGELU, and tags of weights that were trained with and without it."""
    import open_clip

    sizes = {"vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    sizes |= {"text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 16, **sizes}))
    (tmp_path / "tiny-quickgelu.json").write_text(json.dumps({"embed_dim": 16, "quick_gelu": True, **sizes}))
    open_clip.add_model_config(tmp_path)
    torch.save(open_clip.create_model("tiny-quickgelu").state_dict(), tmp_path / "w.pt")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    tags = {"openai": {"file": str(tmp_path / "w.pt"), "quick_gelu": True}, "laion": {"file": str(tmp_path / "w.pt")}}
    open_clip.pretrained._PRETRAINED["tiny"] = tags
    yield tmp_path
    open_clip.factory._MODEL_CONFIG_PATHS.pop()
    for name in ("tiny", "tiny-quickgelu"):
        del open_clip.factory._MODEL_CONFIGS[name]
    del open_clip.pretrained._PRETRAINED["tiny"]


@pytest.mark.parametrize(
    ("model", "pretrained", "same"),
    [
        ("tiny", "openai", "tiny-quickgelu"),
        ("tiny", "laion", "tiny"),
        ("tiny-quickgelu", "w.pt", "tiny-quickgelu"),
        ("tiny", None, "tiny"),
    ],
)
def test_weights_that_were_trained_with_quick_gelu_get_it(tagged, model, pretrained, same):
    """The features of the architecture that open_clip itself has for such weights."""
    import open_clip

    source = str(tagged / pretrained) if pretrained and pretrained.endswith(".pt") else pretrained
    whole = open_clip.create_model(same, pretrained=pretrained and str(tagged / "w.pt"), force_custom_text=True).eval()
    ids = open_clip.SimpleTokenizer(context_length=12)(["a != b", "wow!✨"])
    for part, batch, encode in (("image", torch.randn(2, 3, 32, 32), whole.encode_image), ("text", ids, whole.encode_text)):
        tower = build({"type": "open_clip", "model": model, "part": part, "pretrained": source}, TOWERS, "tower").eval()
        quick = [module for module in tower.modules() if type(module).__name__ == "QuickGELU"]
        assert bool(quick) == same.endswith("quickgelu")
        if pretrained:
            torch.testing.assert_close(tower(batch), encode(batch), atol=1e-6, rtol=1e-6)


def test_a_file_of_weights_that_may_want_quick_gelu_is_told_of(tagged, caplog):
    file = str(tagged / "w.pt")
    for model, told in (("tiny", True), ("tiny-quickgelu", False)):
        libraries._logged.clear()
        caplog.clear()
        build({"type": "open_clip", "model": model, "part": "text", "pretrained": file}, TOWERS, "tower")
        open_open_clip_quietly(model, file)
        said = [line for line in caplog.messages if "openai of tiny were trained with QuickGELU" in line]
        assert bool(said) == told and all(file in line and "open tiny-quickgelu" in line for line in said)


def test_the_architecture_that_is_named_instead_is_there():
    """Of open_clip's own table of published weights, whose names are all that a user may have a file of."""
    import open_clip

    names = open_clip.list_models()
    quick = [name for name in names if any(quick_gelu(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name))]
    plain = [name for name in quick if not open_clip.get_model_config(name).get("quick_gelu")]
    assert {"ViT-B-32", "ViT-L-14", "RN50"} <= set(plain) and all(f"{name}-quickgelu" in names for name in plain)


def open_open_clip_quietly(model, file):
    with libraries.library_messages(model):
        open_open_clip(model, file)


def test_options_that_no_config_has_are_refused(tmp_path):
    """transformers keeps them, and trains its default: here 768 wide, of 12 layers."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    for option, like in (("hiden_size", "hidden_size"), ("num_layers", "num_hidden_layers"), ("dropout", "")):
        with pytest.raises(UserError, match=f"config has no option '{option}'.*{like}"):
            build({"type": "transformers", "model": "bert", "config": small | {option: 4}}, TOWERS, "tower")
    made = {"type": "transformers", "model": "distilbert", "config": {"hidden_size": 8, "n_layers": 1, "n_heads": 2}}
    made["config"] |= {"vocab_size": 20, "hidden_dim": 8, "attn_implementation": "eager"}  # an alias; of the opening
    assert build(made, TOWERS, "tower").width == 8
    transformers.BertConfig(**small).save_pretrained(tmp_path / "bert")
    spec = {"type": "transformers", "model": str(tmp_path / "bert"), "config": {"num_hidden_layers": 2}}
    assert len(build(spec, TOWERS, "tower").network.encoder.layer) == 2
    with pytest.raises(UserError, match="config has no option 'hidden_dropout'"):
        build(spec | {"config": {"hidden_dropout": 0.0}}, TOWERS, "tower")


def test_a_file_that_holds_no_weights_is_said_in_a_line(tagged):
    for name in ("broken.pt", "tiny.json"):
        spec = {"type": "open_clip", "model": "tiny", "part": "text", "pretrained": str(tagged / name)}
        with pytest.raises(UserError, match=rf"open_clip's 'tiny' with pretrained='.*{name}': ") as error:
            build(spec, TOWERS, "tower")
        assert "\n" not in str(error.value)


def test_a_timm_towers_weights_are_those_of_its_file(tmp_path):
    import timm

    for classes in (0, 7):
        network = timm.create_model("test_vit", num_classes=classes).eval()
        torch.save(network.state_dict(), tmp_path / "w.pt")
        spec = {"type": "timm", "model": "test_vit", "pretrained": str(tmp_path / "w.pt")}
        tower, batch = build(spec, TOWERS, "tower").eval(), torch.randn(2, 3, 160, 160)
        network.reset_classifier(0)
        torch.testing.assert_close(tower(batch), network(batch))
        assert tower.width == network.num_features


def test_half_a_models_weights_are_all_there_or_refused(tagged):
    """open_clip logs what it does not find there, and goes on with random weights."""
    import open_clip

    whole = open_clip.create_model("tiny", force_custom_text=True)
    weights = whole.visual.state_dict()
    torch.save(weights, tagged / "visual.pt")
    spec = {"type": "open_clip", "model": "tiny", "part": "image", "pretrained_image_path": str(tagged / "visual.pt")}
    tower = build(spec, TOWERS, "tower")
    assert all(torch.equal(value, weights[name]) for name, value in tower.network.state_dict().items())
    torch.save({"other": torch.zeros(1)}, tagged / "visual.pt")
    with pytest.raises(
        UserError, match=r"pretrained_image_path: .*visual.pt lacks \d+ weights of its half, as class_embedding"
    ):
        build(spec, TOWERS, "tower")


WAV2VEC = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8, 8],
    "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "mask_time_prob": 0.0,
}  # fmt: skip


def test_a_waveforms_features_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    spec = {"type": "transformers", "model": "wav2vec2", "config": WAV2VEC | {"feat_extract_norm": "layer"}}
    for pooling in ("mean", "last", "first"):
        tower = build({**spec, "pooling": pooling}, TOWERS, "tower").eval()
        modality = AudioModality(seconds=1.0, representation="waveform", variable=True)
        sounds = [torch.randint(-3000, 3000, (n,), dtype=torch.int16) for n in (300, 2000, 9000, 16000, 20000)]
        samples = [modality.transform(sound, False) for sound in sounds]
        with torch.no_grad():
            together = tower(modality(modality.collate(samples)))
            alone = torch.cat([tower(modality(modality.collate([sample]))) for sample in samples])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_padding_that_would_mix_into_the_features_is_refused():
    spec = {"type": "transformers", "model": "wav2vec2", "config": WAV2VEC | {"feat_extract_norm": "group"}}
    tower, waves = build(spec, TOWERS, "tower").eval(), torch.randn(2, 4000)
    assert tower(waves).shape == (2, 16)
    waves[1, 3000:] = torch.nan
    with pytest.raises(UserError, match="mixes padding into the features"):
        tower(waves)


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("bert", {"hidden_dropout_prob": 0.0}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("roberta", {"hidden_dropout_prob": 0.0}),
        ("clip_text_model", {}),
    ],
)
def test_the_tokenizers_padding_is_the_towers(model, more):
    """Whatever the model's own config says: a text's features do not depend on what stands beside it."""
    text = {"modality": {"type": "text", "context_length": 12}, "tower": "text"}
    config = SMALL | {"vocab_size": 49408} | more
    for pooling in ("mean", "last"):
        spec = {"type": "transformers", "model": model, "config": config, "pooling": pooling}
        fields = {name: FieldOptions(**text) for name in ("a", "b")}
        tower = make_model(fields, {"text": spec}, ModelOptions(embed_dim=8), 0).towers["text"].eval()
        with torch.no_grad():
            alone = tower(tokens()[:1, :3])
            torch.testing.assert_close(tower(tokens())[:1], alone, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_a_tower_is_said_in_a_line(tmp_path):
    for spec in ({"model": "clip"}, {"model": "bert", "config": {"hidden_size": "x"}}):
        with pytest.raises(UserError, match="transformers tower"):
            build({"type": "transformers", **spec}, TOWERS, "tower")
    convnext = {"hidden_sizes": [8, 8, 8, 12], "depths": [1, 1, 1, 1]}
    tower = build({"type": "transformers", "model": "convnext", "config": convnext}, TOWERS, "tower")
    assert tower(torch.randn(2, 3, 32, 32)).shape == (2, 12)
    with pytest.raises(UserError, match="tokenizer 'nope/nope'"):
        make_modalities({"a": FieldOptions(modality={"type": "text", "tokenizer": "nope/nope"}, tower="t")})


def test_a_half_precision_checkpoint_learns_in_full(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**SMALL, vocab_size=100)).to(torch.bfloat16).save_pretrained(tmp_path / "bert")
    tower = build({"type": "transformers", "model": str(tmp_path / "bert"), "pretrained": True}, TOWERS, "tower")
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
