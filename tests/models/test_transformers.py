"""transformers' models: our embeddings are those of its own pipeline, called as its documentation says, from the files on."""

import copy
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image

import mmcontrast
from mmcontrast.errors import UserError
from tests.models.samples import TEXTS, pictures, sounds, tokenizer
from tests.models.transformers_models import (
    DUAL,
    SIZES,
    VISION,
    WORDS,
    clap,
    clip,
    opened,
    saved,
)


@pytest.mark.parametrize("kind", DUAL)
def test_dual_encoders_embeddings_logits_and_predictions_are_transformers(kind, tmp_path):
    made = DUAL[kind]()
    folder = saved(made, tmp_path / "model")
    network, processor = hf.AutoModel.from_pretrained(folder).eval(), hf.AutoProcessor.from_pretrained(folder)
    texts = {"text": TEXTS, "return_tensors": "pt", "truncation": True, **made[2]}
    if kind == "clap":
        field, files = "audio", sounds(tmp_path, 8000, (0.4, 1.0, 0.7))
        samples = [soundfile.read(file)[0] for file in files]
        inputs = processor.feature_extractor(samples, sampling_rate=8000, return_tensors="pt") | processor.tokenizer(**texts)
    else:
        field, files = "images", pictures(tmp_path)
        inputs = processor(images=opened(files, processor.image_processor), **texts)
    with torch.no_grad():
        output = network(**inputs)
    theirs, logits = (
        (output.audio_embeds, output.logits_per_audio) if kind == "clap" else (output.image_embeds, output.logits_per_image)
    )
    model = mmcontrast.load(folder)
    first, second = model.embed(**{field: files}, batch_size=4), model.embed(texts=TEXTS, batch_size=3)
    torch.testing.assert_close(first, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second, output.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logits(first, second), logits, atol=1e-4, rtol=1e-5)
    assert torch.equal(model.logits(first, second).argmax(1), logits.argmax(1))
    for number, text in enumerate(TEXTS):
        torch.testing.assert_close(model.embed(texts=[text])[0], second[number], atol=1e-5, rtol=1e-5)


def test_long_sounds_are_cut_the_same_way_each_time(tmp_path):
    for fusion in (False, True):
        made = clap(fusion)
        folder = saved(made, tmp_path / f"fusion {fusion}")
        (tmp_path / str(fusion)).mkdir()
        files = sounds(tmp_path / str(fusion), 8000, (3.0, 0.4))
        network, extractor = hf.ClapModel.from_pretrained(folder).eval(), hf.AutoFeatureExtractor.from_pretrained(folder)
        expected = []
        for file in files:
            np.random.seed(0)  # noqa: NPY002
            with torch.no_grad():
                inputs = extractor(soundfile.read(file)[0], sampling_rate=8000, return_tensors="pt")
                expected.append(network.get_audio_features(**inputs).pooler_output[0])
        model = mmcontrast.load(folder)
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        torch.testing.assert_close(model.embed(audio=files), torch.stack(expected), atol=1e-5, rtol=1e-5)
        assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(("kind", "half"), [("clip", "Vision"), ("clip", "Text"), ("siglip", "Vision"), ("siglip", "Text")])
def test_halves_have_their_own_features(kind, half, tmp_path):
    made = DUAL[kind]()
    saved(made, tmp_path / "whole")
    name = {"clip": f"CLIP{half}ModelWithProjection", "siglip": f"Siglip{half}Model"}[kind]
    network = getattr(hf, name).from_pretrained(tmp_path / "whole").eval()
    network.save_pretrained(tmp_path / "half")
    processor = made[1]
    processor.save_pretrained(tmp_path / "half")
    whole, model = mmcontrast.load(tmp_path / "whole"), mmcontrast.load(tmp_path / "half")
    values = {"images": pictures(tmp_path)} if half == "Vision" else {"texts": TEXTS}
    assert len(model.fields) == 1
    torch.testing.assert_close(model.embed(**values), whole.embed(**values), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_text_encoders_average_what_is_no_padding(kind, tmp_path):
    sizes = WORDS | {"pad_token_id": 1, "max_position_embeddings": 20} if kind == "roberta" else WORDS
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model(kind, **sizes)).eval()
    words = tokenizer("[PAD]", pad_token="[CLS]") if kind == "roberta" else tokenizer()  # no model_max_length
    network.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    long = [*TEXTS, " ".join(TEXTS)]
    inputs = words(long, padding=True, truncation=True, max_length=18 if kind == "roberta" else 16, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = network(**inputs).last_hidden_state, inputs["attention_mask"].bool()
    rows = {"mean": [h[m].mean(0) for h, m in zip(hidden, mask, strict=True)], "first": hidden[:, 0]}
    rows["last"] = [h[m][-1] for h, m in zip(hidden, mask, strict=True)]
    for pooling, expected in rows.items():
        model = mmcontrast.load(tmp_path / "model", pooling=pooling)
        torch.testing.assert_close(
            model.embed(texts=long, batch_size=3), F.normalize(torch.stack(list(expected)), dim=1), atol=1e-5, rtol=1e-5
        )
    assert torch.equal(
        mmcontrast.load(tmp_path / "model").embed(texts=long),
        mmcontrast.load(tmp_path / "model", pooling="mean").embed(texts=long),
    )


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_image_encoders_give_their_class_token(kind, tmp_path):
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model(kind, **VISION)).eval()
    processor = (hf.ViTImageProcessor if kind == "vit" else hf.BitImageProcessor)(
        **(
            {"size": {"height": 32, "width": 32}}
            if kind == "vit"
            else {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
        )
    )
    network.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    files = pictures(tmp_path)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "model")
    inputs = processor(images=opened(files, processor), return_tensors="pt")
    with torch.no_grad():
        expected = F.normalize(network(**inputs).last_hidden_state[:, 0], dim=1)
    torch.testing.assert_close(
        mmcontrast.load(tmp_path / "model").embed(images=files, batch_size=4), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("kind", "norm"), [("wav2vec2", "group"), ("wav2vec2", "layer"), ("hubert", "group")])
def test_sound_encoders_do_not_depend_on_the_batch(kind, norm, tmp_path):
    layers = {
        "conv_dim": [8, 8],
        "conv_stride": [5, 2],
        "conv_kernel": [10, 3],
        "feat_extract_norm": norm,
        "num_feat_extract_layers": 2,
    }
    network = hf.AutoModel.from_config(hf.AutoConfig.for_model(kind, **SIZES, **layers)).eval()
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=norm == "layer")
    network.save_pretrained(tmp_path / "model")
    extractor.save_pretrained(tmp_path / "model")
    files = sounds(tmp_path, 8000, (0.4, 0.11, 0.3, 0.4))
    samples = [soundfile.read(file)[0] for file in files]
    for number, subtype in enumerate(("PCM_24", "FLOAT")):  # quiet ones, which are not rounded to 16 bits on their way
        files.append(tmp_path / f"quiet{number}.wav")
        soundfile.write(files[-1], samples[0] * 1e-3, 8000, subtype=subtype)
    expected = []
    for file in files:
        with torch.no_grad():
            inputs = extractor(soundfile.read(file)[0], sampling_rate=8000, return_tensors="pt")
            expected.append(F.normalize(network(inputs["input_values"]).last_hidden_state.mean(1), dim=1)[0])
    model = mmcontrast.load(tmp_path / "model")
    torch.testing.assert_close(model.embed(audio=files, batch_size=3), torch.stack(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"audio\[1\]: a sound of 19 samples at 8000 Hz: this model needs 20"):
        model.embed(audio=[(samples[0][:20], 8000), (samples[0][:19], 8000)])
    assert model.embed(audio=[(samples[0][:20], 8000)]).isfinite().all()


def test_a_copy_computes_with_its_own_weights(tmp_path):
    model = mmcontrast.load(saved(clip(), tmp_path / "model"))
    before, other = model.embed(texts=TEXTS), copy.deepcopy(model.model)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    assert torch.equal(model.embed(texts=TEXTS), before)
    assert not mmcontrast.Embedder(other, "copy", "cpu").embed(texts=TEXTS).any()


def test_modalities_travel_to_workers(tmp_path):
    model = mmcontrast.load(saved(clip(), tmp_path / "model"))
    for field, value in (("image", Image.new("RGB", (40, 33), "red")), ("text", "a queen")):
        modality = model.model.modality(field)
        there = pickle.loads(pickle.dumps(modality))
        raw = modality.encode(value)
        assert torch.equal(there.transform(raw, False), modality.transform(raw, False))


def test_mistakes_are_one_line(tmp_path):
    def message(name, **options):
        with pytest.raises(UserError) as error:
            mmcontrast.load(name, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    folder = saved(clip(), tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:2000])
    assert message(folder).startswith(str(folder))
    state = hf.CLIPModel.from_pretrained(saved(clip(), tmp_path / "other")).state_dict()
    hf.CLIPModel.from_pretrained(tmp_path / "other").save_pretrained(
        tmp_path / "other", state_dict={k: v for k, v in state.items() if k != "visual_projection.weight"}
    )
    assert "lacks 1 tensors of CLIPModel, as visual_projection.weight" in message(tmp_path / "other")
    weights.write_bytes(whole)
    shutil.copytree(folder, tmp_path / "whole")
    for file in folder.glob("*token*"):
        file.unlink()
    assert "tokenizer" in message(folder)
    assert "in the local cache" in message("nobody/nothing")
    assert "in the local cache" in message("transformers:nobody/nothing")
    assert "own weights" in message(folder, pretrained="x")
    assert "a CLIPModel has its own" in message(tmp_path / "whole", pooling="mean")
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 90}
    hf.T5Model(hf.T5Config(**t5)).save_pretrained(tmp_path / "t5")
    assert "neither a dual encoder nor" in message(tmp_path / "t5")
