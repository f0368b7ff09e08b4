"""Small real data for every test: a few glyphs drawn, spoken and written as shards, once a session."""

import os
import random
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
import yaml

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the workers share the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the network
if not any("gpu" in str(argument) for argument in sys.argv) and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite is the same on every machine; `make test-gpu` is what a card is for

import numpy as np
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run here, slowly

from data_pipelines.glyphs.characters import Character
from data_pipelines.glyphs.glyphs import Glyphs
from mmcontrast.data import write_shard
from tests.command import FOLDER, OWNER
from tests.fork_server import remember_vocabularies

TRAIN, VAL = 96, 24
LETTERS = ("Latin", "Greek", "Cyrillic")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="other random inputs for every test that draws some (default: 0)")


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a folder for its fork server, which ends with this process."""
    settings.register_profile("suite", derandomize=config.getoption("seed") == 0, deadline=None)
    settings.load_profile("suite")
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="mmcontrast-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ |= {FOLDER: folder.name, OWNER: str(os.getpid())}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed a test by its name, so that what fails fails again, whichever tests its worker ran before."""
    seed = zlib.crc32(f"{item.config.getoption('seed')} {item.nodeid}".encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - of whatever draws from the global generator
    torch.manual_seed(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first, by their `slow(minutes=…)`, so that no worker is left with one at the end."""
    items.sort(key=lambda item: -max((mark.kwargs.get("minutes", 0) for mark in item.iter_markers("slow")), default=0))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """Indexes of the tests' shards are kept apart from the user's."""
    os.environ["MMCONTRAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def vocabularies() -> None:
    if "open_clip" in sys.modules:
        remember_vocabularies()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """train-0000{0,1,2}.tar of 32 samples each, and val-00000.tar of 24."""
    folder = tmp_path_factory.mktemp("corpus")
    glyphs, splits = Glyphs(side=24), Glyphs().splits()
    letters = [item for item in splits["val"] if item[0].script in LETTERS][:VAL]
    chosen = {item[0].code for item in letters}
    train = [item for item in splits["train"] if item[0].code in chosen][:TRAIN]
    assert (len(train), len(letters)) == (TRAIN, VAL)
    for number in range(3):
        samples = [glyphs.make_sample("train", item) for item in train[number::3]]
        write_shard(folder / f"train-{number:05d}.tar", samples)
    write_shard(folder / "val-00000.tar", [glyphs.make_sample("val", item) for item in letters])
    return folder


@pytest.fixture
def config_file(corpus, tmp_path) -> Path:
    return write_config(corpus, tmp_path)


@pytest.fixture
def vectors_file(tmp_path) -> Path:
    """The config of a run of linear towers, which starts in a fraction of the time of one with a library's."""
    from tests.training import teaching  # which imports the trainer

    return teaching.write_config(
        tmp_path, teaching.write_vectors(tmp_path / "train.tar"), "small", train={"steps": 6, "checkpoint_every": 2}
    )


def write_config(corpus: Path, folder: Path) -> Path:
    """A complete config of the quickstart's shape, small enough to train in seconds."""
    bert = {"vocab_size": 49408, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    resnet = {"type": "timm", "model": "resnet18", "in_chans": 1, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    config = {
        "run": {"name": "small", "dir": str(folder / "runs")},
        "fields": {
            "image": {"modality": {"type": "image", "size": 24, "channels": 1}, "tower": "image"},
            "text": {"modality": {"type": "text", "context_length": 24}, "tower": "text"},
            "audio": {"modality": {"type": "audio", "seconds": 0.8, "mels": 16, "hop": 640}, "tower": "audio"},
        },
        "towers": {
            "image": resnet,
            "audio": resnet,
            "text": {"type": "transformers", "model": "bert", "config": {**bert, "intermediate_size": 32}},
        },
        "model": {"embed_dim": 16},
        "objective": "infonce",
        "data": {"train": str(corpus / "train-*.tar"), "num_workers": 0, "block": 8, "window": 32},
        "train": {"steps": 6, "batch_size": 16, "log_every": 1, "checkpoint_every": 2, "warmup_steps": 1, "threads": 1},
        "evaluation": {
            "splits": {"val": str(corpus / "val-*.tar")},
            "zero_shot": {"script": {"label": "script", "classes": {s: [f"{s} small letter"] for s in LETTERS}}},
        },
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def a_character() -> Character:
    return Character(ord("é"))
