"""Training, evaluation and embedding by the real command on a card: its first losses are the CPU's."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from safetensors.torch import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WORDS = ["red", "green", "blue", "grey", "small", "large", "round", "square"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """96 pairs of noise and words, in three shards."""
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"train-{shard:05d}.tar")) as writer:
            for number in range(32):
                picture = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture, "PNG")
                caption = f"{WORDS[number % 8]} {WORDS[shard]} {number}"
                writer.write({"__key__": f"{shard}{number:05d}", "png": picture.getvalue(), "txt": caption})
    bert = {"vocab_size": 49408, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    values = {
        "run": {"name": "card", "dir": str(folder / "runs")},
        "fields": {
            "image": {"modality": {"type": "image", "size": 32}, "tower": "image"},
            "text": {"modality": {"type": "text", "context_length": 16}, "tower": "text"},
        },
        "towers": {
            "image": {"type": "timm", "model": "resnet18", "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
            "text": {"type": "transformers", "model": "bert", "config": bert},
        },
        "model": {"embed_dim": 32},
        "objective": "infonce",
        "data": {"train": str(folder / "train-*.tar"), "num_workers": 2, "block": 8, "window": 32},
        "train": {"steps": 8, "batch_size": 32, "log_every": 1, "checkpoint_every": 4, "warmup_steps": 1, "lr": 1e-3},
        "evaluation": {"splits": {"val": str(folder / "train-*.tar")}},
    }
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def mmcontrast(*arguments, card=True):
    env = os.environ | ({} if card else {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-m", "mmcontrast", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def losses(config, name):
    lines = (config.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def test_it_learns_as_on_the_cpu_and_goes_on_where_it_was(config):
    steady = "train.schedule=constant"
    mmcontrast("train", config, steady, "run.name=cpu", card=False)
    mmcontrast("train", config, steady, "run.name=whole")
    mmcontrast("train", config, steady, "run.name=halves", "train.steps=4")
    mmcontrast("train", config, steady, "run.name=halves", "--resume")
    cpu, whole, halves = (losses(config, name) for name in ("cpu", "whole", "halves"))
    assert list(cpu) == list(whole) == list(halves)
    for step in cpu:  # of fp32: convolutions differ in their order of sums, and a step multiplies that
        assert whole[step] == pytest.approx(cpu[step], rel=2e-2) and halves[step] == pytest.approx(whole[step], rel=2e-2)
    assert whole[min(whole)] == pytest.approx(cpu[min(cpu)], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        ["train.precision=bf16", "train.compile=[text]"],
        ["train.precision=bf16", "train.micro_batch_size=8", "objective=siglip"],
        ["train.precision=fp16", "objective=hard_negative"],
        ["train.precision=bf16", "train.recompute=[text]", "train.ema_decay=0.9", "train.queue_size=64"],
    ],
    ids=["compile", "micro_batch_size", "fp16", "recompute"],
)
def test_options_of_training(config, options, request):
    name = request.node.callspec.id
    mmcontrast("train", config, f"run.name={name}", *options)
    values = list(losses(config, name).values())
    assert len(values) == 8 and np.isfinite(values).all() and values[-1] < values[0]


def test_evaluation_and_embedding(config, tmp_path):
    mmcontrast("train", config, "run.name=used")
    run, rows = config.parent / "runs" / "used", {}
    shards = str(config.parent / "train-*.tar")
    for card in (True, False):
        mmcontrast("evaluate", run, "--out", tmp_path / f"{card}.json", card=card)
        mmcontrast("embed", run, shards, tmp_path / str(card), card=card)
        rows[card] = load_file(tmp_path / str(card) / "part-00000.safetensors")
    for field in ("image", "text"):
        assert (rows[True][field].float() * rows[False][field].float()).sum(1).min() > 0.999
