"""The `mmcontrast` command as tests run it: a fork of a process that has its imports done (`tests/fork_server.py`).

`real=True` starts a new interpreter instead, through torchrun if there are several ranks. A few tests do, so that packaging,
signals and start-up stay proven.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER, OWNER = "MMCONTRAST_TESTS_FOLDER", "MMCONTRAST_TESTS_OWNER"  # set by conftest.py, shared by all workers of a session


class Process:
    """A process of the fork server's, with what is needed of `subprocess.Popen`.

    Attributes:
        pid: its number.
        returncode: None while it runs; minus the signal's number if a signal ended it.
    """

    def __init__(self, target: str, arguments: Sequence[Any], cwd: Path, env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(_server()))
        request = {"target": target, "arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
        socket.send_fds(self._socket, [json.dumps(request).encode()], [file.fileno() for file in self._files])
        self._lines = self._socket.makefile()
        self.pid = int(self._lines.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._socket.settimeout(timeout)
            try:
                self.returncode = int(self._lines.readline())
            except TimeoutError:
                self._lines = self._socket.makefile()
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0) from None
            self._socket.close()
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None:
            self._socket.settimeout(None)
            try:
                ended = bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
            except BlockingIOError:
                ended = False
            if ended:
                self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def output(self) -> tuple[str, str]:
        """Return what has been written so far to stdout and stderr."""
        return tuple(Path(f"/proc/self/fd/{file.fileno()}").read_text(errors="replace") for file in self._files)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and return stdout and stderr."""
        self.wait(timeout)
        return self.output()


def mmcontrast(
    *arguments: object,
    ranks: int = 1,
    real: bool = False,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
) -> subprocess.CompletedProcess[str]:
    """Run `mmcontrast ARGUMENTS`, on several ranks if asked, and return its exit code, stdout and stderr.

    Of several ranks these are the first code that is not 0, and all that they wrote; once one has failed the others have ten
    seconds to end.
    """
    if real:
        command = real_command(arguments, ranks)
        environment = _environment(env)
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    processes = start_ranks(*arguments, ranks=ranks, cwd=cwd, env=env)
    wait_for_ranks(processes, timeout)
    codes = [process.returncode for process in processes]
    texts = ["".join(text) for text in zip(*(process.output() for process in processes), strict=True)]
    done = subprocess.CompletedProcess(arguments, next((code for code in codes if code), 0), *texts)
    done.codes = codes  # type: ignore[attr-defined]
    return done


def start(
    *arguments: object, ranks: int = 1, real: bool = False, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> "Process | subprocess.Popen[str]":
    """Start `mmcontrast ARGUMENTS` in one process, or its launcher in `real`, and return it."""
    if not real:
        (process,) = start_ranks(*arguments, ranks=ranks, cwd=cwd, env=env)
        return process
    command = real_command(arguments, ranks)
    return subprocess.Popen(command, cwd=cwd, env=_environment(env), stderr=subprocess.PIPE, text=True)


def start_ranks(*arguments: object, ranks: int, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> list[Process]:
    """Start `mmcontrast ARGUMENTS` on ranks as torchrun and Slurm do: each with its RANK and the first one's address."""
    words, shared = [str(argument) for argument in arguments], _environment(env)
    if ranks > 1:
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    rank_of = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    return [Process("mmcontrast.cli:main", words, cwd, shared | own) for own in rank_of]


def wait_for_ranks(processes: Sequence[Process], timeout: float = 900) -> None:
    """Wait until all have ended; a minute after one has failed, end the others.

    Raises:
        TimeoutExpired: after `timeout` seconds; none of them is left.
    """
    deadline = time.monotonic() + timeout
    failed_since = None
    try:
        while any(process.poll() is None for process in processes):
            now = time.monotonic()
            if failed_since is None and any(process.returncode for process in processes):
                failed_since = now
            if now > deadline:
                raise subprocess.TimeoutExpired("ranks", timeout, processes[0].output()[1])
            if failed_since is not None and now > failed_since + 60:
                break
            time.sleep(0.005)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def call_on_ranks(function: str, ranks: int, *arguments: Any, timeout: float = 900) -> None:
    """Call "package.module:function" as (rank, *arguments) in a process for each rank; arguments go through JSON.

    Raises:
        AssertionError: with what they wrote, if one failed.
    """
    calls = [Process(function, [rank, *arguments], ROOT, _environment({"OMP_NUM_THREADS": "1"})) for rank in range(ranks)]
    wait_for_ranks(calls, timeout)
    assert not any(call.returncode for call in calls), "".join(call.output()[1] for call in calls)[-5000:]


def run_script(
    script: str, *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, where the libraries are imported already, and return its exit code and output."""
    process = Process("tests.fork_server:run_script", [script, *map(str, arguments)], cwd, _environment(env))
    output = process.communicate(timeout)
    return subprocess.CompletedProcess(script, process.wait(), *output)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, torchrun's ranks and workers of a loader among them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def free_port() -> int:
    """Return a port that nobody listens on, and that no other test of this session is given; from below those that the system
    hands out by itself, to which others may connect meanwhile."""
    file = session_folder() / "port"
    with locked(session_folder()):
        port = int(file.read_text()) if file.exists() else 20_000 + os.getpid() % 10_000
        while True:
            port = port + 1 if port < 32_000 else 20_000
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("127.0.0.1", port))
                file.write_text(str(port))
                return port


def real_command(arguments: Sequence[object], ranks: int = 1) -> list[str]:
    """Return the command line of a new interpreter, or of torchrun if there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "mmcontrast", *map(str, arguments)]


def session_folder() -> Path:
    """Return a folder that all of pytest's workers of this session share."""
    return Path(os.environ[FOLDER])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one of the processes that share a folder in at a time."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    path = os.pathsep.join([*filter(None, [(env or {}).get("PYTHONPATH")]), str(ROOT)])
    return os.environ | dict(env or {}) | {"PYTHONPATH": path}


def _server() -> Path:
    """Return the fork server's socket; the first test that asks, of all workers, starts it."""
    folder = session_folder()
    path = folder / "fork_server"
    with locked(folder):
        if not path.exists():
            env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
            env["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # of pyarrow
            command = [sys.executable, "-m", "tests.fork_server", str(path), os.environ[OWNER]]
            with (folder / "fork_server.log").open("w") as log:
                server = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            while not path.exists():
                assert server.poll() is None, (folder / "fork_server.log").read_text()
                time.sleep(0.01)
    return path


NO_EVALUATION = ("evaluation.splits={}", "evaluation.zero_shot={}")  # for runs of whose results nothing is asked


def train(config: object, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `mmcontrast train CONFIG ARGUMENTS`."""
    return mmcontrast("train", config, *arguments, **options)
