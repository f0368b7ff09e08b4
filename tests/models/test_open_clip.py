"""open_clip's models: our embeddings are those of its own pipeline, from the files on."""

import pickle

import open_clip
import pytest
import torch
from PIL import Image

import mmcontrast
from mmcontrast.errors import UserError
from tests.models.open_clip_models import MODELS, save
from tests.models.samples import TEXTS, pictures


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A folder as open_clip's own push to the hub leaves it."""
    return save(tmp_path / request.param, request.param)


def test_embeddings_logits_and_predictions_are_open_clips(saved, tmp_path):
    files = pictures(tmp_path)
    whole, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{saved}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{saved}")
    whole.eval()
    with torch.no_grad():
        images = whole.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]), normalize=True)
        texts = whole.encode_text(tokenize(TEXTS), normalize=True)
        bias = 0 if whole.logit_bias is None else whole.logit_bias
        logits = whole.logit_scale.exp() * images @ texts.T + bias
    model = mmcontrast.load(saved)
    ours, their_texts = model.embed(images=files, batch_size=4), model.embed(texts=TEXTS, batch_size=3)
    torch.testing.assert_close(ours, images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(their_texts, texts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logits(ours, their_texts), logits, atol=1e-4, rtol=1e-5)
    assert torch.equal(model.logits(ours, their_texts).argmax(1), logits.argmax(1))
    torch.testing.assert_close(model.embed(texts=TEXTS[:1]), texts[:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.embed(images=[Image.open(file) for file in files]), images, atol=1e-5, rtol=1e-5)


def test_an_architecture_with_a_checkpoint_of_its_own_trainer(architecture, tmp_path):
    for name in ("tiny-clip", "open_clip:tiny-clip"):
        model = mmcontrast.load(name, pretrained=tmp_path / "epoch_1.pt")
        with torch.no_grad():
            expected = architecture.encode_text(open_clip.get_tokenizer("tiny-clip")(TEXTS), normalize=True)
        torch.testing.assert_close(model.embed(texts=TEXTS), expected, atol=1e-5, rtol=1e-5)
    texts, images = (pickle.loads(pickle.dumps(model.model.modality(field))) for field in ("text", "image"))  # to a worker
    assert torch.equal(texts.tokens(TEXTS[1]), open_clip.get_tokenizer("tiny-clip")(TEXTS)[1])
    transform = images.transform
    picture = model.model.modality("image").encode(Image.open(pictures(tmp_path)[2]))
    assert torch.equal(transform(picture, False), transform(picture, False))
    assert any(not torch.equal(transform(picture, True), transform(picture, True)) for _ in range(8))  # augmented


def test_mistakes_are_one_line(architecture, tmp_path):
    def message(name, **options):
        with pytest.raises(UserError) as error:
            mmcontrast.load(name, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "it takes a checkpoint's file, or a tag" in message("tiny-clip")
    assert "did you mean 'laion2b_s34b_b79k'" in message("ViT-B-32", pretrained="laion2b_s34b_b79")
    assert "did you mean 'laion2b_s34b_b79k'" in message("ViT-B-32/laion2b_s34b_b79")
    assert "did you mean 'ViT-B-32" in message("open_clip:ViT-B-33", pretrained="openai")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    assert message("tiny-clip", pretrained=tmp_path / "broken.pt").startswith("tiny-clip: ")
    folder = save(tmp_path / "clip", "clip")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert message(folder).startswith(str(folder))
    weights.unlink()
    assert "could not be loaded" in message(folder)
    assert "pretrained" in message(folder, pretrained="x")
    assert "in the local cache" in message("hf-hub:nobody/nothing")


def test_no_code_in_a_checkpoint_is_run(architecture, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("run").touch, ())

    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match=r"^tiny-clip: "):
        mmcontrast.load("tiny-clip", pretrained=tmp_path / "hostile.pt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_weights_that_want_quick_gelu_get_it(monkeypatch, tag, quick):
    """Checks the options that open_clip is given, before anything would be downloaded."""
    asked = {}

    def create_model(*_, **options):
        asked.update(options)
        raise RuntimeError("enough")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(UserError, match="enough"):
        mmcontrast.load(f"ViT-B-32/{tag}")
    assert asked["force_quick_gelu"] is quick
