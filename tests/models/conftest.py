"""An architecture that open_clip knows by a name."""

import json

import open_clip
import pytest
import torch

from tests.models.open_clip_models import MODELS, TEXT

RESNET = {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": TEXT}


@pytest.fixture
def architectures(tmp_path):
    """Names that open_clip knows: tiny-clip and tiny-resnet."""
    folder = tmp_path / "architectures"
    folder.mkdir()
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 16, **MODELS["clip"]}))
    (folder / "tiny-resnet.json").write_text(json.dumps({"embed_dim": 16, **RESNET}))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.pop()
    del open_clip.factory._MODEL_CONFIGS["tiny-clip"], open_clip.factory._MODEL_CONFIGS["tiny-resnet"]


@pytest.fixture
def architecture(architectures, tmp_path):
    """A checkpoint of tiny-clip, and the model."""
    torch.manual_seed(3)
    whole = open_clip.create_model("tiny-clip")
    torch.save({"state_dict": {f"module.{name}": value for name, value in whole.state_dict().items()}}, tmp_path / "epoch_1.pt")
    return whole.eval()
