"""Runs parts, each in a forked process, and ends those that take too long; a part measures through its `Context`."""

import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mmcontrast  # noqa: F401  # the parts inherit it
from gpu_parts import machine
from gpu_parts.results import COMPLETE, ENDED, PART, Results
from gpu_parts.summary import write_summary


class Missing(Exception):
    """A peer is not installed; the message is the reason."""


class Skip(Exception):
    """A measurement would not fit; the message is the reason."""


class OutOfTime(Exception):
    """The time box of the part ends before the measurement would."""


class Broken(Exception):
    """CUDA cannot be used any more in this process."""


@dataclass
class Context:
    """The context of a part.

    Attributes:
        part: its name.
        device: "cuda" or "cpu", where all sizes are the smallest.
        out: the folder of results.
        scratch: a folder that lives as long as the call.
        deadline: of its time box, by time.monotonic().
    """

    part: str
    device: str
    out: Path
    scratch: Path
    results: Results
    deadline: float

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def values(self, key: str, part: str | None = None) -> dict[str, Any] | None:
        """Return the values that were measured under a key, None if there are none."""
        record = self.results.records.get((part or self.part, key))
        return record["values"] if record and record["state"] == "done" else None

    def measure(self, key: str, function: Callable[[], dict[str, Any]], limit: float = 60, expected: float = 1) -> None:
        """Measure a key that has no values yet: for at most `limit` seconds, and only if `expected` seconds are left.

        Raises:
            OutOfTime: if the part has to end.
            Broken: if CUDA is in a state that only a new process mends.
        """
        if self.results.state(self.part, key) in ENDED:
            return
        if self.left < expected:
            raise OutOfTime
        cuts = self.results.records.get((self.part, key), {}).get("cuts", 0)
        self.results.add(self.part, key, "started", limit=limit, since=time.time(), cuts=cuts)
        start, state, reason, values = time.monotonic(), "done", None, None
        try:
            values = function()
        except (Missing, ImportError) as error:
            state, reason = "missing", one_line(error)
        except Skip as error:
            state, reason = "skipped", str(error)
        except torch.OutOfMemoryError as error:
            state, reason = "out of memory", one_line(error)
        except Exception as error:
            traceback.print_exc()
            state, reason = "failed", f"{type(error).__name__}: {one_line(error)}"
        entries = {"seconds": round(time.monotonic() - start, 2)}
        entries |= {} if values is None else {"values": values}
        self.results.add(self.part, key, state, **entries, **({} if reason is None else {"reason": reason}))
        print(f"{self.part}: {key}: {state} {reason or values}", flush=True)
        if state not in ("done", "skipped"):
            gc.collect()
            if self.device == "cuda" and torch.cuda.is_initialized():
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError as error:
                    raise Broken from error


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


class Runner:
    """Starts the parts in turn and watches them.

    Attributes:
        device: set by `find_machine`.
    """

    def __init__(self, out: Path, results: Results, scratch: Path) -> None:
        self.out, self.results, self.scratch, self.device = out, results, scratch, "cpu"

    def find_machine(self) -> str | None:
        """Describe this machine in a process of its own; return what is wrong, if OUT or CUDA is."""
        assert not torch.cuda.is_initialized(), "processes that are forked from here could not use the GPU"
        before = (self.results.records.get(("machine", "machine")) or {}).get("values")
        file = self.scratch / "machine.json"
        process = self._start(machine.describe, file)
        process.join(120)
        if process.is_alive():
            self._kill(process)
        description = machine.read(file)
        if description is None:
            return f"the GPU did not answer (exit code {process.exitcode}): see {self.out / 'log.txt'}"
        if before and machine.identity(before) != machine.identity(description):
            was, now = machine.identity(before), machine.identity(description)
            return f"{self.out} holds results of another machine ({was}; this is {now}): take another folder"
        if before is None:
            self.results.add("machine", "machine", "done", values=description)
        self.device = description["device"]
        if self.device == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # before a part imports Triton
        else:
            os.environ.pop("TRITON_INTERPRET", None)
        return None

    def run(self, part: str, end: float) -> None:
        """Run a part until it is complete or `end`; after a crash again, if the last process measured anything."""
        while not self.results.is_complete(part) and time.monotonic() < end - 1:
            ended = len(self.results.of(part))
            code = self._watch(self._start(run_part, part, self.device, self.out, self.scratch, end), part, end)
            self.results.reload()
            had_begun = bool(self.results.pending(part))
            if had_begun:
                signals = {-number: number.name for number in signal.Signals}
                self.results.end_pending(part, "died", signals.get(code, f"exit code {code}"))
            write_summary(self.out, self.results)
            if code == 0 or (not had_begun and len(self.results.of(part)) == ended):
                break
        if time.monotonic() < end - 1 and not self.results.is_complete(part):
            print(f"{part} has more to do; see log.txt if it should not", file=sys.stderr)

    def _watch(self, process: Any, part: str, end: float) -> int:
        """Wait for a process and return its exit code; kill it when a measurement exceeds its limit, or at the part's end."""
        try:
            while process.is_alive():
                process.join(0.2)
                self.results.reload()
                now = time.time()
                late = [r for r in self.results.pending(part) if now > r["since"] + r["limit"]]
                if process.is_alive() and (late or time.monotonic() > end):
                    self._kill(process)
                    reason = f"longer than {late[0]['limit']:.0f} s" if late else "the part's time was over"
                    self.results.end_pending(part, "timed out" if late else "cut", reason)
                    return 1 if late else 0
            return process.exitcode
        finally:
            if process.is_alive():
                self._kill(process)

    def _start(self, function: Callable[..., None], *arguments: Any) -> Any:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=in_its_own_group, args=(self.out / "log.txt", function, *arguments))
        process.start()
        return process

    @staticmethod
    def _kill(process: Any) -> None:
        """Kill a process and those that it started."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()


def in_its_own_group(log: Path, function: Callable[..., None], *arguments: Any) -> None:
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    faulthandler.enable(sys.stderr)
    function(*arguments)


def run_part(part: str, device: str, out: Path, scratch: Path, end: float) -> None:
    if device == "cpu":
        torch.set_num_threads(1)  # a pool of threads does not survive the fork
    context = Context(part, device, out, scratch, Results(out / "results.jsonl"), end)
    try:
        importlib.import_module(f"gpu_parts.{part}").run(context)
    except OutOfTime:
        return
    except Broken:
        sys.exit(1)  # a new process goes on with the next measurement
    except (Missing, ImportError) as error:
        context.results.add(part, PART, "missing", reason=one_line(error))
        context.results.add(part, COMPLETE, "complete")
        return
    except Exception as error:
        traceback.print_exc()
        context.results.add(part, PART, "failed", reason=f"{type(error).__name__}: {one_line(error)}")
        return
    if context.results.state(part, PART):
        context.results.add(part, PART, "again")
    if not any(record["state"] == "cut" for record in context.results.of(part)):
        context.results.add(part, COMPLETE, "complete")
