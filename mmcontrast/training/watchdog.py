"""Stalls are found, told of with every rank's stack, and ended: a collective that a rank never enters, an endless read."""

import faulthandler
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from mmcontrast.training.distributed import end_now

EXIT_CODE = 4
GRACE = 5.0  # seconds in which the other ranks' reports are awaited
FOLDER = "stalled"  # of a run: a file for every rank


class Watchdog:
    """A thread that ends the process if the main one has not moved for a while. Every rank has one; they all see the stall,
    as they wait for each other. Each writes its stack to the run's folder, and the first prints a line for each.

    Args:
        seconds: without a `move` until it acts.
        folder: the run's.
        pause_seconds: the same while the training is `away`.
    """

    def __init__(self, seconds: float, folder: Path, rank: int, world_size: int, pause_seconds: float = float("inf")) -> None:
        self.of_steps = "step", seconds, "train.stall_seconds"
        self.of_pauses = "end of saving, evaluating or mining", pause_seconds, "train.pause_stall_seconds"
        self.limits, self.folder, self.rank, self.world_size = self.of_steps, folder / FOLDER, rank, world_size
        self.main, self.over = threading.get_ident(), threading.Event()
        self.step, self.doing, self.since = 0, "starting", time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.report_of(self.rank).unlink(missing_ok=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        faulthandler.cancel_dump_traceback_later()

    def move(self, step: int, doing: str) -> None:
        """The main thread goes on, with this."""
        self.step, self.doing, self.since = step, doing, time.monotonic()
        _, seconds, _ = self.limits
        # should it hold the interpreter's lock for good, no thread of Python's can act
        faulthandler.cancel_dump_traceback_later()
        if seconds < threading.TIMEOUT_MAX / 4:
            faulthandler.dump_traceback_later(2 * seconds + 10, exit=True)

    @contextmanager
    def away(self, doing: str) -> Iterator[None]:
        """Time with a limit of its own: saving, evaluating and mining, for which the other ranks wait."""
        self.limits = self.of_pauses
        self.move(self.step, doing)
        yield
        self.limits = self.of_steps
        self.move(self.step, "training")

    def report_of(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.txt"

    def _watch(self) -> None:
        while not self.over.wait(min(1.0, self.of_steps[1] / 10, self.of_pauses[1] / 10)):
            waited = time.monotonic() - self.since
            if waited > self.limits[1]:
                try:
                    self._report(waited)
                finally:
                    end_now(EXIT_CODE)

    def _report(self, waited: float) -> None:
        stack = traceback.extract_stack(sys._current_frames()[self.main])
        line = (
            f"step {self.step + 1}, rank {self.rank} on {socket.gethostname()}: {self.doing} for {waited:.0f} s, in"
            f" {stack[-1].name} at {stack[-1].filename}:{stack[-1].lineno}"
        )
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.report_of(self.rank).write_text(f"{line}\n\n{''.join(stack.format())}")
        lines, deadline = [line], time.monotonic() + GRACE
        if self.rank:
            time.sleep(GRACE)  # until the first rank has told of all: what launched them ends the rest with the first
            return
        while self.world_size > 1 and len(lines) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.2)
            found = [self.report_of(rank) for rank in range(self.world_size)]
            lines = sorted(file.read_text().partition("\n")[0] for file in found if file.exists())
        silent = self.world_size - len(lines)
        what, seconds, option = self.limits
        told = "\n".join(sorted(lines, key=lambda one: "waiting for a batch" not in one)[:32])
        print(
            f"error: stalled: no {what} for {seconds:.0f} s ({option})\n{told}\n"
            + (f"{silent} ranks said nothing\n" if silent else "")
            + f"stacks are in {self.folder}; the last checkpoint is untouched: continue with --resume",
            file=sys.stderr,
            flush=True,
        )
