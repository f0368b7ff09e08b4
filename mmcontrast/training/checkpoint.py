"""Checkpoints: complete or absent, never half. A folder `step-00000500` with weights, state, the config, and checksums.

Written under a temporary name, flushed to the disk, renamed: a folder of the right name is complete. The optimizer's state of
weights in shards is a folder in it, written by all ranks through torch's distributed checkpoints.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmcontrast.errors import EveryRankError, PeerLost, UserError
from mmcontrast.training.distributed import LOST, OTHER_HAS_ENDED
from mmcontrast.training.parallel import in_shards
from mmcontrast.training.tensors import drained, in_order, whole_on_first, write_tensors

WEIGHTS, AVERAGED, STATE, CONFIG = "model.safetensors", "ema.safetensors", "state.pt", "config.yaml"
QUEUE = "queue.safetensors"
ADAPTER = "adapter.safetensors"  # in the place of all weights: those that are not of `model.start`
SHARDS, MANIFEST, PARTIAL = "optimizer", "manifest.json", ".partial"
BEST = "best.json"  # the name of the best checkpoint, and by what value


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes:
        weights, averaged, queue: whole, or in shards; the average and the queue may be empty.
        state: anything that `torch.load(weights_only=True)` admits.
        config: as YAML.
        shards: tensors of which every rank holds a part.
        start: the digest of the start whose tensors are left out of the weights; "": nothing is.
    """

    weights: Mapping[str, Tensor]
    averaged: Mapping[str, Tensor]
    state: dict[str, Any]
    config: str
    shards: Mapping[str, Tensor] = field(default_factory=dict)
    start: str = ""
    queue: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors of each file of tensors."""
        files = {ADAPTER if self.start else WEIGHTS: self.weights, AVERAGED: self.averaged, QUEUE: self.queue}
        return {name: tensors for name, tensors in files.items() if tensors}

    def full_tensors(self) -> Iterator[Tensor | None]:
        """Yield all tensors of the files, `in_order`, whole on the first rank: one is sent when it is asked for, by all."""
        for tensors in self.files.values():
            yield from (whole_on_first(tensors[name]) for name in in_order(tensors))

    def on_host(self, keep: bool) -> "Contents":
        """Return the same in the memory of the host, with tensors that nothing else changes; without shards.

        Args:
            keep: False: take part in it alone, and keep nothing.
        """
        whole = self.full_tensors()
        if not keep:
            drained(whole)
            return replace(self, weights={}, averaged={}, queue={}, shards={})
        copies: dict[str, dict[str, Tensor]] = {}
        for file, tensors in self.files.items():
            copies[file] = {}
            for name in in_order(tensors):
                tensor = next(whole)
                assert tensor is not None
                copies[file][name] = tensor.detach().to("cpu", copy=not in_shards(tensors[name]))
        weights, averaged, queue = (copies.get(name, {}) for name in (ADAPTER if self.start else WEIGHTS, AVERAGED, QUEUE))
        return replace(self, weights=weights, averaged=averaged, queue=queue, state=_copied(self.state), shards={})


def save(folder: Path, step: int, contents: Contents, shards: "Future[Any] | None" = None) -> Path:
    """Writes the checkpoint of a step, around the shards that may be on their way into `partial_of` it.

    Raises:
        UserError: if it cannot be written (a full disk); earlier checkpoints stay as they were.
    """
    target, partial, whole = folder / f"step-{step:08d}", partial_of(folder, step), contents.full_tensors()
    try:
        if not shards:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        about = {"start": contents.start} if contents.start else None
        for name, tensors in contents.files.items():
            write_tensors(partial / name, tensors, whole, about)
        torch.save(contents.state, partial / STATE)
        (partial / CONFIG).write_text(contents.config)
        if shards:
            shards.result()
        checksums = {name: _checksum(file) for name, file in _files(partial).items()}
        (partial / MANIFEST).write_text(json.dumps({"files": checksums}, indent=1))
        for file in (*partial.rglob("*"), partial):
            _flush(file)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        _flush(folder)
    except _write_errors() as error:
        with suppress(RuntimeError):
            drained(whole)  # the other ranks send it
        if shards:
            shards.exception()  # they are written no more
        shutil.rmtree(partial, ignore_errors=True)
        raise _not_written(folder, step, error) from error
    return target


def partial_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is until it is complete."""
    return folder / f".step-{step:08d}{PARTIAL}"


def _write_errors() -> tuple[type[BaseException], ...]:
    """Return what writing may raise: torch.save and safetensors make a RuntimeError of a full disk, and torch's distributed
    checkpoints have an error of their own, if they are in use (their import takes half as long as torch's)."""
    shards = sys.modules.get("torch.distributed.checkpoint.api")
    return (OSError, RuntimeError, *([shards.CheckpointException] if shards else []))


def _not_written(folder: Path, step: int, error: BaseException) -> EveryRankError:
    if isinstance(error, EveryRankError):
        return error
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST):
        return PeerLost(OTHER_HAS_ENDED)
    failures = getattr(error, "failures", None)  # by rank, of a CheckpointException
    said = "; ".join(f"rank {r}: {why[0]}" for r, why in failures.items()) if failures else " ".join(str(error).split())
    return EveryRankError(
        f"the checkpoint of step {step} could not be written to {folder}: {said[:500]}; the earlier ones are untouched: make"
        " room, then continue with --resume"
    )


def _files(checkpoint: Path) -> dict[str, Path]:
    """Return every file in a checkpoint but the manifest, by its path there."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(file.relative_to(checkpoint)): file for file in files}


def _checksum(file: Path) -> dict[str, Any]:
    """Return the bytes and the SHA-256 of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def check(checkpoint: Path, group: dist.ProcessGroup | None = None) -> None:
    """
    Args:
        group: its ranks share the files, each of which one rank reads; all must ask.

    Raises:
        UserError: if a file is not as it was written; on all ranks of a group.
    """
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    problem = _problem(checkpoint, rank, ranks)
    if group:
        problems: list[str | None] = [None] * ranks
        dist.all_gather_object(problems, problem, group)
        problem = next(filter(None, problems), None)
    if problem:
        remedy = "remove this checkpoint, and the one before it is the last"
        raise (EveryRankError if group else UserError)(f"{checkpoint}: {problem}; {remedy}")


def _problem(checkpoint: Path, rank: int, ranks: int) -> str | None:
    """Return what is wrong with a checkpoint, of whose files every `ranks`-th is read; None if nothing is."""
    try:
        written, there = json.loads((checkpoint / MANIFEST).read_text())["files"], _files(checkpoint)
        largest_first = sorted(written, key=lambda name: (-written[name]["bytes"], name))
        for name in sorted(written.keys() | there.keys()):
            if name not in there or name not in written:
                return f"{name} is {'missing' if name in written else 'not of it'}"
            if there[name].stat().st_size != written[name]["bytes"]:
                return f"{name} is damaged (another size)"
        damaged = [name for name in largest_first[rank::ranks] if _checksum(there[name]) != written[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return f"{min(damaged)} is damaged (another checksum)" if damaged else None


class Saver:
    """Writes checkpoints beside the training: `save` copies what there is to write, and returns; a thread does the rest.

    Args:
        beside: False: `save` returns when all is written.
        rank: the first writes the checkpoint; the others only their shards, if there are some.
        group: over which the ranks agree on their shards.
    """

    def __init__(
        self, folder: Path, keep: int, every: int, beside: bool, rank: int = 0, group: dist.ProcessGroup | None = None
    ) -> None:
        self.folder, self.keep, self.every, self.beside, self.rank, self.group = folder, keep, every, beside, rank, group
        self.writing: Future[Any] | None = None
        self.step = 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, step: int, contents: Contents) -> None:
        """
        Raises:
            UserError: if this one, or the one before, could not be written.
        """
        self.wait()
        self.step = step
        shards = self._write_shards(step, contents.shards) if contents.shards else None
        if self.beside:
            copied = contents.on_host(keep=not self.rank)
            self.writing = shards if self.rank else self.thread.submit(self._write, step, copied, shards)
        elif self.rank:
            drained(contents.full_tensors())
        else:
            self._write(step, contents, shards)

    def _write_shards(self, step: int, shards: Mapping[str, Tensor]) -> Future[Any]:
        """Write this rank's; `beside` the training, from a copy."""
        import torch.distributed.checkpoint as dcp

        partial = partial_of(self.folder, step)
        if not self.rank:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier(self.group)
        where: dict[str, Any] = {"checkpoint_id": partial / SHARDS, "process_group": self.group}
        if self.beside:
            writing = dcp.async_save(dict(shards), **where)
            assert isinstance(writing, Future)
            return writing
        written: Future[Any] = Future()
        try:
            written.set_result(dcp.save(dict(shards), **where))
        except _write_errors() as error:
            raise _not_written(self.folder, step, error) from error
        return written

    def _write(self, step: int, contents: Contents, shards: Future[Any] | None) -> Path:
        written = save(self.folder, step, contents, shards)
        prune(self.folder, self.keep, self.every)
        return written

    def wait(self) -> Path | None:
        """Until the last one is written; returns it.

        Raises:
            UserError: if it could not be written.
        """
        writing, self.writing = self.writing, None
        try:
            written = writing.result() if writing else None
        except _write_errors() as error:
            raise _not_written(self.folder, self.step, error) from error
        return written if isinstance(written, Path) else None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Whatever ends the run, what was begun is written."""
        self.thread.shutdown(wait=True)
        if kind is None:
            self.wait()

    def mark_best(self, step: int, value: float) -> None:
        """Takes note of a step's checkpoint, if its value is higher than any before."""
        self.wait()
        if (written := self.folder / f"step-{step:08d}").exists() and not math.isnan(value):
            mark_best(self.folder, written, value)
            prune(self.folder, self.keep, self.every)


def _copied(tree: Any) -> Any:
    """The same with tensors of its own, in the memory of the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    return type(tree)(map(_copied, tree)) if isinstance(tree, list | tuple) else tree


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def prune(folder: Path, keep: int, every: int = 0) -> None:
    """Removes all but the last `keep`, the best, and those of every `every`-th step."""
    best = best_of(folder)
    for checkpoint in complete(folder)[:-keep]:
        if checkpoint != best and not (every and int(checkpoint.name.removeprefix("step-")) % every == 0):
            aside = checkpoint.with_name(f".{checkpoint.name}{PARTIAL}")  # at once: what has its name is complete
            os.rename(checkpoint, aside)
            shutil.rmtree(aside)


def clean(folder: Path) -> None:
    """Removes what killed processes have left."""
    for left in folder.glob(f".step-*{PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


def mark_best(folder: Path, checkpoint: Path, value: float) -> None:
    """Takes note of a checkpoint if its value is higher than any before."""
    file = folder / BEST
    if file.exists() and json.loads(file.read_text())["value"] >= value:
        return
    partial = folder / f".{BEST}.partial"
    partial.write_text(json.dumps({"checkpoint": checkpoint.name, "value": value}))
    os.replace(partial, file)


def best_of(folder: Path) -> Path | None:
    file = folder / BEST
    return folder / json.loads(file.read_text())["checkpoint"] if file.exists() else None


def find(folder: Path, which: str) -> Path:
    """The checkpoint named "last", "best" or a step's number.

    Raises:
        UserError: if there is none.
    """
    checkpoints = complete(folder)
    if which == "last" and checkpoints:
        return checkpoints[-1]
    if which == "best" and (best := best_of(folder)):
        return best
    if which.isdigit() and (folder / f"step-{int(which):08d}").exists():
        return folder / f"step-{int(which):08d}"
    have = ", ".join(str(int(c.name.removeprefix("step-"))) for c in checkpoints) or "none"
    raise UserError(f"no checkpoint {which!r} in {folder}; there are steps: {have}")


def load_weights(path: Path, averaged: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint's folder, or a .safetensors file; with `averaged` the moving average, where a checkpoint has one.

    Raises:
        UserError: if there is no such file, or it is damaged.
    """
    file = weights_file(path, averaged)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no .safetensors file, or damaged: {error}") from error


def weights_file(path: Path, averaged: bool = False) -> Path:
    """
    Raises:
        UserError: if there is none.
    """
    names = [AVERAGED, WEIGHTS, ADAPTER] if averaged else [WEIGHTS, ADAPTER]
    file = next((path / name for name in names if (path / name).exists()), path / WEIGHTS) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no weights at {file}")
    return file


def start_of(path: Path) -> str:
    """Return the digest of the start that a checkpoint's weights were trained beside; "" if it holds all weights."""
    with safe_open(weights_file(path), "pt") as file:
        return (file.metadata() or {}).get("start", "")


def load_state(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
