"""Runs and indexes from elsewhere: opening them runs none of what they name. A file that does not appear is the proof."""

import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml
from typer.testing import CliRunner

import mmcontrast
from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.run_checks import check_components
from mmcontrast.runs import make_run_context
from mmcontrast.search import build_index
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from tests.command import free_port

MODULE = """
import pathlib
pathlib.Path({marker!r}).touch()
from mmcontrast.models import LinearTower as Honest
from mmcontrast.objectives import InfoNCE
class Tower(Honest): pass
class Objective(InfoNCE): pass
class Anything: pass
"""
FIELDS = {name: {"modality": {"type": "vector", "width": 4}, "tower": name} for name in ("a", "b")}
TOWER = {"type": "linear", "inputs": 4, "width": 3}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that a module `hostile` in the working directory makes when it is imported."""
    folder, name = tmp_path / "here", f"hostile_{tmp_path.name.replace('-', '_')}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / f"{name}.py").write_text(MODULE.format(marker=str(tmp_path / "ran")))
    return tmp_path / "ran", name


def make_run(folder, changes=None, **top):
    """A run's folder as `train` leaves it, of two vectors and linear towers, changed."""
    tree = {"fields": FIELDS, "towers": {"a": TOWER, "b": TOWER}, "model": {"embed_dim": 3}, "data": {"train": "none.tar"}}
    tree |= {"train": {"steps": 1, "batch_size": 2}, "run": {"name": folder.name}} | top
    folder.mkdir(parents=True)
    text = yaml.safe_dump(tree)
    (folder / "config.yaml").write_text(text)
    config = load_config(folder / "config.yaml")
    weights = {}
    if not top:
        weights = mmcontrast.runs.make_model(config.fields, config.towers, config.model, 0).state_dict()
    checkpoint.save(folder / "checkpoints", 1, Contents(weights, {}, {}, text))
    return folder


def named_by_a_run(command, marker):
    """Yield what a hostile config.yaml names, by the place where it stands."""
    call = {"type": command[0], **command[1]}
    yield "tower", {"towers": {"a": call, "b": TOWER}}
    yield "modality", {"fields": FIELDS | {"a": {"modality": call, "tower": "a"}}}
    augment = {"type": "image", "size": 8, "augment": [call]}
    yield "augmentation", {"fields": FIELDS | {"a": {"modality": augment, "tower": "a"}}}


def commands(marker):
    yield "subprocess:run", {"args": ["touch", str(marker)]}
    yield "subprocess:Popen", {"args": ["touch", str(marker)]}
    yield "os:mkdir", {"path": str(marker)}
    yield "pathlib:Path.touch", {"self": str(marker)}
    yield "builtins:exec", {}
    yield "mmcontrast.models:LinearTower", {"inputs": 4, "width": 3}  # ours, and still named by path


def refusal(command):
    """Return why what a command names is no component."""
    return "cannot be imported" if command[0] == "pathlib:Path.touch" else "must name a subclass"


def test_a_run_that_is_loaded_imports_and_calls_nothing(marker, tmp_path):
    ran, module = marker
    number = 0
    for command in (*commands(ran), (f"{module}:Tower", {"inputs": 4, "width": 3}), (f"{module}:Anything", {})):
        for kind, changes in named_by_a_run(command, ran):
            run = make_run(tmp_path / f"run{(number := number + 1)}", **changes)
            with pytest.raises(UserError, match=rf"{run}: its .*{kind} is '{command[0]}'.*--trust-code"):
                mmcontrast.load(run)
            honest = make_run(tmp_path / f"honest{number}")  # but for the config of its checkpoint
            shutil.rmtree(honest / "checkpoints")
            shutil.copytree(run / "checkpoints", honest / "checkpoints")
            with pytest.raises(UserError, match=rf"{honest}: its .*{kind} is '{command[0]}'.*--trust-code"):
                mmcontrast.load(honest)
    assert not ran.exists() and module not in sys.modules


def test_code_that_is_trusted_is_imported_and_called_only_if_it_is_a_component(marker, tmp_path):
    ran, module = marker
    number = 0
    for command in commands(ran):
        if command[0].startswith("mmcontrast"):
            continue
        for kind, changes in named_by_a_run(command, ran):
            run = make_run(tmp_path / f"run{(number := number + 1)}", **changes)
            with pytest.raises(UserError, match=f"{kind} '{command[0]}' {refusal(command)}"):
                mmcontrast.load(run, trust_code=True)
    assert not ran.exists()
    run = make_run(tmp_path / "mine", towers={"a": {**TOWER, "type": f"{module}:Tower"}, "b": TOWER})
    made = mmcontrast.runs.make_model(*(getattr(load_config(run / "config.yaml"), k) for k in ("fields", "towers", "model")), 0)
    checkpoint.save(run / "checkpoints", 1, Contents(made.state_dict(), {}, {}, (run / "config.yaml").read_text()))
    assert ran.exists()
    embedded = mmcontrast.load(run, trust_code=True).embed(vectors=[[1.0, 2.0, 3.0, 4.0]])
    assert embedded.shape == (1, 3)
    with pytest.raises(UserError, match="--trust-code"):
        mmcontrast.load(run)


def test_ones_own_config_imports_components_alone(marker, tmp_path):
    """`train CONFIG` is of the user's own file: import paths are meant, and still nothing but a component is called."""
    ran, module = marker
    for command in commands(ran):
        spec = {"type": command[0], **command[1]}
        places = [("objective", {"objective": spec}), ("pairing", {"pairing": spec}), *named_by_a_run(command, ran)]
        for kind, changes in places:
            run = make_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", **changes)
            message = f"{kind} '{command[0]}' {refusal(command)}"
            if command[0].endswith("LinearTower") and kind in ("tower", "augmentation"):  # it is a torch module
                message = "no shard at 'none.tar'"  # which it has got as far as
            with pytest.raises(UserError, match=message):
                make_run_context(load_config(run / "config.yaml"))
    assert not ran.exists()
    run = make_run(tmp_path / "mine", objective=f"{module}:Objective")
    assert type(check_components(load_config(run / "config.yaml"))[0]).__name__ == "Objective"


def test_a_file_in_the_working_directory_stands_in_for_no_package(marker, tmp_path):
    """The command is started inside of a downloaded folder, in which a file has the name of a package."""
    ran, _ = marker
    for name in ("soundfile", "timm", "yaml", "colorsys"):
        (tmp_path / "here" / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')")
    make_run(tmp_path / "here" / "run")
    done = CliRunner().invoke(app, ["embed", "run", "none.tar", "out", "--device", "cpu"])
    assert done.exit_code == 2 and str(tmp_path / "here") not in sys.path
    with pytest.raises(UserError, match="must name a subclass"):
        mmcontrast.components.build("colorsys:rgb_to_hsv", {}, "tower", torch.nn.Module)
    assert not ran.exists()


def make_index(folder, **manifest):
    rows = F.normalize(torch.randn(6, 3), dim=1)
    metadata, numbers = [{"key": str(k)} for k in range(6)], torch.arange(6)
    table = EmbeddingTable({"a": rows}, {"a": torch.ones(6, dtype=torch.bool)}, numbers, numbers, metadata)
    table.write(folder, {"model": "none", "checkpoint": "last", "shards": "none.tar"} | manifest)
    build_index(folder, progress=False)
    return folder / "index"


def test_the_commands_run_no_code_of_a_run_or_of_an_index_that_names_one(marker, tmp_path):
    ran, module = marker
    run = make_run(tmp_path / "run", towers={"a": {**TOWER, "type": f"{module}:Tower"}, "b": TOWER})
    index = make_index(tmp_path / "table", model=str(run), checkpoint="1")
    (tmp_path / "suite.yaml").write_text("splits: {a: none.tar}")
    for arguments in (
        ["embed", run, tmp_path, tmp_path / "out"],
        ["evaluate", run, "--suite", tmp_path / "suite.yaml"],
        ["search", index, "--text", "a"],
        ["serve", index, "--port", free_port()],
    ):
        done = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])
        assert done.exit_code == 2 and "--trust-code" in " ".join(done.stderr.split()), done.output
    assert not ran.exists() and module not in sys.modules
