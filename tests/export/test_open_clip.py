"""Folders of open_clip's: what open_clip makes of them is what the model made, from the files on."""

import json

import open_clip
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mmcontrast
from mmcontrast.cli import app
from mmcontrast.errors import UserError
from mmcontrast.export.folder import PARITY, export_model
from mmcontrast.suites import open_suite, run_suite
from tests.export.blends import runs
from tests.export.models import TIMM, changed, perturbed, run
from tests.models.open_clip_models import MODELS, save
from tests.models.samples import TEXTS, pictures, tokenizer
from tests.models.transformers_models import WORDS


def outputs(folder, files):
    """Embeddings, scale and bias by open_clip alone."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]), normalize=True)
        texts = model.encode_text(tokenize(TEXTS), normalize=True)
    bias = torch.zeros(()) if model.logit_bias is None else model.logit_bias.detach()
    return images, texts, model.logit_scale.detach().exp(), bias


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_open_clips_goes_back_unchanged(kind, tmp_path):
    source, out, files = save(tmp_path / kind, kind), tmp_path / "out", pictures(tmp_path)
    tensors = load_file(source / "open_clip_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    tensors = {n: v + 0.03 * torch.rand(v.shape, generator=generator) for n, v in tensors.items() if v.is_floating_point()}
    save_file(tensors, source / "open_clip_model.safetensors")
    (source / "open_clip_pytorch_model.bin").unlink(missing_ok=True)
    about = export_model(source, out, "open_clip")
    assert all(entry["largest_difference"] < 1e-6 for entry in about["fields"].values())
    for ours, theirs in zip(outputs(out, files), outputs(source, files), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    written = load_file(out / "open_clip_model.safetensors")  # CoCa's decoder too
    assert {name.removeprefix("text.") for name in written} == {name.removeprefix("text.") for name in tensors}
    assert all(name in written for name in tensors) or kind == "clip"
    again, first = mmcontrast.load(out), mmcontrast.load(source)
    assert torch.equal(again.embed(images=files), first.embed(images=files))
    assert torch.equal(again.embed(texts=TEXTS), first.embed(texts=TEXTS))


COMPOSED = {
    "linear": {},
    "no projection": {"model__projection": "none", "model__embed_dim": 64, "towers__text__width": 64},
    "mlp": {"model__projection": {"image": "mlp"}, "model__embed_dim": 32, "model__logit_bias": None},
    "shorter texts": {"fields__text__modality__context_length": 12},
    "batch norm": {"towers__image__model": "test_efficientnet", "model__scale_per_pair": True},
    "folded": {
        "towers__image": {"type": "open_clip", "model": "tiny-clip", "part": "image"},
        "fields__image__modality__size": 32,
    },
}


@pytest.mark.parametrize("kind", COMPOSED)
def test_a_composed_model_is_open_clips(kind, tmp_path):
    source, out, files = run(tmp_path / "run", changed(**COMPOSED[kind])), tmp_path / "out", pictures(tmp_path)[:2]
    about = export_model(source, out, "open_clip")
    assert about["fields"]["image"]["largest_difference"] < 1e-5 and about["fields"]["image"]["pixels_apart"] < 0.02
    model = mmcontrast.load(source)
    images, texts, scale, bias = outputs(out, files)
    torch.testing.assert_close(texts, model.embed(texts=TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(images, model.embed(images=files), atol=3e-3, rtol=0)  # pictures are scaled in another way
    torch.testing.assert_close(scale, model.model.log_logit_scale.exp()[0].detach())
    torch.testing.assert_close(bias, torch.zeros(()) if model.model.logit_bias is None else model.model.logit_bias[0].detach())
    again = mmcontrast.load(out)
    torch.testing.assert_close(again.embed(images=files), images, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.embed(texts=TEXTS), texts, atol=1e-6, rtol=0)


def test_what_open_clip_cannot_express_is_refused_and_leaves_nothing(tmp_path):
    grey = {"towers__image__in_chans": 1, "fields__image__modality": {"type": "image", "size": 160, "channels": 1}}
    audio = {"fields__audio": {"modality": {"type": "vector", "width": 4}, "tower": "audio"}}
    audio |= {"towers__audio": {"type": "linear", "inputs": 4, "width": 8}}
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 49408}
    refused = {
        "not with qkv_bias": {"towers__image__qkv_bias": False},
        "not with img_size": {"towers__image__img_size": 96, "fields__image__modality__size": 96},
        "these have 1": grey,
        "here it has 64": {"model__projection": {"image": "mlp"}},
        "--fields image,text": audio,
        "not of a type or with a config": {"towers__text": {"type": "transformers", "model": "bert", "config": bert}},
        "no words for use_pad_mask": {"towers__text": TIMM["towers"]["text"] | {"use_pad_mask": True, "no_causal_mask": True}},
        "cut to 12 tokens": {
            "towers__text": TIMM["towers"]["text"] | {"no_causal_mask": True},
            "fields__text__modality__context_length": 12,
        },
        "QuickGELU": {
            "towers__image": {"type": "open_clip", "model": "tiny-clip", "part": "image", "force_quick_gelu": True},
            "fields__image__modality__size": 32,
        },
    }
    for number, (reason, options) in enumerate(refused.items()):
        source = run(tmp_path / str(number), changed(**options))
        with pytest.raises(UserError, match=reason):
            export_model(source, tmp_path / "out", "open_clip")
        if "--fields" in reason:
            export_model(source, tmp_path / "part", "open_clip", fields=["text", "image"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*map(str, range(len(refused))), "part"}


def test_places_that_are_taken(tmp_path):
    source, out = save(tmp_path / "clip", "clip"), tmp_path / "out"
    export_model(source, out, "open_clip")
    card = (out / "README.md").read_text()
    assert "license:" in card and "local-dir:out" in card and "from `clip`" in card and str(tmp_path) not in card
    with pytest.raises(UserError, match="--overwrite"):
        export_model(source, out, "open_clip")
    (out / "left").touch()
    export_model(source, out, "open_clip", overwrite=True)
    assert not (out / "left").exists() and json.loads((out / PARITY).read_text())["format"] == "open_clip"
    with pytest.raises(UserError, match="is no export"):
        export_model(source, source, "open_clip", overwrite=True)
    with pytest.raises(UserError, match="did you mean 'open_clip'"):
        export_model(source, tmp_path / "x", "openclip")
    with pytest.raises(UserError, match="no field 'sound'"):
        export_model(source, tmp_path / "x", "open_clip", fields=["image", "sound"])
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "out"}


def test_an_export_that_differs_is_not_written(tmp_path, monkeypatch):
    """The check can fail: a weight is lost on the way, or a mean, or the scale."""
    from mmcontrast.export import open_clip as writer

    source, out = run(tmp_path / "run", TIMM), tmp_path / "out"
    real = {name: getattr(writer, name) for name in ("image_half", "preprocess_config", "scale_and_bias")}

    def half(*arguments):
        found = real["image_half"](*arguments)
        found.tensors["trunk.norm.bias"] = found.tensors["trunk.norm.bias"] + 1
        return found

    def mean(*arguments):
        return real["preprocess_config"](*arguments) | {"mean": [0.5, 0.5, 0.5]}

    def scale(*arguments):
        log_scale, bias = real["scale_and_bias"](*arguments)
        return log_scale.exp(), bias

    for name, broken, reason in (
        ("image_half", half, "embeddings differ"),
        ("preprocess_config", mean, "prepares pictures otherwise"),
        ("scale_and_bias", scale, "logit_scale"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(writer, name, broken)
            with pytest.raises(UserError, match=reason):
                export_model(source, out, "open_clip")
        assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_low_rank_updates_are_merged(tmp_path):
    """A weight that is parametrized, as any library's low-rank updates are, is written as what it computes with."""
    from torch import nn
    from torch.nn.utils import parametrize

    from mmcontrast.export.parts import plain_model

    class Update(nn.Module):
        def forward(self, weight):
            return weight + 0.5

    model = mmcontrast.load(run(tmp_path / "run", TIMM)).model
    attention = model.towers["text"].network.transformer.resblocks[0].attn
    expected = attention.in_proj_weight.detach() + 0.5
    parametrize.register_parametrization(attention, "in_proj_weight", Update())
    embeddings = mmcontrast.Embedder(model, "run", "cpu").embed(texts=TEXTS)
    merged = plain_model(model)
    torch.testing.assert_close(attention.in_proj_weight.detach(), expected)
    assert not any("parametrizations" in name for name in merged.state_dict())
    torch.testing.assert_close(mmcontrast.Embedder(merged, "run", "cpu").embed(texts=TEXTS), embeddings)


def test_the_command_and_its_card(config_file, corpus, tmp_path):
    """A run that was evaluated: its results and their intervals are in the card, and the fields that do not fit are named."""
    source = runs(config_file, corpus, 1)[0]
    run_suite(str(source), open_suite(str(source), None, (), None), device="cpu", cached=False)
    out, invoke = tmp_path / "out", CliRunner().invoke
    done = invoke(app, ["export", str(source), str(out), "--format", "open_clip"])
    assert done.exit_code == 2 and "these have 1" in done.output and not out.exists()
    data = str(corpus / "val-*.tar")
    done = invoke(app, ["export", str(source), str(out), "--format", "safetensors", "--data", data, "--samples", "5"])
    assert done.exit_code == 0, done.output
    card, results = (out / "README.md").read_text(), json.loads((source / "results.json").read_text())["results"]
    name = "new/retrieval/image_to_text/recall_at_1"
    assert f"| {name} | {results[name]['value']:.3f} | {results[name]['low']:.3f} – {results[name]['high']:.3f} |" in card
    parity = json.loads((out / PARITY).read_text())
    assert parity["samples"] == data and parity["fields"]["image"] == {"samples": 5, "largest_difference": 0.0}


def test_a_text_tower_of_transformers_by_its_folder(tmp_path):
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model("bert", **WORDS))
    perturbed(network)
    network.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    text = {"type": "text", "tokenizer": str(tmp_path / "bert"), "context_length": 16}
    for pooling, projection in (("mean", "linear"), ("first", "none")):
        tower = {"type": "transformers", "model": str(tmp_path / "bert"), "pretrained": True, "pooling": pooling}
        options = {"towers__text": tower, "fields__text__modality": text}
        options |= {"model__projection": {"text": projection}, "model__embed_dim": 32}
        source = run(tmp_path / f"run-{pooling}", changed(**options))
        export_model(source, tmp_path / pooling, "open_clip")
        _, texts, _, _ = outputs(tmp_path / pooling, pictures_of(tmp_path))
        torch.testing.assert_close(texts, mmcontrast.load(source).embed(texts=TEXTS), atol=1e-5, rtol=0)
    assert "must be there where the folder is opened" in (tmp_path / "mean" / "README.md").read_text()
    last = changed(towers__text=tower | {"pooling": "last"}, fields__text__modality=text)
    with pytest.raises(UserError, match="pooling last"):
        export_model(run(tmp_path / "last", last), tmp_path / "out", "open_clip")


def pictures_of(folder):
    return sorted((folder / "pictures").iterdir())[:1] if (folder / "pictures").exists() else pictures(folder)[:1]


def test_an_architecture_with_a_checkpoint_of_its_own(tmp_path):
    torch.manual_seed(3)
    whole = open_clip.create_model("tiny-clip").eval()
    perturbed(whole, 0.02)
    torch.save(whole.state_dict(), tmp_path / "epoch.pt")
    export_model("tiny-clip", tmp_path / "out", "open_clip", pretrained=str(tmp_path / "epoch.pt"))
    tensors = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    for name, value in whole.state_dict().items():  # by the architecture's own names: it opens as its checkpoint too
        torch.testing.assert_close(tensors[name], value)
    again = mmcontrast.load("tiny-clip", pretrained=tmp_path / "out" / "open_clip_model.safetensors")
    assert torch.equal(again.embed(texts=TEXTS), mmcontrast.load(tmp_path / "out").embed(texts=TEXTS))
