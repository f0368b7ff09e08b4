"""A scheduler's warning: the step at hand is finished and saved, and the process ends with a code to requeue on."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmcontrast.errors import Preempted

WARNINGS = (signal.SIGTERM, signal.SIGUSR1)
SAME = 1.0  # seconds in which another one is the same, that came by another way: of the scheduler, and of the launcher


class Preemption:
    """Whether this process has been warned. A second warning ends it at once."""

    asked: signal.Signals | None = None
    since = 0.0

    def is_asked(self) -> bool:
        return self.asked is not None

    def handle(self, number: int, _: FrameType | None) -> None:
        if self.asked and time.monotonic() - self.since < SAME:
            return
        if self.asked:
            from mmcontrast.training.distributed import end_now  # takes seconds, in which a warning may come

            end_now(Preempted.exit_code)
        self.asked, self.since = signal.Signals(number), time.monotonic()
        print(f"{self.asked.name}: finishing the step, then saving; a second one ends at once", file=sys.stderr, flush=True)


@contextmanager
def preemptible() -> Iterator[Preemption]:
    """Handles the signals within it. Data workers ignore them: see `start_worker`."""
    preemption = Preemption()
    before = {number: signal.signal(number, preemption.handle) for number in WARNINGS}
    try:
        yield preemption
    finally:
        for number, handler in before.items() if not preemption.asked else ():
            signal.signal(number, handler)
