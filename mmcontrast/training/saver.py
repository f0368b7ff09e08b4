"""Saves checkpoints while training goes on, with the ranks' shards of the optimizer's state."""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import SHARDS, Contents, partial_of, write_errors, write_failed
from mmcontrast.training.tensors import drain


class Saver:
    """Writes checkpoints while training goes on: `save` copies the contents and returns; a thread writes them.

    Args:
        keep, every: which checkpoints stay, see `prune`.
        beside: False: `save` returns when all is written.
        rank: the first writes the checkpoint; the others only their shards, if there are any.
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
        """Save a checkpoint, after the one before it is written.

        Raises:
            UserError: if this one, or the one before, could not be written.
        """
        self.wait()
        self.step = step
        shards = self._write_shards(step, contents.shards) if contents.shards else None
        if self.beside:
            contents = contents.on_host(keep=not self.rank)
            self.writing = shards if self.rank else self.thread.submit(self._write, step, contents, shards)
        elif self.rank:
            drain(contents.full_tensors())
        else:
            self._write(step, contents, shards)

    def _write_shards(self, step: int, shards: Mapping[str, Tensor]) -> Future[Any]:
        """Write this rank's shards; `beside` the training, from a copy."""
        import torch.distributed.checkpoint as dcp

        partial = partial_of(self.folder, step)
        if not self.rank:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier(self.group)
        options: dict[str, Any] = {"checkpoint_id": partial / SHARDS, "process_group": self.group}
        if self.beside:
            writing = dcp.async_save(dict(shards), **options)
            assert isinstance(writing, Future)
            return writing
        written: Future[Any] = Future()
        try:
            written.set_result(dcp.save(dict(shards), **options))
        except write_errors() as error:
            raise write_failed(self.folder, step, error) from error
        return written

    def _write(self, step: int, contents: Contents, shards: Future[Any] | None) -> Path:
        written = checkpoint.save(self.folder, step, contents, shards)
        checkpoint.prune(self.folder, self.keep, self.every)
        return written

    def wait(self) -> Path | None:
        """Wait until the last checkpoint is written, and return it.

        Raises:
            UserError: if it could not be written.
        """
        writing, self.writing = self.writing, None
        try:
            written = writing.result() if writing else None
        except write_errors() as error:
            raise write_failed(self.folder, self.step, error) from error
        return written if isinstance(written, Path) else None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish the checkpoint that is being written, whatever ends the run."""
        self.thread.shutdown(wait=True)
        if kind is None:
            self.wait()

    def mark_best(self, values: Mapping[int, float]) -> None:
        """Mark the checkpoint with the highest value, by step, as the best, and remove those that are kept no longer."""
        self.wait()
        checkpoint.mark_best(self.folder, values)
        checkpoint.prune(self.folder, self.keep, self.every)
