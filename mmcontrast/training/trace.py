"""Traces of some steps by torch's profiler, to be looked at in Perfetto or chrome://tracing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"  # of a run


@contextmanager
def tracing(steps: tuple[int, int] | None, folder: Path, rank: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to be called at the beginning of every step, with its number from 1.

    Args:
        steps: the first and the last traced step, or None.
        folder: the run's; every rank writes a file into its `profile`.
    """
    running: profile | None = None
    first = last = 0

    def end() -> None:
        nonlocal running
        if running:
            running.stop()
            target = folder / FOLDER
            target.mkdir(exist_ok=True)
            running.export_chrome_trace(str(target / f"steps-{first}-{last}-rank-{rank:05d}.json.gz"))
            running = None

    def begin(step: int) -> None:
        nonlocal running, first, last
        if steps and step > steps[1]:
            end()
        elif steps and step >= steps[0]:
            last = step
        if steps and steps[0] <= step <= steps[1] and not running:
            first = step
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            running = profile(activities=kinds, record_shapes=True, with_flops=True)
            running.start()

    try:
        yield begin
    finally:
        end()
