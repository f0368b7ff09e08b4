"""Detect stalls, such as a collective that a rank never enters: report every rank's stack, and end the process."""

import faulthandler
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from mmcontrast.training.distributed import end_now

EXIT_CODE = 4
GRACE = 5.0  # seconds to wait for the reports of the other ranks
ANSWER = 10.0  # seconds in which the run's folder must take and give them
FOLDER = "stalled"  # in a run's folder; holds a file for every rank


class Watchdog:
    """A thread that ends the process if the main thread has not moved for a while. Every rank has one; all see a stall, as
    they wait for each other. Each writes its stack to the run's folder, and the first prints a line for each.

    Args:
        seconds: the time without a `move` after which it acts.
        folder: the run's.
        pause_seconds: the same while the training is `away`.
    """

    def __init__(self, seconds: float, folder: Path, rank: int, world_size: int, pause_seconds: float = float("inf")) -> None:
        self.step_limit = "step", seconds, "train.stall_seconds"
        self.pause_limit = "end of saving, evaluating or mining", pause_seconds, "train.pause_stall_seconds"
        self.limit, self.folder, self.rank, self.world_size = self.step_limit, folder / FOLDER, rank, world_size
        self.main, self.over = threading.get_ident(), threading.Event()
        self.step, self.doing, self.since = 0, "starting", time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.report_file(self.rank).unlink(missing_ok=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        faulthandler.cancel_dump_traceback_later()

    def move(self, step: int, doing: str) -> None:
        """Take note that the main thread has moved on, and to what."""
        self.step, self.doing, self.since = step, doing, time.monotonic()
        _, seconds, _ = self.limit
        # if the main thread keeps the interpreter's lock, no Python thread can act
        faulthandler.cancel_dump_traceback_later()
        if seconds < threading.TIMEOUT_MAX / 4:
            faulthandler.dump_traceback_later(2 * seconds + 10, exit=True)

    @contextmanager
    def away(self, doing: str) -> Iterator[None]:
        """Use the limit of pauses within it: for saving, evaluating and mining, during which the other ranks wait."""
        self.limit = self.pause_limit
        self.move(self.step, doing)
        yield
        self.limit = self.step_limit
        self.move(self.step, "training")

    def report_file(self, rank: int) -> Path:
        """Return the file with a rank's stack."""
        return self.folder / f"rank-{rank:05d}.txt"

    def _watch(self) -> None:
        """End the process when it stalls."""
        while not self.over.wait(min(1.0, self.step_limit[1] / 10, self.pause_limit[1] / 10)):
            waited = time.monotonic() - self.since
            if waited > self.limit[1]:
                try:
                    self._report(waited)
                finally:
                    end_now(EXIT_CODE)

    def _report(self, waited: float) -> None:
        """Write this rank's stack; on the first rank, print a line of every rank."""
        stack = traceback.extract_stack(sys._current_frames()[self.main])
        line = (
            f"step {self.step + 1}, rank {self.rank} on {socket.gethostname()}: {self.doing} for {waited:.0f} s, in"
            f" {stack[-1].name} at {stack[-1].filename}:{stack[-1].lineno}"
        )
        frames, lines = "".join(stack.format()), [line]
        has_answered = _in_time(lambda: self._exchange(line, frames, lines), ANSWER)
        if self.rank:
            time.sleep(GRACE)  # until the first rank has printed all: the launcher ends the others with it
            return
        silent = self.world_size - len(lines)
        event, seconds, option = self.limit
        reports = "\n".join(sorted(lines, key=lambda line: "waiting for a batch" not in line)[:32])
        where = f"stacks are in {self.folder}" if has_answered else f"{self.folder} does not answer: does its file system hang?"
        print(
            f"error: stalled: no {event} for {seconds:.0f} s ({option})\n{reports}\n"
            + ("" if has_answered else f"{frames}\n")
            + (f"{silent} ranks did not report\n" if silent else "")
            + f"{where}; the last checkpoint is untouched: continue with --resume",
            file=sys.stderr,
            flush=True,
        )

    def _exchange(self, line: str, frames: str, lines: list[str]) -> None:
        """Write this rank's report; on the first rank, put the lines of all ranks that report in time into `lines`."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.report_file(self.rank).write_text(f"{line}\n\n{frames}", encoding="utf-8", errors="replace")
        deadline = time.monotonic() + GRACE
        while self.rank == 0 and len(lines) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.2)
            files = [self.report_file(rank) for rank in range(self.world_size)]
            lines[:] = sorted(file.read_text().partition("\n")[0] for file in files if file.exists()) or [line]


def _in_time(work: Callable[[], None], seconds: float) -> bool:
    """Return whether some work, which goes on in a thread, has ended within so many seconds."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
