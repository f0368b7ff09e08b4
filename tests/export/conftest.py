"""A small architecture that open_clip knows by name."""

import json

import open_clip
import pytest

from tests.models.open_clip_models import MODELS


@pytest.fixture(scope="session", autouse=True)
def tiny_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 16, **MODELS["clip"]}))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._rescan_model_configs()
