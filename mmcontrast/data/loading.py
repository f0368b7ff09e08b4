"""Batches in the run's order for training, and in the shards' order for evaluation; decoding in worker processes."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
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
from mmcontrast.types import Batch

TrainingDataset = ShardDataset | MixtureDataset | StreamDataset
ExactOrder = SampleOrder | MixtureOrder | ClusterOrder | NeighbourOrder
TrainingOrder = ExactOrder | StreamOrder
PREFETCHED = 4  # batches that a worker has ready


def start_worker(_: int = 0) -> None:
    """Workers compute on one thread (a fork that used several would wait for threads that it does not have), and leave
    signals to the process that owns them: a scheduler sends them to all. A second SIGTERM is that process's own."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)


@atexit.register  # before multiprocessing's own, which would wait for workers that take its SIGTERM for a scheduler's
def _end_workers() -> None:
    for child in multiprocessing.active_children():
        child.kill()


class _Steps:
    """The places (epoch, position) of one rank's share of every batch, from a step on: a batch sampler."""

    def __init__(self, order: ExactOrder, steps: range, rank: int, world_size: int) -> None:
        self.order, self.steps, self.rank, self.world_size = order, steps, rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            yield self.order.places(step, self.rank, self.world_size)


def _checked(loader: DataLoader, number: int) -> Iterator[Batch]:
    for _, batch in zip(range(number), loader, strict=False):
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


def training_batches(
    dataset: TrainingDataset,
    order: TrainingOrder,
    steps: range,
    *,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """This rank's share of the batch of every step in `steps`.

    Raises:
        UserError: for samples that cannot be had, when their batch is due.
    """
    common: dict[str, Any] = {
        "num_workers": num_workers,
        "collate_fn": dataset.collate,
        "worker_init_fn": start_worker,
        "prefetch_factor": PREFETCHED if num_workers else None,
        "pin_memory": pin_memory,
    }
    if isinstance(dataset, StreamDataset):
        stream = dataset.starting(steps.start, rank)
        return _checked(DataLoader(stream, batch_size=_share(order.batch_size, world_size), **common), len(steps))
    assert not isinstance(order, StreamOrder)
    return _checked(DataLoader(dataset, batch_sampler=_Steps(order, steps, rank, world_size), **common), len(steps))


def _share(batch_size: int, world_size: int) -> int:
    if batch_size % world_size:
        raise UserError(f"{world_size} ranks cannot share train.batch_size={batch_size}: set it to a multiple of them")
    return batch_size // world_size


def all_batches(
    dataset: ShardDataset | MixtureDataset, batch_size: int, num_workers: int = 0, rows: range | None = None
) -> Iterator[Batch]:
    """Every sample once, in the shards' order; with `rows` those at these positions.

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
    return _checked(loader, len(loader))
