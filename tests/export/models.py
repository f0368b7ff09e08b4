"""Models to be exported: composed by configs, with weights at random, as the folders of runs."""

import copy
from pathlib import Path
from typing import Any

import torch

from mmcontrast.config import RunConfig
from mmcontrast.models import make_model
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents

TEXT_TOWER = {"type": "open_clip_text", "width": 32, "heads": 2, "layers": 2, "context_length": 24}
IMAGE = {"modality": {"type": "image", "size": 160, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}, "tower": "image"}
TEXT = {"modality": {"type": "text", "context_length": 24}, "tower": "text"}
TIMM = {
    "fields": {"image": IMAGE, "text": TEXT},
    "towers": {"image": {"type": "timm", "model": "test_vit"}, "text": TEXT_TOWER},
    "model": {"embed_dim": 20, "logit_bias": -10.0, "logit_scale": 10.0},
}


def changed(**options):
    """The composed model with other options, named by their path with two underscores."""
    config = copy.deepcopy(TIMM)
    for path, value in options.items():
        *parents, last = path.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    return config


def run(folder: Path, config: dict[str, Any], perturb: float = 0.05) -> Path:
    """Write a run whose weights no library would make: all of them moved, scale, bias and statistics of norms too."""
    whole = config | {"run": {"name": folder.name, "dir": str(folder.parent)}, "data": {"train": "nothing.tar"}}
    whole |= {"train": {"steps": 1, "batch_size": 2}}
    made = RunConfig.model_validate(whole)
    model = make_model(made.fields, made.towers, made.model, seed=1)
    perturbed(model, perturb)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(made.to_yaml())
    checkpoint.save(folder / "checkpoints", 1, Contents(model.state_dict(), {}, {"step": 1}, made.to_yaml()))
    return folder


@torch.no_grad()
def perturbed(model: torch.nn.Module, size: float = 0.05) -> None:
    """Move every weight and every statistic, so that one that was not copied shows."""
    generator = torch.Generator().manual_seed(7)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(size * torch.rand(value.shape, generator=generator))
