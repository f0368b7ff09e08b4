"""timm's encoders: our features are those of its own pipeline, from the files on."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf

import mmcontrast
from mmcontrast.errors import UserError
from tests.models.samples import pictures


@pytest.fixture(params=["test_vit", "test_resnet"])
def trained(request, tmp_path):
    """A model, and its folder and checkpoint."""
    network = timm.create_model(request.param, num_classes=5).eval()
    save_for_hf(network, tmp_path / "folder", safe_serialization=True)
    torch.save({"state_dict": network.state_dict(), "arch": request.param}, tmp_path / "model_best.pth.tar")
    return network


def test_features_are_timms(trained, tmp_path):
    files = pictures(tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        features = F.normalize(network(pixels), dim=1)
        own = trained.forward_head(trained.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(features, F.normalize(own, dim=1))
    name = trained.default_cfg["architecture"]
    for model in (
        mmcontrast.load(tmp_path / "folder"),
        mmcontrast.load(f"timm:{tmp_path / 'folder'}"),
        mmcontrast.load(f"timm:{name}", pretrained=tmp_path / "model_best.pth.tar"),
        mmcontrast.load(name, pretrained=tmp_path / "model_best.pth.tar"),
    ):
        assert model.fields == ["image"]
        torch.testing.assert_close(model.embed(images=files, batch_size=4), features, atol=1e-5, rtol=1e-5)
    half = mmcontrast.load(tmp_path / "folder", precision="bf16").embed(images=files)
    assert 1e-6 < (half - features).abs().max() < 0.05
    arrays = [torch.randint(0, 256, (41, 52, 3), dtype=torch.uint8) for _ in range(2)]
    with torch.no_grad():
        expected = network(torch.stack([transform(Image.fromarray(array.numpy())) for array in arrays]))
    torch.testing.assert_close(model.embed(images=arrays), F.normalize(expected, dim=1), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"images\[0\]: pixels of shape \(3, 41, 52\), uint8"):
        model.embed(images=[arrays[0].permute(2, 0, 1)])


def test_a_checkpoint_that_does_not_fit_is_refused(trained, tmp_path):
    """And is not loaded in part, the rest at random."""
    name, file = trained.default_cfg["architecture"], tmp_path / "other.pth"
    weights = trained.state_dict()
    first = next(iter(weights))
    for other in (
        {f"encoder.{key}": value for key, value in weights.items()},
        {k: v for k, v in weights.items() if k != first},
    ):
        torch.save({"state_dict": other}, file)
        with pytest.raises(UserError, match=first.replace(".", r"\.")):
            mmcontrast.load(f"timm:{name}", pretrained=file)
    trained.reset_classifier(0)
    torch.save({"state_dict": trained.state_dict()}, file)
    assert mmcontrast.load(f"timm:{name}", pretrained=file).model.embed_dim == trained.num_features


def test_mistakes_are_one_line(trained, tmp_path):
    def message(name, **options):
        with pytest.raises(UserError) as error:
            mmcontrast.load(name, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "did you mean 'test_vit'" in message("timm:test_vitt")
    assert "test_vit" in message("test_vitt")
    assert message("timm:test_vit", pretrained=tmp_path / "nowhere.pth").startswith("timm:test_vit: ")
    assert "in the local cache" in message("timm/test_vit.r160_in1k")
    assert "pooling" in message(tmp_path / "folder", pooling="mean")
    assert "own weights" in message(tmp_path / "folder", pretrained="x")
    weights = tmp_path / "folder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert message(tmp_path / "folder").startswith(str(tmp_path / "folder"))
    config = json.loads((tmp_path / "folder" / "config.json").read_text()) | {"architecture": "nothing"}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    assert "nothing" in message(tmp_path / "folder")
    (tmp_path / "empty").mkdir()
    assert "holds no model" in message(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("[1]")
    assert "holds no model" in message(tmp_path / "empty")
    assert "no model 'a b c'" in message("a b c")
