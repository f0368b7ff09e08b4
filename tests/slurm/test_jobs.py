"""Jobs on a real Slurm of two nodes: warned, saved, queued again and completed; cancelled; a table by an array of tasks."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.embedding_job import embed_shards
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.models import make_model
from mmcontrast.run_folder import prepare_folder
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
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
SMALL = (f"train.steps={STEPS}", "train.checkpoint_every=0", "objective={type: my_lab:Waiting}")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lacking()), reason=f"no Slurm: {lacking()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def lab(tmp_path, cluster, monkeypatch):
    (tmp_path / "my_lab.py").write_text(MY_LAB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_lab", raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(cluster.env, "PYTHONPATH", str(tmp_path))
    return tmp_path


def submit(cluster, *arguments) -> tuple[str, Path]:
    """(the last job's number, the launch folder)."""
    gpus = [] if "--gpus-per-node" in arguments else ["--gpus-per-node", "0"]
    done = CliRunner().invoke(app, [*map(str, arguments), *gpus, "--time", "00:10:00"], env=cluster.env)
    assert done.exit_code == 0, done.output
    launch = Path(re.findall(r"in: +(\S+)", done.output)[0])
    return (launch / "jobs").read_text().split()[-1], launch


def steps_of(run: Path) -> list[int]:
    log = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def test_a_warned_job_is_saved_queued_again_and_completed(vectors_file, lab, cluster):
    (lab / "wait").touch()
    number, launch = submit(cluster, "submit", vectors_file, *SMALL, "--nodes", 2)
    run = lab / "runs" / "small"
    cluster.wait(lambda: len(steps_of(run)) >= 3, 300, "third step")
    cluster.call("scancel", "--signal=USR1", "--batch", number)  # as --signal=B:USR1@120 does
    cluster.wait(lambda: cluster.job(number).get("Restarts") == "1", 120, "second start")
    before = int(checkpoint.find(run / "checkpoints", "last").name[-8:])
    assert 3 <= before < STEPS
    (lab / "wait").unlink()

    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "mmcontrast",
        "train",
    ]
    whole = subprocess.run(
        [*torchrun, str(vectors_file), *SMALL, "run.name=whole"], cwd=ROOT, env=cluster.env, capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    ended = cluster.end_of(number)
    log = next(launch.glob("train-*.log")).read_text()
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "1", "0:0"), log
    assert "start 1 on n[1-2]: train" in log and "start 2 on n[1-2]: train --resume" in log
    assert log.count("queued again") == 1 and f"step {STEPS}/{STEPS}" in log
    assert steps_of(run) == list(range(1, STEPS + 1))
    ends = [
        load_file(checkpoint.find(lab / "runs" / name / "checkpoints", "last") / "model.safetensors")
        for name in ("whole", "small")
    ]
    torch.testing.assert_close(ends[1], ends[0])
    assert cluster.processes_of(number) == {}
    assert {file.name for file in launch.iterdir()} >= {"config.yaml", "train.sbatch", "code.json", "jobs"}


def test_a_cancelled_job_ends_at_once_and_for_good(vectors_file, lab, cluster):
    (lab / "wait").touch()
    options = ["train.steps=4000", "objective={type: my_lab:Waiting}", f"evaluation.splits={{val: {lab / 'train.tar'}}}"]
    options += ["--nodes", 2, "--evaluate-after"]
    after, launch = submit(cluster, "submit", vectors_file, *options)
    number, run = (launch / "jobs").read_text().split()[0], lab / "runs" / "small"
    cluster.wait(lambda: len(steps_of(run)) >= 3, 300, "third step")
    assert cluster.job(after)["Dependency"].startswith(f"afterok:{number}")
    processes = cluster.processes_of(number)
    ranks = [pid for pid, line in processes.items() if line.split()[1:4] == ["-u", "-m", "mmcontrast"]]
    assert len(ranks) == 2 and sum("torch.distributed.run" in line for line in processes.values()) >= 2, processes

    cluster.call("scancel", number)
    cluster.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes), 60, "end of all processes")
    ended = cluster.end_of(number, 60)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0") and cluster.processes_of(number) == {}
    cluster.wait(lambda: cluster.job(after)["JobState"] == "CANCELLED", 120, "end of the job that waited")
    assert "queued again" not in next(launch.glob("train-*.log")).read_text() and not cluster.call("squeue", "-h")


def test_the_log_and_the_exit_code_say_why_a_job_failed(vectors_file, lab, cluster):
    number, launch = submit(cluster, "submit", vectors_file, "data.train=nowhere.tar", "--gpus-per-node", 2)
    ended = cluster.end_of(number)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert ended["TresPerNode"] == "gres:gpu:2"
    assert "no shard at 'nowhere.tar'" in " ".join(next(launch.glob("train-*.log")).read_text().split())


def test_an_array_makes_one_table_and_only_what_failed_is_done_again(config_file, corpus, tmp_path, cluster):
    """One of three tasks meets a picture that cannot be decoded."""
    config = load_config(config_file)
    run, out, shards = config.folder, tmp_path / "table", tmp_path / "shards"
    model = make_model(config.fields, config.towers, config.model, config.train.seed)
    prepare_folder(config, overwrite=False)
    checkpoint.save(run / "checkpoints", 1, Contents(model.state_dict(), {}, {}, config.to_yaml()))
    shutil.copytree(corpus, shards)
    broken = shards / "train-00001.tar"
    whole = broken.read_bytes()
    with tarfile.open(broken) as tar:
        picture = next(member for member in list(tar)[40:] if member.name.endswith(".png"))
    with broken.open("rb+") as file:
        file.seek(picture.offset_data)
        file.write(bytes(picture.size))

    arguments = ["submit-embed", run, shards / "train-*.tar", out, "--tasks", 3, "--batch-size", 16]
    number, launch = submit(cluster, *arguments)
    codes = [cluster.end_of(f"{number}_{task}")["ExitCode"] for task in (1, 2, 3)]
    assert codes == ["0:0", "2:0", "0:0"]
    assert "train-00001.tar" in (launch / f"embed-{number}_2.log").read_text()
    parts = {file: file.stat().st_mtime_ns for file in out.glob("part-*")}
    assert sorted(file.name for file in parts) == [
        f"part-0000{k}.{kind}" for k in (0, 2) for kind in ("parquet", "safetensors")
    ]
    with pytest.raises(UserError, match="no complete embedding table"):
        EmbeddingTable.read(out)

    broken.write_bytes(whole)
    number, launch = submit(cluster, *arguments)
    assert "#SBATCH --array=2\n" in (launch / "embed.sbatch").read_text()
    assert cluster.end_of(f"{number}_2")["ExitCode"] == "0:0"
    assert all(file.stat().st_mtime_ns == written for file, written in parts.items())
    assert embed_shards(run, str(shards / "train-*.tar"), tmp_path / "once", device="cpu", batch_size=16)
    table, once = EmbeddingTable.read(out), EmbeddingTable.read(tmp_path / "once")
    assert table.metadata == once.metadata and torch.equal(table.sample_ids, once.sample_ids)
    for field, embeddings in once.fields.items():
        torch.testing.assert_close(table.fields[field], embeddings)
        assert torch.equal(table.present[field], once.present[field])
