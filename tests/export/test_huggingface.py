"""Folders of transformers: its own models go back unchanged, a CLIP of open_clip's becomes a CLIPModel."""

import io
import json
import re

import numpy as np
import open_clip
import pytest
import soundfile
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

import mmcontrast
from mmcontrast.errors import UserError
from mmcontrast.export.folder import export_model
from mmcontrast.export.huggingface import clip_tokenizer
from tests.export.models import TIMM, changed, perturbed, run
from tests.models.open_clip_models import MODELS, save
from tests.models.samples import TEXTS, pictures, sounds, tokenizer
from tests.models.transformers_models import DUAL, WORDS, clip, opened, saved


def outputs(folder, kind, options, files):
    """Embeddings of two fields and logits, by transformers alone."""
    network, processor = hf.AutoModel.from_pretrained(folder).eval(), hf.AutoProcessor.from_pretrained(folder)
    texts = {"text": TEXTS, "return_tensors": "pt", "truncation": True, **options}
    if kind == "clap":
        inputs = processor(audio=[soundfile.read(file)[0] for file in files], sampling_rate=8000, **texts)
    else:
        inputs = processor(images=opened(files, processor.image_processor), **texts)
    np.random.seed(0)  # noqa: NPY002
    with torch.no_grad():
        output = network(**inputs)
    first = "audio" if kind == "clap" else "image"
    return output[f"{first}_embeds"], output.text_embeds, output[f"logits_per_{first}"], output.logits_per_text


@pytest.mark.parametrize("kind", DUAL)
def test_a_model_of_transformers_goes_back_unchanged(kind, tmp_path):
    made = DUAL[kind]()
    perturbed(made[0], 0.02)
    source, out = saved(made, tmp_path / "source"), tmp_path / "out"
    files = sounds(tmp_path, 8000, (0.4, 1.0, 0.7)) if kind == "clap" else pictures(tmp_path)
    export_model(source, out, "huggingface")
    for ours, theirs in zip(outputs(out, kind, made[2], files), outputs(source, kind, made[2], files), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():  # CLAP's second scale too
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-6)
    values = {"audio" if kind == "clap" else "images": files}
    again, first = mmcontrast.load(out), mmcontrast.load(source)
    torch.testing.assert_close(again.embed(**values), first.embed(**values), atol=1e-6, rtol=0)
    assert torch.equal(again.embed(texts=TEXTS), first.embed(texts=TEXTS))


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_an_encoder_keeps_its_pooling_and_its_card_runs(tmp_path, pooling):
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model("bert", **WORDS))
    perturbed(network)
    network.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    expected = mmcontrast.load(tmp_path / "bert", pooling=pooling)
    export_model(tmp_path / "bert", tmp_path / "out", "huggingface", pooling=pooling)
    assert torch.equal(mmcontrast.load(tmp_path / "out").embed(texts=TEXTS), expected.embed(texts=TEXTS))
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {"TEXTS": TEXTS}
    exec(code.replace('["a caption"]', "TEXTS").replace('"out"', repr(str(tmp_path / "out"))), names)
    torch.testing.assert_close(names["embeddings"], expected.embed(texts=TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [hf.CLIPVisionModelWithProjection, hf.Dinov2Model])
def test_the_card_of_an_encoder_of_pictures_runs(tmp_path, kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
    kind(kind.config_class(**sizes, patch_size=16, projection_dim=24)).save_pretrained(tmp_path / "vit")
    sides = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    hf.CLIPImageProcessor(**sides).save_pretrained(tmp_path / "vit")
    export_model(tmp_path / "vit", tmp_path / "out", "huggingface")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    names = {"picture": Image.effect_noise((32, 32), 90.0).convert("RGB")}
    exec(code.replace('"out"', repr(str(tmp_path / "out"))), names)
    expected = mmcontrast.load(tmp_path / "out").embed(images=[names["picture"]])
    torch.testing.assert_close(names["embeddings"], expected, atol=1e-4, rtol=0)


def test_a_scale_that_was_learnt_is_that_of_both_directions_of_clap(tmp_path):
    from mmcontrast.export.huggingface import write

    model = mmcontrast.load(saved(DUAL["clap"](), tmp_path / "source")).model
    with torch.no_grad():
        model.log_logit_scale.fill_(1.25)
    (tmp_path / "out").mkdir()
    write(model, ["audio", "text"], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["logit_scale_a"].item() == tensors["logit_scale_t"].item() == 1.25


def test_encoders_of_one_field_go_back(tmp_path):
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model("bert", **WORDS))
    perturbed(network)
    network.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    export_model(tmp_path / "bert", tmp_path / "bert-out", "huggingface", pooling="first")
    after = hf.AutoModel.from_pretrained(tmp_path / "bert-out").state_dict()
    assert all(torch.equal(after[name], value) for name, value in network.state_dict().items())  # the pooler too
    whole, processor, _ = clip()
    saved((whole, processor, {}), tmp_path / "clip")
    hf.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").save_pretrained(tmp_path / "half")
    processor.image_processor.save_pretrained(tmp_path / "half")
    export_model(tmp_path / "half", tmp_path / "half-out", "huggingface")
    files = pictures(tmp_path)
    assert torch.equal(
        mmcontrast.load(tmp_path / "half-out").embed(images=files), mmcontrast.load(tmp_path / "half").embed(images=files)
    )


@pytest.mark.parametrize("quick", [False, True])
def test_a_clip_of_open_clips_is_a_clip_model(quick, tmp_path):
    source, out = save(tmp_path / "clip", "clip"), tmp_path / "out"
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = quick
    (source / "open_clip_config.json").write_text(json.dumps(config))
    tensors = {
        name: value + 0.02 * torch.rand_like(value) for name, value in load_file(source / "open_clip_model.safetensors").items()
    }
    save_file(tensors, source / "open_clip_model.safetensors")
    about = export_model(source, out, "huggingface")
    assert about["fields"]["text"]["largest_difference"] < 1e-5
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{source}")
    network, processor = hf.CLIPModel.from_pretrained(out).eval(), hf.CLIPProcessor.from_pretrained(out)
    files = [Image.open(file).convert("RGB") for file in pictures(tmp_path)]
    square = [picture.resize((32, 32)) for picture in files]  # nothing to scale or to crop
    with torch.no_grad():
        inputs = processor(images=square, text=TEXTS, return_tensors="pt", padding=True, truncation=True)
        output = network(**inputs)
        images = theirs.eval().encode_image(torch.stack([preprocess(one) for one in square]), normalize=True)
        texts = theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{source}")(TEXTS), normalize=True)
        logits = theirs.logit_scale.exp() * images @ texts.T
    torch.testing.assert_close(output.image_embeds, images, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits_per_image, logits, atol=1e-4, rtol=1e-5)
    assert network.config.vision_config.hidden_act == ("quick_gelu" if quick else "gelu")
    torch.testing.assert_close(mmcontrast.load(out).embed(texts=TEXTS), output.text_embeds, atol=1e-6, rtol=0)


def test_composed_towers_of_open_clips_become_a_clip_model(tmp_path):
    image = {"type": "open_clip", "model": "tiny-clip", "part": "image"}
    config = changed(towers__image=image, fields__image__modality__size=32, model__logit_bias=None)
    source = run(tmp_path / "run", config, perturb=0.01)
    about = export_model(source, tmp_path / "out", "huggingface")
    assert about["fields"]["text"]["largest_difference"] < 1e-5 and about["fields"]["image"]["largest_difference"] < 1e-5


def test_clips_tokenizer_is_open_clips():
    ours, theirs = open_clip.SimpleTokenizer(context_length=24), clip_tokenizer(24)
    texts = [
        *TEXTS,
        "It's 3 o'clock, isn't it?",
        "ein Haus am See – schön",
        "一只黑鸟",
        "a  b\tc\nd",
        "🙂🙂 cats",
        " ".join(TEXTS) * 2,
    ]
    for text in texts:
        ids = theirs(text, truncation=True, max_length=24)["input_ids"]
        assert ids == ours(text)[0][: len(ids)].tolist() and not ours(text)[0][len(ids) :].any()


def test_what_transformers_has_no_model_of_is_refused(tmp_path):
    bias = changed(towers__image={"type": "open_clip", "model": "tiny-clip", "part": "image"}, fields__image__modality__size=32)
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 49408}
    composed = {
        "no model of a TimmTower and OpenClipTextTower": TIMM,
        "VisionTextDualEncoderModel": changed(towers__text={"type": "transformers", "model": "bert", "config": bert}),
        "it has a logit bias": bias,
    }
    for number, (reason, config) in enumerate(composed.items()):
        with pytest.raises(UserError, match=reason):
            export_model(run(tmp_path / str(number), config), tmp_path / "out", "huggingface")
    for kind, reason in {
        "custom": "no_causal_mask",
        "siglip": "TimmModel",
        "coca": "attentional_pool",
        "bert": "HFTextEncoder",
    }.items():
        assert kind in MODELS
        with pytest.raises(UserError, match=reason):
            export_model(save(tmp_path / kind, kind), tmp_path / "out", "huggingface")
    with pytest.raises(UserError, match="--fields image,text"):
        export_model(saved(clip(), tmp_path / "whole"), tmp_path / "out", "huggingface", fields=["text"])
    assert not (tmp_path / "out").exists()


def test_samples_of_the_users(tmp_path):
    """Pictures that libraries treat in ways of their own are left out, and counted; the rest is compared."""
    from webdataset import TarWriter

    source = save(tmp_path / "clip", "clip")
    with TarWriter(str(tmp_path / "some.tar")) as shard:
        for number, file in enumerate(pictures(tmp_path)):
            shard.write({"__key__": f"{number}", file.suffix[1:]: file.read_bytes(), "txt": TEXTS[number % len(TEXTS)]})
        shard.write({"__key__": "broken", "jpg": b"no picture", "txt": "a caption"})
    transparent = sum(
        Image.open(io.BytesIO(f.read_bytes())).mode not in ("RGB", "L") for f in (tmp_path / "pictures").iterdir()
    )
    about = export_model(source, tmp_path / "out", "huggingface", data=str(tmp_path / "some.tar"))
    assert about["samples"] == str(tmp_path / "some.tar")
    assert about["fields"]["image"]["samples"] == 6 - transparent and about["fields"]["text"]["samples"] == 7
    assert len(about["notes"]) == 2
    back = export_model(source, tmp_path / "back", "open_clip", data=str(tmp_path / "some.tar"), samples=3)
    assert back["fields"]["text"]["samples"] == 3
