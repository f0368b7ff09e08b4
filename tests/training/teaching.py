"""A small run on vectors, in this process: its shards, its config, and itself."""

import io

import numpy as np
import yaml

from mmcontrast.config import load_config
from mmcontrast.data import write_shard
from mmcontrast.run_folder import prepare_folder
from mmcontrast.runs import make_run_context
from mmcontrast.training.loop import train

N = 24


def npy(array):
    target = io.BytesIO()
    np.save(target, np.asarray(array, dtype=np.float32))
    return target.getvalue()


def write_vectors(path, more=lambda k, random: {}, about=lambda k: {}):
    """N samples of two vectors that belong together, with further members and entries of the json."""
    random = np.random.default_rng(0)
    samples = []
    for k in range(N):
        vector = random.normal(size=6)
        members = {"a.npy": npy(vector), "b.npy": npy(vector + 0.1 * random.normal(size=6)), **more(k, random)}
        samples.append({"__key__": f"{k:03d}", "json": {"sample_id": k, **about(k)}, **members})
    write_shard(path, samples)
    return path


def write_config(folder, shards, name="run", **changes):
    """Fields `a` and `b`, a linear tower each. `changes` are merged into `train`, `data` and `model`, or replace others."""
    config = {
        "run": {"name": name, "dir": str(folder / "runs")},
        "fields": {f: {"modality": {"type": "vector", "width": 6}, "tower": f, "keys": [f"{f}.npy"]} for f in "ab"},
        "towers": {f: {"type": "linear", "inputs": 6, "width": 8} for f in "ab"},
        "model": {"embed_dim": 8},
        "data": {"train": str(shards), "num_workers": 0, "block": 4, "window": 8, "lanes": 2},
        "train": {"steps": 2, "batch_size": 8, "log_every": 1, "warmup_steps": 0, "threads": 1, "trackers": {}, "lr": 0.01},
    }
    for group, given in changes.items():
        config[group] = {**config[group], **given} if group in ("train", "data", "model") else given
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(path, *overrides, resume=False):
    """Train in this process, and return the job."""
    config = load_config(path, overrides)
    job = make_run_context(config, resume)
    if not resume:
        prepare_folder(config, overwrite=False, text=job.config)
    train(job, resume)
    return job
