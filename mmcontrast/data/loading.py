"""Loads batches: in the run's order for training, in the shards' order for evaluation, decoded in worker processes."""

import atexit
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from mmcontrast.data.clusters import ClusterOrder
from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.mixture import MixtureDataset, MixtureOrder
from mmcontrast.data.neighbours import NeighbourOrder
from mmcontrast.data.order import SampleOrder
from mmcontrast.data.stream import StreamDataset, StreamOrder
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality
from mmcontrast.types import Batch

TrainingDataset = ShardDataset | MixtureDataset | StreamDataset
ExactOrder = SampleOrder | MixtureOrder | ClusterOrder | NeighbourOrder
TrainingOrder = ExactOrder | StreamOrder
PREFETCHED = 4  # batches that a worker has ready, at most
SHARED = Path("/dev/shm")  # through which workers hand them over
TEXT_BYTES = 1024  # of a text's numbers, about


def start_worker(_: int = 0) -> None:
    """Prepare a worker process. It computes on one thread (a fork that used several would wait for threads that it does not
    have), and leaves signals to the process that owns it: a scheduler sends them to all. A second SIGTERM ends it."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)


@atexit.register  # before multiprocessing's own, which would wait for workers that take its SIGTERM for a scheduler's
def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise, wherever the interpreter is on its way out
    for child in multiprocessing.active_children():
        child.kill()


class _Steps:
    """A batch sampler: yields the places (epoch, position) of one rank's share of every batch, from a step on."""

    def __init__(self, order: ExactOrder, steps: range, rank: int, world_size: int) -> None:
        self.order, self.steps, self.rank, self.world_size = order, steps, rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            yield self.order.places(step, self.rank, self.world_size)


def _raise_errors(loader: DataLoader, number: int) -> Iterator[Batch]:
    """Yield so many batches of a loader; raise the error that is in the place of one."""
    for _, batch in zip(range(number), loader, strict=False):
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


def bytes_of_sample(dataset: TrainingDataset) -> int:
    """Return about how many bytes a sample takes in a batch: with its negatives, and as teachers read it."""
    modalities = [*dataset.modalities.values(), *(modality for view in dataset.views for modality in view.modalities.values())]
    if not isinstance(dataset, StreamDataset):
        modalities += [dataset.modalities[negatives.field] for negatives in dataset.negatives for _ in negatives.names]
    return sum(TEXT_BYTES if isinstance(modality, TextModality) else modality.blank().nbytes for modality in modalities)


def free_memory() -> int:
    """Return how many bytes batches may take on this machine: of the shared memory, and of the memory that is available."""
    available, shared = available_memory(), shutil.disk_usage(SHARED).free if SHARED.is_dir() else None
    return min((free for free in (available, shared) if free is not None), default=2**62)


def available_memory() -> int | None:
    """Return the bytes of memory that Linux says are available; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def batches_ahead(batch_bytes: float, batches: int, free: int) -> int:
    """Return how many batches each worker has ready: four, unless they would fill more than half of the free memory, but one at
    least.

    Args:
        batch_bytes: of a rank's batch.
        batches: workers of all ranks on this machine, each of which makes one at a time.
        free: bytes.
    """
    return max(1, min(PREFETCHED, int(free / 2 / max(1.0, batch_bytes * batches))))


def training_batches(
    dataset: TrainingDataset,
    order: TrainingOrder,
    steps: range,
    *,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool,
    prefetch: int | None = None,
) -> Iterator[Batch]:
    """Yield a rank's share of the batch of every step in `steps`.

    Args:
        prefetch: samples that its workers have ready, to a batch each; default: as `batches_ahead`.

    Raises:
        UserError: for samples that cannot be read, when their batch is due.
    """
    share, ahead = _share(order.batch_size, world_size), None
    if num_workers and prefetch:
        ahead = max(1, prefetch // (num_workers * share))
    elif num_workers:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or min(world_size, max(1, torch.cuda.device_count()))
        ahead = batches_ahead(bytes_of_sample(dataset) * share, num_workers * local_ranks, free_memory())
    common: dict[str, Any] = {
        "num_workers": num_workers,
        "collate_fn": dataset.collate,
        "worker_init_fn": start_worker,
        "prefetch_factor": ahead,
        "pin_memory": pin_memory,
    }
    if isinstance(dataset, StreamDataset):
        stream = dataset.starting(steps.start, rank)
        return _raise_errors(DataLoader(stream, batch_size=share, **common), len(steps))
    assert not isinstance(order, StreamOrder)
    return _raise_errors(DataLoader(dataset, batch_sampler=_Steps(order, steps, rank, world_size), **common), len(steps))


def _share(batch_size: int, world_size: int) -> int:
    if batch_size % world_size:
        raise UserError(f"{world_size} ranks cannot share train.batch_size={batch_size}: set it to a multiple of them")
    return batch_size // world_size


def all_batches(
    dataset: ShardDataset | MixtureDataset, batch_size: int, num_workers: int = 0, rows: range | None = None
) -> Iterator[Batch]:
    """Yield every sample once, in the shards' order; with `rows` those at these positions.

    Raises:
        UserError: at the first sample that cannot be decoded.
    """
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=rows,  # None: all in their order
        num_workers=num_workers,
        collate_fn=dataset.collate,
        worker_init_fn=start_worker,
    )
    return _raise_errors(loader, len(loader))
