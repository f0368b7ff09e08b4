"""Fault drills on eight ranks, of which half are lost in a save; on four: a full disk at one, one that is far too slow."""

import json
import signal
import time

import pytest

from mmcontrast.training import checkpoint
from tests.command import mmcontrast, start_ranks, wait_for_ranks

pytestmark = pytest.mark.slow
RANKS = 8
MY_LAB = """
import os, resource, time
from pathlib import Path
from mmcontrast.objectives import InfoNCE
from mmcontrast.training import checkpoint

HERE, RANK = Path(__file__).parent, int(os.environ.get("RANK", "0"))

class Drilled(InfoNCE):
    '''Prepares a fault in the third step of six.'''
    def __init__(self, drill):
        super().__init__()
        self.drill = drill

    def forward(self, d):
        if self.progress >= 2 / 6:
            if self.drill == "lost" and RANK == 0:
                write = checkpoint.write_tensors
                def waiting(*arguments):
                    (HERE / "saving").touch()
                    while not (HERE / "lost").exists():
                        time.sleep(0.02)
                    return write(*arguments)
                checkpoint.write_tensors = waiting
            if self.drill == "full" and RANK == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            if self.drill == "slow" and RANK == 2:
                time.sleep(1000)
        return super().forward(d)
"""


def drill(vectors_file, tmp_path, name, *options, ranks=4):
    """Start ranks with small weights in shards that save every step."""
    (tmp_path / "my_lab.py").write_text(MY_LAB)
    settings = [f"objective={{type: my_lab:Drilled, drill: {name}}}", "data.lanes=8", "train.parallel=fsdp", "train.steps=6"]
    settings += ["train.checkpoint_every=1", *options]
    return start_ranks("train", vectors_file, *settings, ranks=ranks, env={"PYTHONPATH": str(tmp_path)})


def ended(processes):
    wait_for_ranks(processes, 300)
    return [process.returncode for process in processes], "".join(process.output()[1] for process in processes)


def last_of(tmp_path):
    folder = tmp_path / "runs" / "small" / "checkpoints"
    last = checkpoint.find(folder, "last")
    checkpoint.check(last)
    return last.name


@pytest.mark.parametrize("beside", ["true", "false"])
def test_a_node_that_is_lost_while_a_checkpoint_is_written(vectors_file, tmp_path, beside):
    """Ranks 4 to 7 are killed at once; the others say so, the checkpoint before is whole, and four ranks go on from it."""
    processes = drill(vectors_file, tmp_path, "lost", f"train.async_checkpoints={beside}", ranks=RANKS)
    deadline = time.monotonic() + 200
    while not (tmp_path / "saving").exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    for process in processes[RANKS // 2 :]:
        process.send_signal(signal.SIGKILL)
    (tmp_path / "lost").touch()
    codes, text = ended(processes)
    assert codes[RANKS // 2 :] == [-signal.SIGKILL] * (RANKS // 2)
    assert set(codes[: RANKS // 2]) <= {5, -signal.SIGKILL} and 5 in codes, text[-3000:]  # the helper ends those that are left
    assert "another rank has ended; its own message says why" in " ".join(text.split())
    assert last_of(tmp_path) in ("step-00000002", "step-00000003")
    if beside == "false":
        arguments = ("data.lanes=8", "train.parallel=fsdp", "train.steps=4", "objective=infonce")
        done = mmcontrast("train", vectors_file, *arguments, "--resume", ranks=RANKS // 2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert last_of(tmp_path) == "step-00000004"


@pytest.mark.parametrize("beside", ["true", "false"])
def test_a_disk_that_is_full_at_one_rank(vectors_file, tmp_path, beside):
    """The kernel refuses what rank 3 writes: all ranks end with the first one's line, which names it."""
    codes, text = ended(drill(vectors_file, tmp_path, "full", f"train.async_checkpoints={beside}"))
    text = " ".join(text.split())
    assert 2 in codes and set(codes) <= {2, 5, -signal.SIGKILL}, text[-3000:]
    assert "error: the checkpoint of step 3 could not be written to" in text, text[-3000:]
    assert "rank 3" in text and "File too large" in text and "the earlier ones are untouched" in text
    assert last_of(tmp_path) == "step-00000002"


def test_a_rank_that_is_far_too_slow_is_named(vectors_file, tmp_path):
    codes, text = ended(drill(vectors_file, tmp_path, "slow", "train.stall_seconds=20"))
    assert 4 in codes and "no step for 20 s (train.stall_seconds)" in text, text[-3000:]
    lines = {int(line.split("rank ")[1].split()[0]): line for line in text.splitlines() if line.startswith("step 3, rank ")}
    assert "my_lab.py" in lines[2] and "in forward" in lines[2], text[-3000:]
    assert not any("my_lab.py" in line for rank, line in lines.items() if rank != 2)
    stack = (tmp_path / "runs" / "small" / "stalled" / "rank-00002.txt").read_text()
    assert "time.sleep(1000)" in stack and last_of(tmp_path) == "step-00000002"
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and max(steps, default=0) <= 2
