"""Jobs on a real Slurm of two nodes: warned, saved, queued again and completed; cancelled; a table by an array of tasks."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.training import checkpoint
from tests.slurm.cluster import Cluster, lacking

ROOT = Path(__file__).parent.parent.parent
STEPS = 40
MY_LAB = """
import time
from pathlib import Path
from mmcontrast.objectives import InfoNCE

class Waiting(InfoNCE):
    '''Takes its time, while there is a file `wait`.'''
    def forward(self, d):
        if (Path(__file__).parent / "wait").exists():
            time.sleep(0.1)
        return super().forward(d)
"""
SMALL = (
    f"train.steps={STEPS}", "train.checkpoint_every=0", "objective={type: my_lab:Waiting}", "evaluation.splits={}",
    "evaluation.zero_shot={}",
)  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lacking()), reason=f"no Slurm: {lacking()}")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture
def lab(tmp_path, cluster, monkeypatch):
    (tmp_path / "my_lab.py").write_text(MY_LAB)
    monkeypatch.setitem(cluster.env, "PYTHONPATH", str(tmp_path))
    return tmp_path


def submit(cluster, *arguments) -> tuple[str, Path]:
    """(the last job's number, the launch folder)."""
    command = [sys.executable, "-m", "mmcontrast", *map(str, arguments), "--time", "00:10:00", "--gpus-per-node", "0"]
    done = subprocess.run(command, cwd=ROOT, env=cluster.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return re.findall(r"job (?:\d+, then )?(\d+)", done.stderr)[0], Path(re.findall(r"in: +(\S+)", done.stderr)[0])


def steps_of(run: Path) -> list[int]:
    log = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def test_a_warned_job_is_saved_queued_again_and_completed(config_file, lab, cluster):
    (lab / "wait").touch()
    number, launch = submit(cluster, "submit", config_file, *SMALL, "--nodes", 2)
    run = lab / "runs" / "small"
    cluster.wait(lambda: len(steps_of(run)) >= 3, 90, "third step")
    cluster.call("scancel", "--signal=USR1", "--batch", number)  # as --signal=B:USR1@120 does
    cluster.wait(lambda: cluster.job(number).get("Restarts") == "1", 30, "second start")
    before = int(checkpoint.find(run / "checkpoints", "last").name[-8:])
    assert 3 <= before < STEPS
    (lab / "wait").unlink()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "mmcontrast", "train"]
    whole = subprocess.run(
        [*torchrun, str(config_file), *SMALL, "run.name=whole"], cwd=ROOT, env=cluster.env, capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    ended = cluster.end_of(number)
    log = next(launch.glob("train-*.log")).read_text()
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "1", "0:0"), log
    assert "start 1 on n[1-2]: train" in log and "start 2 on n[1-2]: train --resume" in log
    assert log.count("queued again") == 1 and f"step {STEPS}/{STEPS}" in log
    assert steps_of(run) == list(range(1, STEPS + 1))
    ends = [load_file(checkpoint.find(lab / "runs" / name / "checkpoints", "last") / "model.safetensors") for name in ("whole", "small")]
    torch.testing.assert_close(ends[1], ends[0])
    assert cluster.processes_of(number) == {}
    assert {file.name for file in launch.iterdir()} >= {"config.yaml", "train.sbatch", "code.json", "jobs"}


def test_a_cancelled_job_ends_at_once_and_for_good(config_file, lab, cluster):
    (lab / "wait").touch()
    options = ["evaluation.splits={val: " + str(config_file) + "}", "--nodes", 2, "--evaluate-after"]
    after, _ = submit(cluster, "submit", config_file, "train.steps=4000", *SMALL[1:], *options)
    number = str(int(after) - 1)
    run = lab / "runs" / "small"


def with_text(shard: Path, key: str, text: bytes) -> None:
    """Changes the text of a sample in a tar."""
    members = []
    with tarfile.open(shard) as tar:
        for member in tar:
            members.append((member, tar.extractfile(member).read()))
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(text if member.name == key else content))
