"""The fork server does what a new interpreter does: exit codes, output, folders, signals, ranks."""

import signal
import subprocess

import pytest

from tests.command import ROOT, Process, call_on_ranks, mmcontrast, start


def test_a_fork_says_and_returns_what_a_new_interpreter_does(config_file, tmp_path):
    arguments = ["config", config_file.name, "train.stps=1"]
    forked, real = (mmcontrast(*arguments, cwd=tmp_path, real=real) for real in (False, True))
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)
    assert forked.returncode == 2 and "did you mean 'steps'" in forked.stderr


def test_environment_signals_and_failures_of_a_process(tmp_path):
    process = start("config", "nowhere.yaml", cwd=tmp_path)
    assert process.poll() in (None, 2) and process.wait() == 2 and process.poll() == 2
    asleep = Process("time:sleep", [1000], ROOT, {})
    assert asleep.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        asleep.wait(timeout=0.05)
    asleep.send_signal(signal.SIGTERM)
    assert asleep.wait() == -signal.SIGTERM
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        call_on_ranks("operator:floordiv", 2, 0)
