"""The walk of a name to an embedding that CONTRIBUTING.md tells: each function that it names is called, in that order."""

import re
import sys
from pathlib import Path

import pandas
from typer.testing import CliRunner

from mmcontrast.cli import app
from tests.models.open_clip_models import save
from tests.models.samples import TEXTS, pictures

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


def functions_told() -> list[str]:
    """Return the names in the section; `.name` is another of the one before it."""
    section = CONTRIBUTING.read_text(encoding="utf-8").split("## From a name to an embedding")[1].split("\n## ")[0]
    told: list[str] = []
    for name in re.findall(r"`(\w*\.[\w.]+)`", section.split("\n1. ")[1]):
        owner = told[-1].rpartition(".")[0] if name.startswith(".") else ""
        told.append(owner + name)
    return told


def test_the_walk_is_as_it_is_told(tmp_path):
    files = pictures(tmp_path)
    texts = [TEXTS[k % len(TEXTS)] for k in range(len(files))]
    pandas.DataFrame({"image": [f"pictures/{f.name}" for f in files], "text": texts}).to_csv(
        tmp_path / "pairs.csv", index=False
    )
    save(tmp_path / "model", "clip")
    called: list[str] = []

    def note(frame, event, argument):
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("mmcontrast."):
            called.append(f"{module.removeprefix('mmcontrast.')}.{frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        done = CliRunner().invoke(app, ["embed", *(str(tmp_path / name) for name in ("model", "pairs.csv", "out"))])
    finally:
        sys.setprofile(None)
    assert done.exit_code == 0, done.output
    told = functions_told()
    assert len(told) > 15
    calls = iter(called)
    for name in told:
        assert any(call == name or call.endswith(f".{name}") for call in calls), f"{name} is not called after those before it"
