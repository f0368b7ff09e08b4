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
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcontrast.errors import EveryRankError, UserError

WEIGHTS, AVERAGED, STATE, CONFIG = "model.safetensors", "ema.safetensors", "state.pt", "config.yaml"
ADAPTER = "adapter.safetensors"  # in the place of all weights: those that are not of `model.start`
SHARDS, MANIFEST, PARTIAL = "optimizer", "manifest.json", ".partial"
BEST = "best.json"  # the name of the best checkpoint, and by what value


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes:
        weights, averaged: whole; the average may be empty.
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


def save(folder: Path, step: int, contents: Contents, shards: "Future[Any] | None" = None) -> Path:
    """Writes the checkpoint of a step, around the shards that may be on their way into `partial_of` it.

    Raises:
        UserError: if it cannot be written (a full disk); earlier checkpoints stay as they were.
    """
    target, partial = folder / f"step-{step:08d}", partial_of(folder, step)
    try:
        if not shards:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        about = {"start": contents.start} if contents.start else None
        for name, tensors in ((ADAPTER if about else WEIGHTS, contents.weights), (AVERAGED, contents.averaged)):
            if tensors:
                save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, partial / name, about)
        torch.save(contents.state, partial / STATE)
        (partial / CONFIG).write_text(contents.config)
        if shards:
            shards.result()
        (partial / MANIFEST).write_text(json.dumps({"files": _checksums(partial)}, indent=1))
        for file in (*partial.rglob("*"), partial):
            _flush(file)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        _flush(folder)
    except _write_errors() as error:
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
    failures = getattr(error, "failures", None)  # by rank, of a CheckpointException
    said = "; ".join(f"rank {r}: {why[0]}" for r, why in failures.items()) if failures else " ".join(str(error).split())
    return EveryRankError(
        f"the checkpoint of step {step} could not be written to {folder}: {said[:500]}; the earlier ones are untouched: make"
        " room, then continue with --resume"
    )


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file in a checkpoint, by its path there."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        found[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def check(checkpoint: Path) -> None:
    """
    Raises:
        UserError: if a file is not as it was written.
    """
    remedy = "remove this checkpoint, and the one before it is the last"
    try:
        written, now = json.loads((checkpoint / MANIFEST).read_text())["files"], _checksums(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint}: its {MANIFEST} cannot be read ({error}); {remedy}") from error
    for name in sorted(written.keys() | now.keys()):
        if written.get(name) != now.get(name):
            what = "missing" if name not in now else "not of it" if name not in written else "damaged (another checksum)"
            raise UserError(f"{checkpoint}: {name} is {what}; {remedy}")


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
        whole = replace(contents, shards={})
        if self.rank:
            self.writing = shards
        else:
            self.writing = self.thread.submit(self._write, step, _copied(whole) if self.beside else whole, shards)
        if not self.beside:
            self.wait()

    def _write_shards(self, step: int, shards: Mapping[str, Tensor]) -> Future[Any]:
        """Copies this rank's, and begins to write them."""
        import torch.distributed.checkpoint as dcp

        partial = partial_of(self.folder, step)
        if not self.rank:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier(self.group)
        writing = dcp.async_save(dict(shards), checkpoint_id=partial / SHARDS, process_group=self.group)
        assert isinstance(writing, Future)
        return writing

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
    if isinstance(tree, Contents):
        return replace(tree, **{name: _copied(getattr(tree, name)) for name in ("weights", "averaged", "state")})
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
