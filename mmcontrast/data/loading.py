"""Batches in the run's order for training, and in the shards' order for evaluation; decoding in worker processes."""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.mixture import MixtureDataset, MixtureOrder
from mmcontrast.data.order import SampleOrder
from mmcontrast.errors import UserError
from mmcontrast.types import Batch


def start_worker(_: int = 0) -> None:
    """Workers compute on one thread (a fork that used several would wait for threads that it does not have), and leave
    interrupts to the process that owns them."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Steps:
    """The places (epoch, position) of one rank's share of every batch, from a step on: a batch sampler."""

    def __init__(self, order: SampleOrder | MixtureOrder, steps: range, rank: int, world_size: int) -> None:
        self.order, self.steps, self.rank, self.world_size = order, steps, rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            yield self.order.places(step, self.rank, self.world_size)


def _checked(loader: DataLoader) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


def training_batches(
    dataset: ShardDataset | MixtureDataset,
    order: SampleOrder | MixtureOrder,
    steps: range,
    *,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """This rank's share of the batch of every step in `steps`.

    Raises:
        UserError: at the first sample that cannot be decoded.
    """
    return _checked(
        DataLoader(
            dataset,
            batch_sampler=_Steps(order, steps, rank, world_size),
            num_workers=num_workers,
            collate_fn=dataset.collate,
            worker_init_fn=start_worker,
            prefetch_factor=4 if num_workers else None,
            pin_memory=pin_memory,
        )
    )


def all_batches(dataset: ShardDataset, batch_size: int, num_workers: int = 0) -> Iterator[Batch]:
    """Every sample once, in the shards' order.

    Raises:
        UserError: at the first sample that cannot be decoded.
    """
    return _checked(
        DataLoader(
            dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=dataset.collate, worker_init_fn=start_worker
        )
    )
