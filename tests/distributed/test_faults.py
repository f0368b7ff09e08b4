"""Two real ranks of which one raises, stalls, or has a NaN; warnings of a scheduler: all end in time with a clear message."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmcontrast.training import checkpoint, preemption
from tests.command import NO_EVALUATION, children, start, train

PEER_LOST = 5  # the code of a rank whose peer has ended
MY_LAB = """
import os, time
from pathlib import Path
import torch
from mmcontrast.errors import UserError
from mmcontrast.objectives import InfoNCE
from mmcontrast.modalities import TextModality

def here():
    return os.environ.get("RANK") == "1"

class Faulty(InfoNCE):
    '''Does something in the third step, on rank 1.'''
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, d):
        losses = super().forward(d)
        if self.progress >= 2 / 400 and self.fault == "wait":  # of 400 steps in the third, of less in the second
            Path(__file__).with_name("waiting").touch()
            while not Path(__file__).with_name("go").exists():
                time.sleep(0.02)
        elif self.progress >= 2 / 6 and here():
            if self.fault == "raise":
                raise RuntimeError("the third step of rank 1")
            if self.fault == "refuse":
                raise UserError("rank 1 has no more licences")
            if self.fault == "stall":
                time.sleep(1000)
            if self.fault == "nan":
                losses = losses * float("nan")
            if self.fault == "die":
                os._exit(9)
        return losses

class Endless(TextModality):
    '''Never comes back from the fortieth text, on rank 1.'''
    texts = 0

    def transform(self, raw, training):
        self.texts += 1
        if training and here() and self.texts > 30:
            time.sleep(1000)
        return super().transform(raw, training)
"""


def two_ranks(config_file, tmp_path, *options, real=False):
    (tmp_path / "my_lab.py").write_text(MY_LAB)
    env = {"PYTHONPATH": str(tmp_path), "MMCONTRAST_EXIT_CODE_FILE": str(tmp_path / "code")}
    return train(config_file, "data.lanes=2", "train.checkpoint_every=1", *options, ranks=2, real=real, env=env, timeout=600)


CASES = {
    "raise": ("the third step of rank 1", 1),
    "refuse": ("error: rank 1 has no more licences", 2),
    "nan": ("error: step 3: the loss is nan", 3),
    "stall": ("error: stalled: no step for 12 s", 4),
    "die": ("", 9),
}


@pytest.mark.parametrize(
    ("fault", "real"),
    [*((fault, False) for fault in CASES), *(pytest.param(fault, True, marks=pytest.mark.slow) for fault in ("stall", "die"))],
)
def test_a_rank_in_trouble_ends_all_with_one_message(vectors_file, tmp_path, fault, real):
    """All ranks end, as Slurm starts them and as torchrun does (`real`), which prints the code of the first that failed."""
    message, code = CASES[fault]
    faulty = f"objective={{type: my_lab:Faulty, fault: {fault}}}"
    options = ["train.stall_seconds=12"] if fault == "stall" else []
    done = two_ranks(vectors_file, tmp_path, faulty, *options, real=real)
    text = " ".join(done.stderr.split())
    if real:
        assert done.returncode and re.search(rf"exitcode ?: {code}\b", text), done.stderr[-3000:]
    else:
        assert done.returncode in (code, PEER_LOST) and code in done.codes, done.stderr[-3000:]
    assert text.count(message) == 1 or fault in ("raise", "die"), done.stderr[-3000:]
    assert message in text, done.stderr[-3000:]
    run = tmp_path / "runs" / "small"
    assert checkpoint.find(run / "checkpoints", "last").name == "step-00000002"
    weights = load_file(checkpoint.find(run / "checkpoints", "last") / checkpoint.WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
    if fault in ("nan", "stall"):  # for a job's script: torchrun makes 1 of any
        assert (tmp_path / "code").read_text() == {"nan": "3", "stall": "4"}[fault]
    if fault == "nan":
        stopped = json.loads((run / "stopped.json").read_text())
        assert stopped["step"] == 3 and len(stopped["ids"]) == 8
    if fault == "stall":
        assert "rank 0 on" in text and "rank 1 on" in text and "my_lab.py" in text and "forward" in text
        assert "time.sleep(1000)" in (run / "stalled" / "rank-00001.txt").read_text()


def test_a_start_that_the_first_rank_refuses_ends_the_other_with_a_line(vectors_file, tmp_path):
    done = two_ranks(vectors_file, tmp_path, "--resume")
    text = " ".join(done.stderr.split())
    assert sorted(done.codes) == [2, PEER_LOST] and "error: no run at" in text and "Traceback" not in text, done.stderr


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_endless_read_is_a_stall_of_the_loader(config_file, tmp_path, num_workers):
    endless = "fields.text.modality={type: my_lab:Endless, context_length: 24}"
    options = [f"data.num_workers={num_workers}", "train.stall_seconds=12", *NO_EVALUATION]
    done = two_ranks(config_file, tmp_path, endless, *options)
    assert done.returncode, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if "rank 1 on" in line]
    assert "waiting for a batch for" in line and done.stderr.count("error: stalled") == 1
    assert [line for line in done.stderr.splitlines() if "rank 0 on" in line and "training for" in line]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("bindfs") and Path("/dev/fuse").exists()), reason="needs bindfs and /dev/fuse")
def test_a_file_system_that_hangs_ends_the_run_with_a_message(vectors_file, tmp_path):
    """A FUSE file system, stopped in the middle of a run: the stack, what does not answer, and code 4; nothing that was saved
    is lost, and the run goes on from there."""
    folder, mount = tmp_path / "disk", tmp_path / "mount"
    folder.mkdir()
    mount.mkdir()
    server = subprocess.Popen(["bindfs", "-f", str(folder), str(mount)])
    try:
        while not os.path.ismount(mount):
            assert server.poll() is None
            time.sleep(0.05)
        limits = ["train.stall_seconds=12", "train.pause_stall_seconds=6", "train.checkpoint_every=1"]
        process = start("train", vectors_file, f"run.dir={mount}", "train.steps=100000", *limits)
        wait_for(folder / "small" / "checkpoints" / "step-00000002", process)
        server.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 300
        while "continue with --resume" not in process.output()[1]:
            assert time.monotonic() < deadline, process.output()[1][-3000:]
            time.sleep(0.2)
        text = " ".join(process.output()[1].split())
        assert "error: stalled: no " in text and f"{mount}/small/stalled does not answer: does its file system hang?" in text
        assert "rank 0 on" in text and 'File "' in text
        server.send_signal(signal.SIGCONT)  # a process whose request lies there cannot end before
        assert process.wait(120) == 4
    finally:
        server.send_signal(signal.SIGCONT)
        server.terminate()
        server.wait(60)
    last = checkpoint.find(folder / "small" / "checkpoints", "last")
    checkpoint.check(last)
    done = int(last.name.removeprefix("step-"))
    resumed = train(vectors_file, f"run.dir={folder}", f"train.steps={done + 2}", "--resume")
    assert resumed.returncode == 0, resumed.stderr


def start_training(config_file, tmp_path, *options, **how):
    (tmp_path / "my_lab.py").write_text(MY_LAB)
    return start("train", config_file, *options, env={"PYTHONPATH": str(tmp_path)}, **how)


def wait_for(path, process):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_warned_run_saves_and_continues_as_if_it_had_never_stopped(vectors_file, tmp_path, number):
    """In its second step, with data workers, to which a scheduler sends the signal too."""
    options = ["train.steps=8", "data.num_workers=1", "objective={type: my_lab:Faulty, fault: wait}"]
    env = {"PYTHONPATH": str(tmp_path)}
    process = start_training(vectors_file, tmp_path, *options, real=number == signal.SIGTERM)
    wait_for(tmp_path / "waiting", process)
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, number)
    (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert f"{number.name}: finishing the step" in errors and "is saved: continue with --resume" in " ".join(errors.split())
    run = tmp_path / "runs" / "small"
    assert checkpoint.find(run / "checkpoints", "last").name == "step-00000002"
    assert train(vectors_file, *options, "--resume", env=env).returncode == 0
    whole = train(vectors_file, *options, "run.name=whole", env=env)
    assert whole.returncode == 0, whole.stderr
    last = [tmp_path / "runs" / name / "checkpoints" / "step-00000008" for name in ("whole", "small")]
    ends = [load_file(folder / checkpoint.WEIGHTS) for folder in last]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_second_warning_ends_at_once(vectors_file, tmp_path):
    """In the third step, which does not end."""
    process = start_training(vectors_file, tmp_path, "objective={type: my_lab:Faulty, fault: wait}", "train.steps=400")
    wait_for(tmp_path / "waiting", process)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 300
    while "SIGTERM: finishing the step" not in process.output()[1]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(1.05 * preemption.SAME)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 75
    assert checkpoint.find(tmp_path / "runs" / "small" / "checkpoints", "last").name == "step-00000002"


def test_the_same_warning_by_two_ways_is_one(vectors_file, tmp_path):
    """A scheduler signals every process of a job, and torchrun passes on what it gets itself."""
    process = start_training(vectors_file, tmp_path, "objective={type: my_lab:Faulty, fault: wait}", "train.steps=400")
    wait_for(tmp_path / "waiting", process)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    (tmp_path / "go").touch()
    process.communicate(timeout=300)
    assert process.returncode == 75
    assert checkpoint.find(tmp_path / "runs" / "small" / "checkpoints", "last").name == "step-00000003"


@pytest.mark.slow
def test_one_warned_rank_is_enough(vectors_file, tmp_path):
    """SIGUSR1 reaches rank 1 alone; both save the same step and end."""
    waiting = "objective={type: my_lab:Faulty, fault: wait}"
    process = start_training(vectors_file, tmp_path, waiting, "train.steps=400", ranks=2, real=True)
    wait_for(tmp_path / "waiting", process)
    (second,) = [pid for pid in children(process.pid) if "\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_text()]
    os.kill(second, signal.SIGUSR1)
    (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=300)
    text = " ".join(errors.split())
    assert process.returncode and "exitcode : 75" in text and text.count("is saved: continue with --resume") == 1, errors[
        -3000:
    ]
    assert int(checkpoint.find(tmp_path / "runs" / "small" / "checkpoints", "last").name[-8:]) in (3, 4)
