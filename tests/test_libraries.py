"""Messages of open_clip, transformers and others on a model: those that matter are logged once, the rest are not."""

import logging
import warnings
from contextlib import suppress

import open_clip
import pytest
import transformers
from safetensors.torch import load_file, save_file

from mmcontrast import libraries
from mmcontrast.errors import UserError
from mmcontrast.libraries import library_messages as collected
from mmcontrast.libraries import weights_follow
from mmcontrast.models import OpenClipTower, TransformersTower
from tests.models.conftest import architectures  # noqa: F401 - a fixture


@pytest.fixture
def logged(monkeypatch, caplog):
    """The lines of our log."""
    monkeypatch.setattr(libraries, "_logged", set())
    caplog.set_level(logging.WARNING, "mmcontrast")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "mmcontrast"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    transformers.BertForMaskedLM(transformers.BertConfig(**small)).save_pretrained(folder)  # no pooler, another head
    return folder


def test_weights_that_are_not_there_are_refused(bert, logged, capfd, tmp_path):
    TransformersTower(str(bert), pretrained=True)
    assert logged() == []  # the head that we do not take, the pooler that we drop
    weights = load_file(bert / "model.safetensors")
    missing = next(name for name in weights if "attention" in name and name.endswith("query.weight"))
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    save_file({k: v for k, v in weights.items() if k != missing}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"1 tensors are not in its checkpoint, as .*{missing.removeprefix('bert.')}"):
        TransformersTower(str(tmp_path), pretrained=True)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_random_weights_of_open_clip_are_told_once_where_they_stay(logged, capfd, architectures):  # noqa: F811
    with weights_follow():  # as where a run is opened
        OpenClipTower("tiny-resnet", "text")
    assert logged() == []
    for part in ("image", "text"):
        OpenClipTower("tiny-resnet", part)
    (line,) = logged()
    assert line.startswith("warning: open_clip tower tiny-resnet: No pretrained weights loaded")
    assert "No pretrained" not in capfd.readouterr().out


def test_a_quickgelu_mismatch_is_logged(logged, tmp_path, monkeypatch):
    """open_clip's own words, of a tag whose weights are at hand."""
    model = open_clip.create_model("RN50", force_custom_text=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.safetensors"))
    with collected("RN50"):
        open_clip.create_model("RN50", pretrained="openai", force_custom_text=False)
    (line,) = logged()
    assert line.startswith("warning: RN50: QuickGELU mismatch between final model config")


def test_noise_is_not_told_and_all_is_as_before(logged, capfd):
    before = [(logging.getLogger(name or None), list(logging.getLogger(name or None).handlers)) for name in libraries.LIBRARIES]
    with suppress(KeyError), collected("a model"):
        warnings.warn("an old name", DeprecationWarning, stacklevel=1)
        warnings.warn("a new name", FutureWarning, stacklevel=1)
        logging.getLogger("huggingface_hub.file_download").warning("Xet Storage is enabled for this repo")
        logging.getLogger("timm.models").warning("No checkpoint\nfound of the %s", "head")
        logging.warning("something of the root")
        logging.info("nothing")
        warnings.warn("a size that does not fit", UserWarning, stacklevel=1)
        raise KeyError
    libraries.tell("/data/symlinks/val.tar, field 'deprecated_name': ours are told whatever names are in them")
    assert logged() == [
        "warning: a model: No checkpoint found of the head",
        "warning: a model: something of the root",
        "warning: a model: a size that does not fit",
        "warning: /data/symlinks/val.tar, field 'deprecated_name': ours are told whatever names are in them",
    ]
    assert [(library_logger, list(library_logger.handlers)) for library_logger, _ in before] == before
