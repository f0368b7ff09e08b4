"""Checkpoints: complete or absent, never half. A folder `step-00000500` with weights, state and the config.

Written under a temporary name, flushed to the disk, renamed: a folder of the right name is complete.
"""

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcontrast.errors import UserError

WEIGHTS, AVERAGED, STATE, CONFIG = "model.safetensors", "ema.safetensors", "state.pt", "config.yaml"
BEST = "best.json"  # the name of the best checkpoint, and by what value


def save(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: dict[str, Any],
    config: str,
    averaged: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes the checkpoint of a step; `state` is anything that `torch.load(weights_only=True)` admits. `averaged` weights are
    a file of their own, if there are some.

    Raises:
        UserError: if it cannot be written (a full disk); earlier checkpoints stay as they were.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in ((WEIGHTS, weights), (AVERAGED, averaged or {})):
            if tensors:
                save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, partial / name)
        torch.save(state, partial / STATE)
        (partial / CONFIG).write_text(config)
        for file in (*partial.iterdir(), partial):
            _flush(file)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        _flush(folder)
    except (OSError, RuntimeError) as error:  # torch.save and safetensors report a full disk as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder}: {error}; the earlier ones are"
            " untouched: make room, then continue with --resume"
        ) from error
    return target


class Saver:
    """Writes checkpoints beside the training: `save` copies what there is to write, and returns; a thread does the rest.

    Args:
        beside: False: `save` returns when all is written.
    """

    def __init__(self, folder: Path, keep: int, every: int, beside: bool) -> None:
        self.folder, self.keep, self.every, self.beside = folder, keep, every, beside
        self.writing: Future[Path] | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(
        self, step: int, weights: Mapping[str, Tensor], state: dict[str, Any], config: str, averaged: Mapping[str, Tensor]
    ) -> None:
        """
        Raises:
            UserError: if this one, or the one before, could not be written.
        """
        self.wait()
        what = (weights, state, config, averaged)
        self.writing = self.thread.submit(self._write, step, *(_copied(what) if self.beside else what))
        if not self.beside:
            self.wait()

    def _write(self, step: int, *what: Any) -> Path:
        written = save(self.folder, step, *what)
        prune(self.folder, self.keep, self.every)
        return written

    def wait(self) -> Path | None:
        """Until the last one is written; returns it.

        Raises:
            UserError: if it could not be written.
        """
        writing, self.writing = self.writing, None
        return writing.result() if writing else None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Whatever ends the run, what was begun is written."""
        self.thread.shutdown(wait=True)
        if kind is None:
            self.wait()

    def mark_best(self, value: float) -> None:
        """Takes note of the last one, if its value is higher than any before."""
        if written := self.wait():
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
            shutil.rmtree(checkpoint)


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
    """Of a checkpoint's folder, or of a .safetensors file; with `averaged` the moving average, where a checkpoint has one.

    Raises:
        UserError: if there is no such file.
    """
    file = path / (AVERAGED if averaged and (path / AVERAGED).exists() else WEIGHTS) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no weights at {file}")
    return load_file(file)


def load_state(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
