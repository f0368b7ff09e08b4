"""An architecture that open_clip knows by a name."""

import json

import open_clip
import pytest
import torch

from tests.models.open_clip_models import MODELS


@pytest.fixture
def architecture(tmp_path):
    """A name that open_clip knows, and a checkpoint of it."""
    folder = tmp_path / "architectures"
    folder.mkdir()
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 16, **MODELS["clip"]}))
    open_clip.add_model_config(folder)
    torch.manual_seed(3)
    whole = open_clip.create_model("tiny-clip")
    torch.save({"state_dict": {f"module.{name}": value for name, value in whole.state_dict().items()}}, tmp_path / "epoch_1.pt")
    yield whole.eval()
    open_clip.factory._MODEL_CONFIG_PATHS.pop()
    del open_clip.factory._MODEL_CONFIGS["tiny-clip"]
