"""Models to begin with, data, and configs of runs that begin with them."""

import pytest
import torch
import yaml

from tests.models.open_clip_models import save
from tests.models.samples import TEXTS, pictures, sounds
from tests.models.transformers_models import clap, clip, saved, siglip

HF = {"hf clip": clip, "hf siglip": siglip, "hf clap": clap}
KINDS = ["clip", "siglip", "hf clip", "hf siglip", pytest.param("hf clap", marks=pytest.mark.slow)]


def start_of(kind, folder):
    return saved(HF[kind](), folder) if kind in HF else save(folder, kind)


def write_pairs(kind, folder):
    """A CSV of 24 pairs with the files that it names, and the files."""
    files = sounds(folder, 8000, (0.5, 0.3, 0.9, 0.7, 0.4, 0.6)) if kind == "hf clap" else pictures(folder)
    column = "audio" if kind == "hf clap" else "image"
    lines = [f"{files[k % 6]},{TEXTS[k % 4].replace(',', ' ')} {k},{k}" for k in range(24)]
    (folder / "pairs.csv").write_text("\n".join([f"{column},text,sample_id", *lines]))
    return files


def write_run(folder, start, **sections):
    """Write a config that begins with a start, and return its path."""
    tree = {
        "run": {"name": "tuned", "dir": str(folder / "runs")},
        "model": {"start": start},
        "data": {"train": str(folder / "pairs.csv"), "num_workers": 0},
        "train": {"steps": 2, "batch_size": 8, "log_every": 1, "threads": 1, "trackers": {}},
    }
    for section, options in sections.items():
        tree[section] = tree.get(section, {}) | options if isinstance(options, dict) else options
    (folder / "tuned.yaml").write_text(yaml.safe_dump(tree))
    return folder / "tuned.yaml"


def embedded(model, files):
    kind = {"audio": files} if "audio" in model.fields else {"images": files}
    return torch.cat([model.embed(**kind), model.embed(texts=TEXTS)])
