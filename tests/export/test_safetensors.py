"""Our own folders: they open with what is in them alone, as what was exported, and are refused where they would run code."""

import json
import shutil

import pytest
import timm
import torch
import transformers as hf
from timm.models import save_for_hf

import mmcontrast
from mmcontrast.errors import UserError
from mmcontrast.export.folder import export_model
from mmcontrast.models import OpenClipTower, TransformersTower
from tests.export.models import TIMM, changed, perturbed, run
from tests.models.open_clip_models import save
from tests.models.samples import TEXTS, pictures, tokenizer
from tests.models.transformers_models import WORDS


class TrustedTower(TransformersTower):
    """A tower that a config names by import path."""


def same(first, second):
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_composed_models_need_nothing_but_their_folder(tmp_path):
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model("bert", **WORDS))
    network.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    text = {"type": "text", "tokenizer": str(tmp_path / "bert"), "context_length": 16}
    options = {"towers__text": {"type": "transformers", "model": str(tmp_path / "bert"), "pretrained": True, "pooling": "last"}}
    options |= {"fields__text__modality": text, "fields__text__keys": ["json:caption"]}
    options |= {"fields__audio": {"modality": {"type": "vector", "width": 4}, "tower": "audio"}}
    options |= {"towers__audio": {"type": "linear", "inputs": 4, "width": 8}, "model__scale_per_pair": True}
    source = run(tmp_path / "run", changed(**options))
    model, values = mmcontrast.load(source), {"images": pictures(tmp_path)}
    export_model(source, tmp_path / "out", "safetensors")
    export_model(source, tmp_path / "part", "safetensors", fields=["text", "image"])
    shutil.rmtree(tmp_path / "bert")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    for folder in (tmp_path / "elsewhere", tmp_path / "part"):
        again = mmcontrast.load(folder)
        assert torch.equal(again.embed(**values), model.embed(**values))
        assert torch.equal(again.embed(texts=TEXTS), model.embed(texts=TEXTS))
        assert again.keys == {"text": ["json:caption"]}
    same(mmcontrast.load(tmp_path / "elsewhere").model.state_dict(), model.model.state_dict())
    pair = model.model.pairs.index(("image", "text"))
    torch.testing.assert_close(again.model.log_logit_scale, model.model.log_logit_scale[[pair]])
    export_model(tmp_path / "elsewhere", tmp_path / "again", "safetensors")
    same(mmcontrast.load(tmp_path / "again").model.state_dict(), model.model.state_dict())


def test_models_of_libraries_lie_in_their_librarys_folder(tmp_path):
    save_for_hf(timm.create_model("test_vit", num_classes=5), str(tmp_path / "vit"), safe_serialization=True)
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model("bert", **WORDS))
    perturbed(network)
    network.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    values = {"vit": {"images": pictures(tmp_path)}, "bert": {"texts": TEXTS}, "coca": {"texts": TEXTS}}
    for name, pooling in (("vit", None), ("bert", "first"), ("coca", None)):
        source = save(tmp_path / name, name) if name == "coca" else tmp_path / name
        expected = mmcontrast.load(source, pooling=pooling)
        export_model(source, tmp_path / f"{name}-out", "safetensors", pooling=pooling)
        again = mmcontrast.load(tmp_path / f"{name}-out")
        assert torch.equal(again.embed(**values[name]), expected.embed(**values[name]))
        same(again.model.state_dict(), expected.model.state_dict())
        with pytest.raises(UserError, match="neither pretrained nor pooling"):
            mmcontrast.load(tmp_path / f"{name}-out", pooling="mean")


def test_a_towers_options_without_the_weights_of_others(tmp_path):
    from mmcontrast.export.safetensors import _without_weights

    network = torch.nn.Identity()
    tag = {"type": "open_clip", "model": "ViT-B-32", "part": "image", "pretrained": "openai"}
    plain = {"type": "open_clip", "model": "ViT-B-32", "part": "image", "force_quick_gelu": True}
    assert _without_weights(OpenClipTower(network, "image"), tag) == plain  # its activation is its tag's
    model = changed(towers__image__pretrained=False)
    model["fields"]["image"]["modality"]["background"] = "drop"
    source = run(tmp_path / "run", model)
    export_model(source, tmp_path / "out", "safetensors")
    about = json.loads((tmp_path / "out" / "mmcontrast_model.json").read_text())
    assert about["towers"]["image"] == {"type": "timm", "model": "test_vit"}
    assert about["fields"]["image"]["modality"]["background"] == "drop"


def test_folders_from_elsewhere(tmp_path):
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 49408}
    tower = {"type": "tests.export.test_safetensors:TrustedTower", "model": "bert", "config": bert}
    source = run(tmp_path / "run", changed(towers__text=tower))
    with pytest.raises(UserError, match="--trust-code"):
        export_model(source, tmp_path / "out", "safetensors")
    export_model(source, tmp_path / "out", "safetensors", trust_code=True)
    with pytest.raises(UserError, match="--trust-code"):
        mmcontrast.load(tmp_path / "out")
    assert torch.equal(
        mmcontrast.load(tmp_path / "out", trust_code=True).embed(texts=TEXTS),
        mmcontrast.load(source, trust_code=True).embed(texts=TEXTS),
    )
    export_model(run(tmp_path / "sound", TIMM), tmp_path / "timm", "safetensors")
    file, weights = tmp_path / "timm" / "mmcontrast_model.json", tmp_path / "timm" / "model.safetensors"
    about = json.loads(file.read_text())
    broken = {
        "cannot be read": "{",
        "is not of the format": json.dumps(about | {"format": "mmcontrast model 9"}),
        "towers": json.dumps({k: v for k, v in about.items() if k != "towers"}),
        "unknown": json.dumps(about | {"fields": {"image": about["fields"]["image"] | {"unknown": 1}}}),
        "holds no model of another library": json.dumps({"format": about["format"], "library": {"folder": "../timm"}}),
    }
    for reason, text in broken.items():
        file.write_text(text)
        with pytest.raises(UserError, match=reason) as error:
            mmcontrast.load(tmp_path / "timm")
        assert "\n" not in str(error.value)
    file.write_text(json.dumps(about))
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match="timm"):
        mmcontrast.load(tmp_path / "timm")
