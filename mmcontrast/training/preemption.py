"""Handle a scheduler's warning: the current step is finished and saved, and the process ends with a code to requeue on."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmcontrast.errors import Preempted

WARNINGS = (signal.SIGTERM, signal.SIGUSR1)
SAME = 1.0  # seconds in which a second signal is the first one again: the scheduler and the launcher both send it


class Preemption:
    """A signal handler that remembers a first warning; a second one ends the process at once."""

    received: signal.Signals | None = None
    since = 0.0  # of time.monotonic()

    def is_asked(self) -> bool:
        """Return whether this process is asked to end."""
        return self.received is not None

    def handle(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        if self.received and time.monotonic() - self.since < SAME:
            return
        if self.received:
            from mmcontrast.training.distributed import end_now  # takes seconds, in which a warning may come

            end_now(Preempted.exit_code)
        self.received, self.since = signal.Signals(number), time.monotonic()
        message = f"{self.received.name}: finishing the step, then saving; a second one ends at once\n"
        os.write(2, message.encode())  # print would fail if the signal came within another print


@contextmanager
def preemptible() -> Iterator[Preemption]:
    """Handle the signals within it. Data workers ignore them: see `start_worker`."""
    preemption = Preemption()
    before = {number: signal.signal(number, preemption.handle) for number in WARNINGS}
    try:
        yield preemption
    finally:
        for number, handler in before.items() if not preemption.received else ():
            signal.signal(number, handler)
