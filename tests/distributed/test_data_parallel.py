"""Two gloo processes, also of `torchrun` and `accelerate launch`: losses and weights of one, from the same global batches."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.command import NO_EVALUATION, ROOT, mmcontrast

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]

MARGIN = """
from mmcontrast.objectives import Objective
from mmcontrast.score import LogSumExp, log1pexp

class Margin(Objective):
    reductions = (LogSumExp(),)

    def __init__(self, margin=0.1):
        super().__init__()
        self.margin = margin

    def forward(self, d):
        return log1pexp(d[LogSumExp()] - (d.positives - self.margin * d.scale))
"""


@pytest.mark.parametrize(
    ("launcher", "case"),
    [
        (None, "my own objective, a queue, and caching on two ranks"),
        pytest.param(ACCELERATE, "my own objective, a queue, and caching on two ranks", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "plain", marks=pytest.mark.slow),
    ],
    ids=["forks", "accelerate", "torchrun"],
)
def test_two_ranks_train_as_one(config_file, tmp_path, launcher, case):
    """Batch norm sees each rank's own part, so the towers have none here; the loss sees all of the batch. An objective that
    is written outside the package and named by import path gets tiles, ranks and caching like any other."""
    (tmp_path / "my_lab.py").write_text(MARGIN)
    environment = {"PYTHONPATH": str(tmp_path)}
    convnext = {"type": "timm", "model": "test_convnext", "in_chans": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    convnext = json.dumps(convnext)
    options = ["train.steps=4", "data.lanes=4", "train.lr=1e-4", f"towers.image={convnext}", f"towers.audio={convnext}"]
    options += ["fields.image.modality.size=48", "fields.audio.modality.mels=32", "fields.audio.modality.hop=200"]
    for name, ranks in (("one", 1), ("two", 2)):
        command = ["train", str(config_file), *options, f"run.name={name}"]
        if case != "plain":
            command += ["objective={type: my_lab:Margin, margin: 0.2}", "train.queue_size=21"]
            command += ["train.micro_batch_size=3"] if name == "two" else []
        command += NO_EVALUATION if name == "one" else []
        if launcher and ranks > 1:
            command = [sys.executable, *launcher, "-m", "mmcontrast", *command]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | environment)
        else:
            done = mmcontrast(*command, ranks=ranks, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert launcher or "FutureWarning" not in done.stderr, done.stderr[-3000:]
    logs = [(tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    weights = [
        load_file(tmp_path / "runs" / name / "checkpoints" / "step-00000004" / "model.safetensors") for name in ("one", "two")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=2e-5)
    assert (tmp_path / "runs" / "two" / "results.json").exists()
