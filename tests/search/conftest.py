"""A small trained run, an index of a few samples, and its server, once a session."""

import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipelines.glyphs.glyphs import Glyphs
from mmcontrast.cli import app
from mmcontrast.data import write_shard
from tests.command import Process, free_port, mmcontrast, start
from tests.conftest import write_config

ROOT = Path(__file__).parents[2]
HOSTILE = "<img src=x onerror='window.stolen=1'><b>bold</b>"
NO_SOUND, NO_PICTURE, NO_TEXT = 1, 2, 3  # rows


@dataclass
class Server:
    """`mmcontrast serve` in a process of its own, on a free port of the loopback."""

    port: int
    process: Process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def peak_memory(self) -> int:
        """Bytes, since it began."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024

    def stop(self, by: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """(exit code, what it said)."""
        self.process.send_signal(by)
        said = self.process.communicate(timeout=300)[1]
        return self.process.returncode, said


def command(*arguments):
    """In this process: it has loaded what takes a command its seconds."""
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def serve(index: Path) -> Server:
    port = free_port()
    process = start("serve", index, "--port", port, "--device", "cpu")
    server, deadline = Server(port, process), time.monotonic() + 300
    while True:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the server did not start"
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as asking:  # it listens before the model is read
                asking.sendall(f"GET /api/about HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
                if asking.recv(12) == b"HTTP/1.1 200":
                    return server
        except OSError:
            time.sleep(0.1)


@pytest.fixture(scope="session")
def small_run(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    config = write_config(corpus, folder)
    done = mmcontrast("train", config, "train.steps=2", "evaluation={}")
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "small"


@pytest.fixture(scope="session")
def small_index(small_run, tmp_path_factory) -> Path:
    """30 samples, one with a caption that is HTML, one each without a sound, a picture, a text."""
    folder, glyphs = tmp_path_factory.mktemp("samples"), Glyphs(side=24)
    samples = [glyphs.make_sample("val", item) for item in glyphs.splits()["val"][:30]]
    samples[0]["txt"] = HOSTILE
    for row, member in ((NO_SOUND, "flac"), (NO_PICTURE, "png"), (NO_TEXT, "txt")):
        del samples[row][member]
    write_shard(folder / "samples.tar", samples)
    for command in (("embed", small_run, folder / "samples.tar", folder / "table"), ("index", folder / "table")):
        done = mmcontrast(*command)
        assert done.returncode == 0, done.stderr
    return folder / "table" / "index"


@pytest.fixture(scope="session")
def server(small_index) -> Iterator[Server]:
    running = serve(small_index)
    yield running
    running.stop()
