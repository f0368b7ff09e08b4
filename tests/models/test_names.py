"""Whose model a name is; and what is said where there is none."""

import json

import pytest
import transformers

import mmcontrast
from mmcontrast.errors import UserError
from mmcontrast.models import TransformersTower, resolved


@pytest.mark.parametrize(
    ("name", "library", "taken"),
    [
        ("ViT-B-32", "open_clip", "ViT-B-32"),
        ("ViT-B-32/laion2b_s34b_b79k", "open_clip", "ViT-B-32/laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32/openai", "open_clip", "ViT-B-32/openai"),
        ("open_clip:laion/some-model", "open_clip", "hf-hub:laion/some-model"),
        ("hf-hub:laion/CLIP-ViT-B-32", "open_clip", "hf-hub:laion/CLIP-ViT-B-32"),
        ("hf-hub:timm/ViT-B-16-SigLIP", "open_clip", "hf-hub:timm/ViT-B-16-SigLIP"),
        ("hf-hub:timm/vit_base_patch16_224.augreg_in21k", "timm", "hf-hub:timm/vit_base_patch16_224.augreg_in21k"),
        ("timm/vit_base_patch16_224.augreg_in21k", "timm", "hf-hub:timm/vit_base_patch16_224.augreg_in21k"),
        ("timm:vit_base_patch16_224", "timm", "vit_base_patch16_224"),
        ("timm:org/name", "timm", "hf-hub:org/name"),
        ("resnet50.a1_in1k", "timm", "resnet50.a1_in1k"),
        ("openai/clip-vit-base-patch32", "transformers", "openai/clip-vit-base-patch32"),
        ("transformers:bert-base-uncased", "transformers", "bert-base-uncased"),
    ],
)
def test_whose_model_a_name_is(name, library, taken):
    assert resolved(name) == (library, taken)


@pytest.mark.parametrize("kind", ["open_clip", "timm", "transformers"])
def test_a_folders_model_is_by_its_config(tmp_path, kind, monkeypatch):
    config = {"open_clip": "{}", "timm": '{"architecture": "resnet18"}', "transformers": '{"model_type": "clip"}'}[kind]
    folder = tmp_path / "ViT-B-32"  # a folder goes before an architecture
    folder.mkdir()
    (folder / ("open_clip_config.json" if kind == "open_clip" else "config.json")).write_text(config)
    monkeypatch.chdir(tmp_path)
    assert resolved("ViT-B-32")[0] == resolved(f"{kind}:{folder}")[0] == resolved(f"local-dir:{folder}")[0] == kind
    other = {"open_clip": "timm", "timm": "transformers", "transformers": "open_clip"}[kind]
    with pytest.raises(UserError, match=f"is a folder of {kind}, not of {other}"):
        resolved(f"{other}:{folder}")


def test_a_folder_that_is_no_model_hides_no_architecture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet50").mkdir()
    assert resolved("resnet50") == resolved("timm:resnet50") == ("timm", "resnet50")
    (tmp_path / "runs" / "none").mkdir(parents=True)
    for name in ("runs/none", "transformers:runs/none", str(tmp_path / "runs")):
        with pytest.raises(UserError, match="holds no model: neither config.yaml"):
            resolved(name)


def test_an_adapter_of_peft_is_refused(tmp_path):
    """As peft's save_pretrained leaves it; transformers reads it or not, as peft is installed or not."""
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "bert-base-uncased", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for name in (str(tmp_path), f"transformers:{tmp_path}"):
        with pytest.raises(UserError, match="holds an adapter of peft .* merge it first"):
            resolved(name)
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds an adapter of peft"):
        mmcontrast.load(str(tmp_path))
    with pytest.raises(UserError, match="holds an adapter of peft"):
        TransformersTower(str(tmp_path), pretrained=True)


@pytest.mark.parametrize(
    "name", ["ViT-B-32/laion2b_s34b_b79k", "hf-hub:laion/CLIP-ViT-B-32", "timm:test_vit", "openai/clip-vit-base-patch32"]
)
def test_offline_and_not_in_the_cache_is_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="neither a folder nor in the local cache") as error:
        mmcontrast.load(name)
    assert "\n" not in str(error.value) and str(error.value).startswith(name)


def test_unknown_names_have_near_ones(tmp_path):
    with pytest.raises(UserError, match=r"no model 'ViT-B-3': .*did you mean .*ViT-B-32"):
        mmcontrast.load("ViT-B-3")
    with pytest.raises(UserError, match=r"no model 'resnet_50': .*did you mean .*resnet50"):
        mmcontrast.load("resnet_50")
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UserError, match=r"weights.pt is a file: name the architecture that it holds, with pretrained="):
        mmcontrast.load(tmp_path / "weights.pt")
