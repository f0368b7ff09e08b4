"""`torchrun` on two gloo processes: the same losses and weights as one process, from the same global batches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent


def test_two_ranks_train_as_one(config_file, tmp_path):
    """Batch norm sees each rank's own part, so the towers have none here; the loss sees all of the batch."""
    convnext = json.dumps({"type": "timm", "model": "test_convnext", "in_chans": 1})
    options = ["train.steps=4", "data.lanes=4", "train.lr=1e-4", f"towers.image={convnext}", f"towers.audio={convnext}"]
    options += ["fields.image.modality.size=48", "fields.audio.modality.mels=32", "fields.audio.modality.hop=200"]
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"])):
        command = [sys.executable, *launcher, "-m", "mmcontrast", "train", str(config_file), *options, f"run.name={name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    logs = [(tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    weights = [
        load_file(tmp_path / "runs" / name / "checkpoints" / "step-00000004" / "model.safetensors") for name in ("one", "two")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=2e-5)
    assert (tmp_path / "runs" / "two" / "results.json").exists()
