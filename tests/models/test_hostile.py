"""Folders of other libraries that want to run code: none of it runs. A file that does not appear is the proof."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

import mmcontrast
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality
from mmcontrast.models import OpenClipTower, TimmTower, TransformersTower
from tests.models.samples import tokenizer

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPImageProcessor, ClapFeatureExtractor
class Config(BertConfig): pass
class Model(BertModel): config_class = Config
class Tokenizer(BertTokenizerFast): pass
class Images(CLIPImageProcessor): pass
class Sounds(ClapFeatureExtractor): pass
"""
AUTO = {
    "AutoConfig": "hostile.Config",
    "AutoModel": "hostile.Model",
    "AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"],
    "AutoImageProcessor": "hostile.Images",
    "AutoImageProcessorFast": ["hostile.Images", "hostile.Images"],
    "AutoFeatureExtractor": "hostile.Sounds",
    "AutoProcessor": "hostile.Images",
}


class Evil:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file. On the terminal sits somebody who says yes to everything."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def change(file: Path, **values) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A small CLIP of transformers' with all that belongs to it."""
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = tokenizer()
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    words = tokenizer()
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **small)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(tmp_path, marker):
    def copy(source: Path) -> Path:
        folder = tmp_path / f"copy {len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, folder)
        (folder / "hostile.py").write_text(CODE.format(marker=str(marker)))
        return folder

    return copy


def refused(function, marker, match=""):
    """It ends in one line, or does what it is for; no code has run."""
    try:
        function()
    except UserError as error:
        assert match in str(error) and "\n" not in str(error)  # noqa: PT017 - it need not be refused
    else:
        assert not match, "it was to be refused"
    assert not marker.exists() and not [name for name in sys.modules if "hostile" in name and "test" not in name]


FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def test_code_that_auto_map_names_is_not_run(clip, bert, copied, marker):
    for source in (clip, bert):
        for file in FILES:
            folder = copied(source)
            change(folder / file, auto_map=AUTO)
            refused(lambda folder=folder: mmcontrast.load(folder), marker)  # a class of transformers' own takes its place
        folder = copied(source)
        for file in FILES:
            change(folder / file, auto_map=AUTO)
        refused(lambda folder=folder: mmcontrast.load(folder), marker)
    folder = copied(clip)  # where transformers has no class of its own
    change(folder / "config.json", auto_map=AUTO, model_type="hostile")
    refused(lambda: mmcontrast.load(folder), marker, "custom code")
    refused(lambda: TransformersTower(str(folder), pretrained=True), marker, "custom code")
    folder = copied(clip)
    change(folder / "preprocessor_config.json", auto_map=AUTO, image_processor_type="Hostile")
    refused(lambda: mmcontrast.load(folder), marker, "custom code")
    folder = copied(bert)
    change(folder / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="Hostile")
    refused(lambda: mmcontrast.load(folder), marker)
    refused(lambda: TextModality(str(folder)), marker)


def test_a_sounds_extractor_is_not_run_either(copied, marker, tmp_path):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Wav2Vec2Config(
        **small, conv_dim=[8], conv_stride=[4], conv_kernel=[4], num_feat_extract_layers=1, num_conv_pos_embedding_groups=2
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "sound")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "sound")
    for changes in ({"auto_map": AUTO}, {"auto_map": AUTO, "feature_extractor_type": "Hostile"}):
        folder = copied(tmp_path / "sound")
        change(folder / "preprocessor_config.json", **changes)
        refused(lambda folder=folder: mmcontrast.load(folder), marker, "custom code" if len(changes) > 1 else "")


def test_attention_of_the_hub_is_refused(bert, copied, marker):
    for key in ("attn_implementation", "_attn_implementation"):
        folder = copied(bert)
        change(folder / "config.json", **{key: "somebody/kernel"})
        refused(lambda folder=folder: mmcontrast.load(folder), marker)
        refused(lambda folder=folder: TransformersTower(str(folder), pretrained=True), marker)
    for name in ("somebody/kernel", "somebody/kernel:function"):
        refused(lambda name=name: TransformersTower("bert", {"attn_implementation": name}), marker, "for its attention")
    refused(lambda: TransformersTower(str(bert), {"trust_remote_code": True}, True), marker, "never done here")


@pytest.fixture(scope="module")
def open_clips(tmp_path_factory) -> Path:
    """A folder as open_clip saves it."""
    folder = tmp_path_factory.mktemp("open_clip")
    model = {"embed_dim": 8, "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}}
    model |= {"text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}}
    change(folder / "open_clip_config.json", model_cfg=model, preprocess_cfg={})
    save_file(open_clip.CustomTextCLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def of_text(folder: Path, **values) -> None:
    file = folder / "open_clip_config.json"
    tree = json.loads(file.read_text())
    tree["model_cfg"]["text_cfg"] |= values
    file.write_text(json.dumps(tree))


def test_an_open_clip_folder_runs_no_code(open_clips, bert, copied, marker):
    assert mmcontrast.load(open_clips).embed(texts=["a"]).shape == (1, 8)
    elsewhere = copied(bert)
    change(elsewhere / "config.json", auto_map=AUTO, model_type="hostile")
    change(elsewhere / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="Hostile")
    for kwargs in ({}, {"trust_remote_code": True}, {"trust_remote_code": True, "use_fast": False}):
        for name in (".", str(elsewhere), "somebody/hostile"):
            folder = copied(open_clips)
            for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
                shutil.copy(elsewhere / file, folder / file)
            of_text(folder, hf_tokenizer_name=name, tokenizer_kwargs=kwargs)
            refused(lambda folder=folder: mmcontrast.load(folder), marker)
            refused(lambda folder=folder: OpenClipTower(f"local-dir:{folder}", "text"), marker)
    folder = copied(open_clips)
    of_text(folder, hf_tokenizer_name=".", tokenizer_kwargs={"trust_remote_code": True})
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(elsewhere / file, folder / file)
    refused(lambda: mmcontrast.load(folder), marker, "never done here")
    folder = copied(open_clips)
    of_text(folder, hf_model_name=str(elsewhere), hf_tokenizer_name=".", hf_proj_type="linear", hf_pooler_type="mean_pooler")
    refused(lambda: mmcontrast.load(folder), marker, "never done here")
    refused(lambda: OpenClipTower(f"local-dir:{folder}", "text"), marker, "never done here")


def pickles(marker: Path, folder: Path) -> list[Path]:
    """Checkpoints that make the file when they are unpickled: torch's two formats, and a plain pickle."""
    evil = {"state_dict": {"weight": torch.zeros(2)}, "epoch": Evil(marker)}
    torch.save(evil, folder / "zip.pt")
    torch.save(evil, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "plain.pt").write_bytes(pickle.dumps(evil, protocol=2))
    return [folder / name for name in ("zip.pt", "old.pt", "plain.pt")]


def test_pickles_are_not_unpickled(clip, bert, open_clips, copied, marker, tmp_path):
    network = timm.create_model("resnet18", num_classes=2, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
    (tmp_path / "timm").mkdir()
    change(
        tmp_path / "timm" / "config.json",
        architecture="resnet18",
        num_classes=2,
        model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        pretrained_cfg={"input_size": [3, 32, 32], "classifier": "fc", "first_conv": "conv1"},
    )
    save_file(network.state_dict(), tmp_path / "timm" / "model.safetensors")
    assert mmcontrast.load(tmp_path / "timm").fields == ["image"]
    named = {clip: "pytorch_model.bin", open_clips: "open_clip_pytorch_model.bin", tmp_path / "timm": "pytorch_model.bin"}
    for number, checkpoint in enumerate(pickles(marker, tmp_path)):
        for source, name in list(named.items())[: None if number == 0 else 1]:
            folder = copied(source)
            for weights in folder.glob("*.safetensors"):
                weights.unlink()
            shutil.copy(checkpoint, folder / name)
            refused(lambda folder=folder: mmcontrast.load(folder), marker, str(folder.name))
        refused(lambda c=checkpoint: mmcontrast.load("resnet18", pretrained=c), marker, "resnet18")
        spec = {"model": "ViT-S-32-alt", "part": "image", "pretrained": str(checkpoint), "weights_only": False}
        refused(lambda spec=spec: OpenClipTower(**spec), marker, "ViT-S-32-alt")
        overlay = {"file": str(checkpoint)}
        refused(lambda o=overlay: TimmTower("resnet18", pretrained=True, pretrained_cfg_overlay=o), marker, "resnet18")
        refused(lambda c=checkpoint: TimmTower("resnet18", checkpoint_path=str(c)), marker, "resnet18")
        folder = copied(bert)
        (folder / "model.safetensors").unlink()
        shutil.copy(checkpoint, folder / "pytorch_model.bin")
        refused(lambda folder=folder: TransformersTower(str(folder), {"weights_only": False}, True), marker, folder.name)


def test_parts_of_weights_lie_beside_their_index(clip, copied, marker):
    for part in ("../elsewhere.safetensors", "/tmp/elsewhere.safetensors", "a/../../b.bin", 3):
        for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            folder = copied(clip)
            (folder / "model.safetensors").unlink()
            change(folder / name, metadata={}, weight_map={"logit_scale": part})
            refused(lambda folder=folder: mmcontrast.load(folder), marker, "lie beside it")


def test_what_the_user_does_elsewhere_is_as_it_was(clip, monkeypatch):
    import os

    import transformers.dynamic_module_utils as remote

    before = remote.get_cached_module_file, remote.TIME_OUT_REMOTE_CODE, dict(os.environ)
    mmcontrast.load(clip)
    with pytest.raises(UserError):
        mmcontrast.load(clip, pretrained="x")
    assert before == (remote.get_cached_module_file, remote.TIME_OUT_REMOTE_CODE, dict(os.environ))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mmcontrast.load(clip)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
