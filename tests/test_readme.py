"""The README's Python example runs as it stands, in a folder that has what it names."""

import re
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from mmcontrast.config import load_config
from mmcontrast.models import make_model
from mmcontrast.runs import prepare_folder
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from tests.command import run_script

ROOT = Path(__file__).parents[1]


def test_the_five_lines(config_file, tmp_path):
    (example,) = re.findall(r"```python\n(import mmcontrast\n\nmodel = .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
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
