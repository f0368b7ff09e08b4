"""Traces of some steps by torch's profiler, to be looked at in Perfetto or chrome://tracing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"  # of a run


@contextmanager
def tracing(steps: tuple[int, int] | None, folder: Path, rank: int) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called at the beginning of every step, with its number from 1.

    Args:
        steps: the first and the last that are traced, or None.
        folder: the run's; every rank writes a file there.
    """
    running: profile | None = None

    def end() -> None:
        nonlocal running
        if running and steps:
            running.stop()
            target = folder / FOLDER
            target.mkdir(exist_ok=True)
            running.export_chrome_trace(str(target / f"steps-{steps[0]}-{steps[1]}-rank-{rank:05d}.json.gz"))
            running = None

    def begin(step: int) -> None:
        nonlocal running
        if steps and step == steps[0]:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            running = profile(activities=kinds, record_shapes=True, with_flops=True)
            running.start()
        if steps and step == steps[1] + 1:
            end()

    yield begin
    end()
