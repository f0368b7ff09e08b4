"""ONNX folders, used as their card says: by embed.py alone, in a process that has neither torch nor this package."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmcontrast
from mmcontrast.errors import UserError
from mmcontrast.export.folder import export_model
from mmcontrast.export.onnx_embed import picture
from mmcontrast.modalities import ImageModality
from tests.export.models import changed, run
from tests.models.open_clip_models import save
from tests.models.samples import TEXTS, pictures, sounds
from tests.models.transformers_models import DUAL, saved

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from embed import Embedder
model, asked = Embedder(), json.load(sys.stdin)
found = {f: [model.embed(f, values).tolist(), model.embed(f, values[:1]).tolist()] for f, values in asked.items()}
assert not {"torch", "transformers", "mmcontrast"} & set(sys.modules)
print(json.dumps({"rows": found, "scale": model.scale, "bias": model.bias}))
"""


def embedded(folder, asked):
    """{field: values} by embed.py in a process of its own: rows of all, and of the first alone."""
    given = json.dumps({field: [str(value) for value in values] for field, values in asked.items()})
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {field: [torch.tensor(part) for part in parts] for field, parts in found["rows"].items()}
    return rows, found["scale"], found["bias"]


@pytest.mark.slow
def test_a_composed_model_of_three_fields_without_us(tmp_path):
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 49408}
    resnet = {"type": "timm", "model": "resnet18", "in_chans": 1, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    options = {
        "fields__image__modality": {"type": "image", "size": 32, "channels": 1},
        "fields__audio": {"modality": {"type": "audio", "seconds": 0.8, "mels": 16, "hop": 640}, "tower": "audio"},
        "fields__vector": {"modality": {"type": "vector", "width": 4}, "tower": "vector"},
        "towers__image": resnet, "towers__audio": resnet, "towers__vector": {"type": "linear", "inputs": 4, "width": 8},
        "towers__text": {"type": "transformers", "model": "bert", "config": bert, "length_chunks": 2},
    }  # fmt: skip
    source, out = run(tmp_path / "run", changed(**options)), tmp_path / "out"
    export_model(source, out, "onnx")
    vectors = []
    for number in range(3):
        vectors.append(tmp_path / f"{number}.npy")
        np.save(vectors[-1], np.random.default_rng(number).normal(size=4))
    asked = {"image": pictures(tmp_path), "text": TEXTS, "audio": sounds(tmp_path, 16000, (0.3, 0.8, 1.5)), "vector": vectors}
    model = mmcontrast.load(source)
    rows, scale, bias = embedded(out, asked)
    for field, name, tolerance in (
        ("text", "texts", 1e-5),
        ("audio", "audio", 1e-5),
        ("vector", "vectors", 1e-5),
        ("image", "images", 5e-3),
    ):
        expected = model.embed(**{name: asked[field]})
        torch.testing.assert_close(rows[field][0], expected, atol=tolerance, rtol=0)  # pictures are scaled by Pillow there
        torch.testing.assert_close(rows[field][1], rows[field][0][:1], atol=1e-6, rtol=0)
    assert scale == pytest.approx(model.model.log_logit_scale.exp().item()) and bias == pytest.approx(
        model.model.logit_bias.item()
    )
    assert soundfile.info(asked["audio"][2]).frames > 0.8 * 16000  # one that is cut


@pytest.mark.slow  # another case of the one above
def test_siglip_of_open_clips_and_clip_of_transformers(tmp_path):
    source = save(tmp_path / "siglip", "clip")  # with what makes a SigLIP one: a bias, cleaned texts, a tokenizer of its own
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"] |= {"init_logit_bias": -10.0}
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "its own", "tokenizer_kwargs": {"clean": "canonicalize"}}
    config["preprocess_cfg"] |= {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
    (source / "open_clip_config.json").write_text(json.dumps(config))
    tensors = {n: v + 0.03 * torch.rand_like(v) for n, v in load_file(source / "open_clip_model.safetensors").items()}
    save_file(tensors | {"logit_bias": torch.tensor(-9.0)}, source / "open_clip_model.safetensors")
    export_model(source, tmp_path / "siglip-out", "onnx")
    files = [file for file in pictures(tmp_path) if file.name not in ("d.png", "e.png")]  # transparency, a palette
    dirty = [
        "it’s a “black” queen",
        "Tom &amp; Jerry",
        "ﬁne",
        "ｆｕｌｌ width",
        "two  spaces",
        "a\nb",
        "the <|endoftext|> of a",
    ]
    rows, _, bias = embedded(tmp_path / "siglip-out", {"image": files, "text": [*TEXTS, *dirty]})
    model = mmcontrast.load(source)
    torch.testing.assert_close(rows["image"][0], model.embed(images=files), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows["text"][0], model.embed(texts=[*TEXTS, *dirty]), atol=1e-5, rtol=0)
    assert bias == pytest.approx(model.model.logit_bias.item())
    clip = saved(DUAL["clip"](), tmp_path / "clip")
    export_model(clip, tmp_path / "half", "onnx", fields=["text"], fp16=True)
    rows, _, _ = embedded(tmp_path / "half", {"text": TEXTS})
    difference = (rows["text"][0] - mmcontrast.load(clip).embed(texts=TEXTS)).abs().max()
    assert 1e-6 < difference < 1e-2
    graph = onnx.load(str(tmp_path / "half" / "text.onnx")).graph
    kinds = {onnx.TensorProto.DataType.Name(weight.data_type) for weight in graph.initializer if weight.dims}
    assert "FLOAT16" in kinds and "FLOAT" not in kinds
    for file in [*tmp_path.rglob("*.onnx")]:
        assert b"site-packages" not in file.read_bytes()  # nor any other path of the machine that it was made on


def test_what_is_not_exported(tmp_path):
    waves = {"type": "audio", "seconds": 0.8, "representation": "waveform", "variable": True}
    options = {"fields__audio": {"modality": waves, "tower": "audio"}}
    options |= {"towers__audio": {"type": "transformers", "model": "wav2vec2", "config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "conv_dim": [8], "conv_kernel": [10], "conv_stride": [160], "num_feat_extract_layers": 1, "feat_extract_norm": "layer",
    }}}  # fmt: skip
    with pytest.raises(UserError, match="set variable: false"):
        export_model(run(tmp_path / "run", changed(**options)), tmp_path / "out", "onnx", fields=["audio"])
    with pytest.raises(UserError, match="NaFlex"):
        export_model(saved(DUAL["siglip2 naflex"](), tmp_path / "naflex"), tmp_path / "out", "onnx")
    with pytest.raises(UserError, match="--fp16 is for onnx"):
        export_model(tmp_path / "run", tmp_path / "out", "open_clip", fp16=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tower_that_computes_with_the_number_of_samples_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="the number of samples that it was traced with"):
        export_model(saved(DUAL["clap"](), tmp_path / "clap"), tmp_path / "out", "onnx", fields=["audio"])
    assert not (tmp_path / "out").exists()


def test_sixteen_bits_are_scaled_where_our_own_training_does(tmp_path):
    """transformers and open_clip clip them, as Pillow does."""
    values = np.linspace(0, 40000, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "deep.png")
    common = {"background": [255, 255, 255], "channels": 1, "resize": [64, 64], "interpolation": "bicubic", "crop": None}
    common |= {"mean": [0.0], "std": [1.0]}
    ours = ImageModality(64, channels=1, background="white", mean=[0.0], std=[1.0])
    want = ours(ours.collate([ours.transform(ours.decode((tmp_path / "deep.png").read_bytes()), False)]))[0].numpy()
    np.testing.assert_allclose(picture(tmp_path / "deep.png", common | {"deep": True}), want, atol=0.5 / 255)
    clipped = picture(tmp_path / "deep.png", common | {"deep": False})
    np.testing.assert_array_equal(clipped[0] * 255, np.asarray(Image.open(tmp_path / "deep.png").convert("L"), np.float32))
