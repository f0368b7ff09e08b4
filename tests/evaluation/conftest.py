"""A model and data that several files of tests evaluate."""

import pytest

from mmcontrast.embedder import load
from tests.evaluation.layouts import classification
from tests.models.open_clip_models import save


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "clip", "clip")


@pytest.fixture(scope="module")
def opened(model):
    return load(model, device="cpu")


@pytest.fixture(scope="module")
def chess(tmp_path_factory):
    return classification(tmp_path_factory.mktemp("chess") / "wds_chess")
