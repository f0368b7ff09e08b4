"""The log of a run: metrics.jsonl with the rates of a step, memory, and the console's progress bar."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmcontrast.errors import UserError
from mmcontrast.strict_json import dumps


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes, of the device if it is a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make_progress(enabled: bool = True) -> Progress:
    """Return the console's progress bar, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not enabled,
    )


class StepLines:
    """A file of JSON objects, each with its `step`, cut back to the step that a run resumes from."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        with path.open("rb+" if path.exists() else "wb+") as file:
            end = 0
            for line in file if resumed_at else ():
                if not line.endswith(b"}\n") or json.loads(line)["step"] > resumed_at:
                    break  # half a line, or a step that will be run again
                end += len(line)
            file.truncate(end)
        self.file = path.open("a", buffering=1)

    def add(self, values: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            UserError: if it cannot be written.
        """
        try:
            self.file.write(dumps(values) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.file.name} cannot be written to ({error.strerror}): make room, and continue with --resume"
            ) from error


class StepLog(StepLines):
    """`metrics.jsonl`, one object per logged step, with the rates since the one before.

    Args:
        devices: the number of devices that share the samples of a step.
        peak_samples: samples a second that a device could train on if it did nothing but the model's operations at its data
            sheet's rate; None where that is not known. The share of it that is reached is the MFU (arXiv:2204.02311).
    """

    def __init__(self, path: Path, resumed_at: int, devices: int = 1, peak_samples: float | None = None) -> None:
        super().__init__(path, resumed_at)
        self.devices, self.peak_samples = devices, peak_samples
        self.started = time.perf_counter()
        self.data_seconds, self.samples = 0.0, 0

    @contextmanager
    def waiting(self, samples: int) -> Iterator[None]:
        """Count the time within it as waiting for a batch, and the samples of the batch."""
        began = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - began
        self.samples += samples

    def write(self, values: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Write a line of the values and the rates since the last line, and return it."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        rate = self.samples / elapsed
        values = values | {
            "samples_per_second": rate,
            "samples_per_second_per_device": rate / self.devices,
            "data_seconds": self.data_seconds,
            "data_share": self.data_seconds / elapsed,
            "peak_memory_bytes": peak_memory(device),
        }
        if self.peak_samples:
            values["mfu"] = rate / self.devices / self.peak_samples
        self.add(values)
        self.started, self.data_seconds, self.samples = time.perf_counter(), 0.0, 0
        return values

    def note(self, line: dict[str, Any]) -> str:
        """Return the part of a line that the console shows."""
        per_device = f" ({line['samples_per_second_per_device']:.0f} a device)" if self.devices > 1 else ""
        parts = [f"loss {line['loss']:.3f}", f"logit_scale {line['logit_scale']:.1f}", f"grad_norm {line['grad_norm']:.2f}"]
        parts += [f"{line['samples_per_second']:.0f} samples/s{per_device}"]
        parts += [f"mfu {line['mfu']:.0%}"] if "mfu" in line else []
        parts += [f"data {line['data_share']:.0%}", f"{line['peak_memory_bytes'] / 2**30:.1f} GiB"]
        return "  ".join(parts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time within it, saving or evaluating, out of the rates."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began
