"""Runs of one architecture with different weights, to be blended: small, with batch norms, evaluated on two splits."""

from pathlib import Path

import torch
import yaml

from mmcontrast.config import load_config
from mmcontrast.models import make_model
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents


def runs(config_file: Path, corpus: Path, number: int, seed: int = 0) -> list[Path]:
    """Write runs whose weights, statistics, scales and counters differ, as after different trainings."""
    tree = yaml.safe_load(config_file.read_text())
    del tree["fields"]["audio"], tree["towers"]["audio"]
    tree["model"]["logit_bias"] = -2.0
    tree["towers"]["text"] = {"type": "open_clip_text", "width": 16, "layers": 1, "heads": 2, "context_length": 24}
    splits = {"old": str(corpus / "train-00000.tar"), "new": str(corpus / "val-*.tar")}
    tree["evaluation"] |= {"splits": splits, "resamples": 50}
    folders = []
    generator = torch.Generator().manual_seed(seed)
    for member in range(number):
        tree["run"]["name"] = f"member{member}"
        config_file.write_text(yaml.safe_dump(tree))
        config = load_config(config_file)
        model = make_model(config.fields, config.towers, config.model, seed=1)
        state = model.state_dict()
        for name, value in state.items():
            if value.is_floating_point():
                value += 0.1 * torch.rand(value.shape, generator=generator)
            else:
                value += 10 * member + 1
            assert name
        folder = config.folder
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config.to_yaml())
        checkpoint.save(folder / "checkpoints", 1, Contents(state, {}, {"step": 1}, config.to_yaml()))
        folders.append(folder)
    return folders
