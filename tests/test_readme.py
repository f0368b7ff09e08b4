"""Commands of the README and of docs/ are commands, links lead somewhere, and the README's Python example runs."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer.main
from PIL import Image, ImageDraw

from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.models import make_model
from mmcontrast.run_folder import prepare_folder
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from tests.command import run_script

ROOT = Path(__file__).parents[1]


README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )?(?:torchrun .* -m )?(mmcontrast .*?)(?:\s+#.*)?$", re.MULTILINE)


def commands_of(page):
    """Return the commands of a page's blocks of code that are written out."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [
        part.strip() for block in blocks for line in COMMAND.findall(block.replace("\\\n", "")) for part in line.split("&&")
    ]
    return [line for line in lines if line.startswith("mmcontrast ") and "…" not in line]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands_of(page)))


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line):
    """Names, options and arguments; the models and data are the reader's."""
    words, command = shlex.split(line)[1:], typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("mmcontrast", list(words))
    files = [word for word in words if word.startswith(("configs/", "eval/"))]
    files += [f"data_pipelines/recipes/{preset}.yaml" for option, preset in pairwise(words) if option == "--rules"]
    assert all((ROOT / file).exists() for file in files), files


def headings(text):
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_and_targets_of_make():
    for file in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", file.read_text()):
            path = file.parent / target if target else file
            assert path.exists(), f"{file.name}: {target}"
            assert not anchor or anchor in headings(path.read_text()), f"{file.name}: {target}#{anchor}"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert f"\n{target}:" in makefile, target


RUN = ROOT / "runs" / "quickstart"


@pytest.mark.skipif(not (RUN / "results.json").exists(), reason="no runs/quickstart: `make quickstart` makes it")
def test_the_quickstart_reaches_what_the_readme_says():
    """A seed, a machine and voices with noise of their own move a recall by 0.02; 0.05 is a defect."""
    if load_config(RUN / "config.yaml").train != load_config(ROOT / "configs" / "quickstart.yaml").train:
        pytest.skip("runs/quickstart has other options than configs/quickstart.yaml")
    figures = re.compile(r"(image|audio) → (text|audio)[^;:]{,40}? (0\.\d\d) / (0\.\d\d)", re.IGNORECASE)
    said = figures.findall(README.replace("\n", " "))
    assert [query.lower() + " " + candidate for query, candidate, *_ in said] == ["image text", "audio text", "image audio"]
    results = json.loads((RUN / "results.json").read_text())["results"]
    for query, candidate, *recalls in said:
        for at, recall in zip((1, 5), recalls, strict=True):
            found = results[f"val/retrieval/{query.lower()}_to_{candidate}/recall_at_{at}"]["value"]
            assert found > float(recall) - 0.05, f"{query} → {candidate}, recall at {at}"


def test_the_five_lines(config_file, tmp_path):
    (example,) = re.findall(r"```python\n(import mmcontrast\n\nmodel = .*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    config = load_config(config_file, ["run.name=quickstart", f"run.dir={tmp_path / 'runs'}"])
    prepare_folder(config, overwrite=False)
    model = make_model(config.fields, config.towers, config.model, 0)
    checkpoint.save(config.folder / "checkpoints", 6, Contents(model.state_dict(), {}, {}, config.to_yaml()))
    for name, text in (("queen", "♛"), ("king", "♚")):
        picture = Image.new("L", (64, 64), 255)
        ImageDraw.Draw(picture).text((20, 20), text.encode("ascii", "replace").decode(), fill=0)
        picture.save(tmp_path / f"{name}.png")
    script = f"{example}\nassert images.shape == (2, 16)"
    done = run_script(script, cwd=tmp_path, env={"HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    scores = torch.tensor([float(number) for number in re.findall(r"-?\d\.\d+", done.stdout)])
    assert scores.shape == (2,) and scores.abs().max() <= 1
