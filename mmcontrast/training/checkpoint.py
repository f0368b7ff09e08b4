"""Write, check and find checkpoints: folders `step-00000500` with weights, state, the config, and checksums.

They are written under a temporary name, flushed to the disk, and renamed: a folder of the right name is complete. The
optimizer's state of weights in shards is a folder in it, written by all ranks through torch's distributed checkpoints.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmcontrast.errors import EveryRankError, PeerLost, UserError
from mmcontrast.training.distributed import LOST, OTHER_HAS_ENDED
from mmcontrast.training.parallel import in_shards
from mmcontrast.training.tensors import drain, in_order, whole_on_first, write_tensors
from mmcontrast.whole_files import write_json

WEIGHTS, AVERAGED, STATE, CONFIG = "model.safetensors", "ema.safetensors", "state.pt", "config.yaml"
QUEUE = "queue.safetensors"
ADAPTER = "adapter.safetensors"  # instead of all weights: those that are not in `model.start`
SHARDS, MANIFEST, PARTIAL = "optimizer", "manifest.json", ".partial"
BEST = "best.json"  # the name and the value of the best checkpoint


@dataclass
class Contents:
    """The contents of a checkpoint.

    Attributes:
        weights, averaged, queue: whole, or in shards; the average and the queue may be empty.
        state: anything that `torch.load(weights_only=True)` admits.
        config: as YAML.
        shards: tensors of which every rank holds a part.
        start: the digest of the start whose tensors are left out of the weights; "": none are.
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
        """Yield all tensors of the files, `in_order`, whole on the first rank: each is sent when all ranks ask for it."""
        for tensors in self.files.values():
            yield from (whole_on_first(tensors[name]) for name in in_order(tensors))

    def on_host(self, keep: bool) -> "Contents":
        """Return a copy in the memory of the host, without shards.

        Args:
            keep: False: only take part in sending, and keep nothing.
        """
        whole = self.full_tensors()
        if not keep:
            drain(whole)
            return replace(self, weights={}, averaged={}, queue={}, shards={})
        copies: dict[str, dict[str, Tensor]] = {}
        for file, tensors in self.files.items():
            copies[file] = {}
            for name in in_order(tensors):
                tensor = next(whole)
                assert tensor is not None
                copies[file][name] = tensor.detach().to("cpu", copy=not in_shards(tensors[name]))
        return replace(
            self,
            weights=copies.get(ADAPTER if self.start else WEIGHTS, {}),
            averaged=copies.get(AVERAGED, {}),
            queue=copies.get(QUEUE, {}),
            state=_copy(self.state),
            shards={},
        )


def save(folder: Path, step: int, contents: Contents, shards: "Future[Any] | None" = None) -> Path:
    """Write the checkpoint of a step; shards may still be on their way into its `partial_of`.

    Raises:
        UserError: if it cannot be written (a full disk); earlier checkpoints stay as they were.
    """
    target, partial, whole = folder / f"step-{step:08d}", partial_of(folder, step), contents.full_tensors()
    try:
        if not shards:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        metadata = {"start": contents.start} if contents.start else None
        for name, tensors in contents.files.items():
            write_tensors(partial / name, tensors, whole, metadata)
        torch.save(contents.state, partial / STATE)
        (partial / CONFIG).write_text(contents.config, encoding="utf-8")
        if shards:
            shards.result()
        checksums = {name: _checksum(file) for name, file in _files(partial).items()}
        (partial / MANIFEST).write_text(json.dumps({"files": checksums}, indent=1))
        for file in (*partial.rglob("*"), partial):
            _flush(file)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        _flush(folder)
    except write_errors() as error:
        with suppress(RuntimeError):
            drain(whole)  # the other ranks send it
        if shards:
            shards.exception()  # waits until nothing is written any more
        shutil.rmtree(partial, ignore_errors=True)
        raise write_failed(folder, step, error) from error
    return target


def partial_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written until it is complete."""
    return folder / f".step-{step:08d}{PARTIAL}"


def write_errors() -> tuple[type[BaseException], ...]:
    """Return what writing may raise: torch.save and safetensors raise RuntimeError for a full disk, and torch's distributed
    checkpoints an error of their own, if they are in use (their import takes half as long as torch's)."""
    shards = sys.modules.get("torch.distributed.checkpoint.api")
    return (OSError, RuntimeError, *([shards.CheckpointException] if shards else []))


def write_failed(folder: Path, step: int, error: BaseException) -> EveryRankError:
    """Return the error that tells every rank why a checkpoint was not written."""
    if isinstance(error, EveryRankError):
        return error
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST):
        return PeerLost(OTHER_HAS_ENDED)
    failures = getattr(error, "failures", None)  # by rank, of a CheckpointException
    reason = "; ".join(f"rank {r}: {why[0]}" for r, why in failures.items()) if failures else " ".join(str(error).split())
    return EveryRankError(
        f"the checkpoint of step {step} could not be written to {folder}: {reason[:500]}; the earlier ones are untouched: make"
        " room, then continue with --resume"
    )


def _files(checkpoint: Path) -> dict[str, Path]:
    """Return every file in a checkpoint but the manifest, by its path in it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(file.relative_to(checkpoint)): file for file in files}


def _checksum(file: Path) -> dict[str, Any]:
    """Return the size and the SHA-256 of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def check(checkpoint: Path, group: dist.ProcessGroup | None = None) -> None:
    """Check the files of a checkpoint against its manifest.

    Args:
        group: its ranks share the files, each of which one rank reads; all must call this.

    Raises:
        UserError: if a file is not as it was written; on all ranks of a group.
    """
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    problem = _find_problem(checkpoint, rank, ranks)
    if group:
        problems: list[str | None] = [None] * ranks
        dist.all_gather_object(problems, problem, group)
        problem = next(filter(None, problems), None)
    if problem:
        remedy = "remove this checkpoint, and the one before it is the last"
        raise (EveryRankError if group else UserError)(f"{checkpoint}: {problem}; {remedy}")


def _find_problem(checkpoint: Path, rank: int, ranks: int) -> str | None:
    """Return what is wrong with a checkpoint, of whose files every `ranks`-th is read; None if nothing is."""
    try:
        written = json.loads((checkpoint / MANIFEST).read_text())["files"]
        files = _files(checkpoint)
        largest_first = sorted(written, key=lambda name: (-written[name]["bytes"], name))
        for name in sorted(written.keys() | files.keys()):
            if name not in files or name not in written:
                return f"{name} is {'missing' if name in written else 'not of it'}"
            if files[name].stat().st_size != written[name]["bytes"]:
                return f"{name} is damaged (another size)"
        damaged = [name for name in largest_first[rank::ranks] if _checksum(files[name]) != written[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return f"{min(damaged)} is damaged (another checksum)" if damaged else None


def _copy(tree: Any) -> Any:
    """Return a copy with its own tensors, in the memory of the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    return type(tree)(map(_copy, tree)) if isinstance(tree, list | tuple) else tree


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk; some file systems flush no folders, and say that it is invalid."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def complete(folder: Path) -> list[Path]:
    """Return all checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{8,}", path.name))


def prune(folder: Path, keep: int, every: int = 0) -> None:
    """Remove all checkpoints but the last `keep`, the best, and those of every `every`-th step."""
    best = best_of(folder)
    for checkpoint in complete(folder)[:-keep]:
        if checkpoint != best and not (every and int(checkpoint.name.removeprefix("step-")) % every == 0):
            aside = checkpoint.with_name(f".{checkpoint.name}{PARTIAL}")  # a folder of the right name is complete
            os.rename(checkpoint, aside)
            shutil.rmtree(aside)


def clean(folder: Path) -> None:
    """Remove the partial checkpoints of killed processes."""
    for partial in folder.glob(f".step-*{PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


def mark_best(folder: Path, values: Mapping[int, float]) -> None:
    """Mark the checkpoint with the highest value as the best, the first of equal ones.

    Args:
        values: by step, of which some may have no checkpoint, and NaN and −∞ are never the best.
    """
    kept = {step: value for step, value in values.items() if value > -math.inf and (folder / f"step-{step:08d}").exists()}
    if not kept:
        return
    step = max(kept, key=lambda step: kept[step])
    write_json(folder / BEST, {"checkpoint": f"step-{step:08d}", "value": kept[step]})


def best_of(folder: Path) -> Path | None:
    """Return the best checkpoint of a folder, None if none is marked, or it is no longer there."""
    try:
        best = folder / json.loads((folder / BEST).read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return best if best in complete(folder) else None


def find(folder: Path, which: str | int) -> Path:
    """Return the checkpoint named "last", "best" or a step's number.

    Raises:
        UserError: if there is none.
    """
    checkpoints, which = complete(folder), str(which)
    if which == "last" and checkpoints:
        return checkpoints[-1]
    if which == "best" and (best := best_of(folder)):
        return best
    if re.fullmatch("[0-9]+", which) and (folder / f"step-{int(which):08d}").exists():
        return folder / f"step-{int(which):08d}"
    steps = ", ".join(str(int(checkpoint.name.removeprefix("step-"))) for checkpoint in checkpoints) or "none"
    raise UserError(f"no checkpoint {which!r} in {folder}; there are steps: {steps}")


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
    """Return the file of weights of a checkpoint's folder, or the .safetensors file itself.

    Args:
        averaged: prefer the moving average.

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
    """Load the state of a checkpoint."""
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
