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


CONVNEXT = {"type": "timm", "model": "test_convnext", "in_chans": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
OWN = ["objective={type: my_lab:Margin, margin: 0.2}"]


@pytest.fixture
def my_lab(tmp_path):
    """The environment of an objective that is written outside the package and named by import path."""
    (tmp_path / "my_lab.py").write_text(MARGIN)
    return {"PYTHONPATH": str(tmp_path)}


def check_alike(runs, last, rtol=1e-3, atol=2e-5):
    """Check that the runs `one` and `two` have the same losses, and weights at the end."""
    logs = [(runs / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == last
    weights = [load_file(runs / name / "checkpoints" / f"step-{last:08d}" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=rtol, atol=atol)


def test_two_ranks_train_as_one(config_file, tmp_path, my_lab):
    """With an objective of one's own, a queue and caching. Batch norm sees each rank's own part, so the towers have none here;
    the loss sees all of the batch."""
    convnext = json.dumps(CONVNEXT)
    options = ["train.steps=4", "data.lanes=4", "train.lr=1e-4", f"towers.image={convnext}", f"towers.audio={convnext}"]
    options += ["fields.image.modality.size=48", "fields.audio.modality.mels=32", "fields.audio.modality.hop=200"]
    options += [*OWN, "train.queue_size=21"]
    for name, ranks, own in (("one", 1, NO_EVALUATION), ("two", 2, ["train.micro_batch_size=3"])):
        done = mmcontrast("train", config_file, *options, *own, f"run.name={name}", ranks=ranks, env=my_lab)
        assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr[-3000:]
    check_alike(tmp_path / "runs", 4)
    assert (tmp_path / "runs" / "two" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_launchers_start_ranks_that_train_as_one(vectors_file, tmp_path, my_lab, launcher):
    options = [*OWN, "train.queue_size=21", f"evaluation.splits={{val: {tmp_path / 'train.tar'}}}"]
    alone = mmcontrast("train", vectors_file, *options, "run.name=one", env=my_lab)
    assert alone.returncode == 0, alone.stderr[-3000:]
    options += ["train.micro_batch_size=3", "run.name=two"]
    command = [sys.executable, *launcher, "-m", "mmcontrast", "train", str(vectors_file), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | my_lab)
    assert done.returncode == 0, done.stderr[-3000:]
    check_alike(tmp_path / "runs", 6)
    assert (tmp_path / "runs" / "two" / "results.json").exists()
