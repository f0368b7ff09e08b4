"""Defines the order in which samples are seen: a pure function of (seed, epoch), the same for any number of ranks or workers.

Shards are cut into blocks of consecutive samples; an epoch permutes the blocks and cuts the stream of samples into
equal lanes; each lane is shuffled inside windows. A global step takes the same number of samples from every lane, and
rank r of W owns lanes r·L/W … (r+1)·L/W − 1. So the position in the data is one integer, the step. Nothing but the blocks and
the windows at hand is ever in memory, so 10⁹ samples are ordered in seconds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from mmcontrast.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class SampleOrder:
    """The order of a run.

    Attributes:
        shard_sizes: samples in each shard.
        batch_size: of all ranks together.
        lanes: divides batch_size; the number of ranks must divide it.
        block: consecutive samples that stay together until a window shuffles them; what one rank reads in one place.
        window: samples shuffled together in a lane.
        data: digest of the shards.
        bucket_by: a field by whose length samples are brought together: in each window a lane's samples are sorted by it and
            cut into the parts of its steps, which come in a random order that is the same in all lanes. So all samples of a
            step are about as long.
        lengths: of samples, by position: bytes of that field.
    """

    shard_sizes: tuple[int, ...]
    batch_size: int
    seed: int
    lanes: int
    block: int
    window: int
    data: str = ""
    bucket_by: str | None = None
    lengths: Callable[[np.ndarray], np.ndarray] | None = field(default=None, compare=False, repr=False)
    epochs: "dict[int, _Epoch]" = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_lanes(self.lanes, self.batch_size)
        if self.steps_per_epoch < 1:
            raise UserError(
                f"the training data has {self.samples} samples, fewer than train.batch_size={self.batch_size}"
                f" over data.lanes={self.lanes} lanes needs: lower the batch size or add data"
            )

    @property
    def share(self) -> int:
        """Return how many samples a step takes of a lane."""
        return self.batch_size // self.lanes

    @property
    def shuffled(self) -> int:
        """Return how many samples a lane shuffles together: a window, of whole steps if they are sorted by length."""
        return max(self.share, self.window // self.share * self.share) if self.bucket_by else self.window

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one."""
        return {attribute.name: getattr(self, attribute.name) for attribute in fields(self) if attribute.compare}

    @cached_property
    def samples(self) -> int:
        """Return the number of samples of all shards, added up once: there may be 100,000 shards, and every step needs it."""
        return sum(self.shard_sizes)

    @property
    def lane_length(self) -> int:
        return self.samples // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of whole batches: fewer than lanes + batch_size samples, other ones each epoch, are left out."""
        return self.lane_length // self.share

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[int, np.ndarray]:
        """Return (epoch, [batch_size / world_size] positions in the concatenated shards) of one rank at a global step."""
        epoch, step = divmod(step, self.steps_per_epoch)
        share, stream = self.share, self._epoch(epoch)
        parts = [stream.lane(k, step * share, (step + 1) * share) for k in lanes_of(self.lanes, rank, world_size)]
        return epoch, np.concatenate(parts)

    def places(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """Return what `batch` does, as (epoch, position) of each sample."""
        epoch, positions = self.batch(step, rank, world_size)
        return [(epoch, position) for position in positions.tolist()]

    def _epoch(self, epoch: int) -> "_Epoch":
        return recent(self.epochs, epoch, lambda number: _Epoch(self, number))

    def endless_lane(self, lane: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (epoch, position) of a lane's samples start … stop − 1, when it walks all of its own, epoch after epoch."""
        places: list[tuple[int, int]] = []
        while start < stop:
            epoch, first = divmod(start, self.lane_length)
            last = min(first + stop - start, self.lane_length)
            places += [(epoch, position) for position in self._epoch(epoch).lane(lane, first, last).tolist()]
            start += last - first
        return places


@dataclass(frozen=True)
class WholeEpochs(ABC):
    """An order that makes the batches of an epoch at once; a pure function of (seed, epoch), as every order.

    Attributes:
        batch_size: of all ranks together. lanes: the number of ranks must divide it.
        data: digest of the shards. table: of what the order is made by.
    """

    batch_size: int
    seed: int
    lanes: int
    data: str
    table: str

    def __post_init__(self) -> None:
        check_lanes(self.lanes, self.batch_size)
        if self.steps_per_epoch < 1:
            raise UserError(f"the training data has {self.samples} samples, fewer than train.batch_size={self.batch_size}")

    @property
    @abstractmethod
    def samples(self) -> int: ...

    @abstractmethod
    def make_epoch(self, epoch: int) -> np.ndarray:
        """Return the positions of an epoch's batches, [steps, batch]."""

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size

    @cached_property
    def _epochs(self) -> dict[int, np.ndarray]:
        return {}

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one."""
        return {attribute.name: getattr(self, attribute.name) for attribute in fields(self) if attribute.compare}

    def places(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """Return (epoch, position) of each sample of one rank at a global step."""
        epoch, step = divmod(step, self.steps_per_epoch)
        steps = recent(self._epochs, epoch, self.make_epoch)
        share = share_of(self.batch_size, self.lanes, rank, world_size)
        return [(epoch, position) for position in steps[step, share].tolist()]


def recent(cache: dict[int, T], epoch: int, make: Callable[[int], T]) -> T:
    """Return an epoch's order. The last two are kept: at an epoch's end some lanes are already in the next."""
    if epoch not in cache:
        if len(cache) > 1:
            del cache[min(cache)]
        cache[epoch] = make(epoch)
    return cache[epoch]


def check_lanes(lanes: int, batch_size: int) -> None:
    """Check that a batch can be taken evenly of all lanes.

    Raises:
        UserError: if it cannot.
    """
    if batch_size % lanes:
        raise UserError(f"data.lanes={lanes} must divide train.batch_size={batch_size}")


def lanes_of(lanes: int, rank: int, world_size: int) -> range:
    """Return the lanes that a rank owns.

    Raises:
        UserError: if the ranks cannot share them evenly.
    """
    if lanes % world_size:
        raise UserError(f"{world_size} ranks cannot share data.lanes={lanes}: set it to a multiple of them")
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def share_of(batch_size: int, lanes: int, rank: int, world_size: int) -> slice:
    """Return which of a step's samples are a rank's: those of its lanes."""
    owned, share = lanes_of(lanes, rank, world_size), batch_size // lanes
    return slice(owned.start * share, owned.stop * share)


class _Epoch:
    """One epoch's order: the permuted blocks (16 bytes each), and of each lane the window at hand."""

    def __init__(self, order: SampleOrder, epoch: int) -> None:
        self.order, self.epoch = order, epoch
        sizes = np.asarray(order.shard_sizes, dtype=np.int64)
        blocks = -(-sizes // order.block)
        starts = np.repeat(np.cumsum(sizes) - sizes, blocks)
        within = (np.arange(len(starts)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * order.block
        lengths = np.minimum(np.repeat(sizes, blocks) - within, order.block)
        permutation = np.random.Generator(np.random.PCG64([order.seed, epoch])).permutation(len(starts))
        lengths = lengths[permutation]
        self.ends = np.cumsum(lengths)
        self.shift = (starts + within)[permutation] - self.ends + lengths  # from a place in the stream to a position
        self.windows: dict[int, tuple[int, np.ndarray]] = {}

    def lane(self, lane: int, start: int, stop: int) -> np.ndarray:
        """Return the positions of a lane's samples start … stop − 1."""
        window = self.order.shuffled
        parts = []
        for number in range(start // window, (stop - 1) // window + 1):
            if self.windows.get(lane, (-1, None))[0] != number:
                self.windows[lane] = number, self._shuffle_window(lane, number)
            base = number * window
            parts.append(self.windows[lane][1][max(start - base, 0) : stop - base])
        return np.concatenate(parts)

    def _shuffle_window(self, lane: int, number: int) -> np.ndarray:
        """Return the positions of a lane's window, in the order in which they are seen."""
        order, window = self.order, self.order.shuffled
        start = lane * order.lane_length
        places = np.arange(number * window, min((number + 1) * window, order.lane_length)) + start
        samples = places + self.shift[np.searchsorted(self.ends, places, side="right")]
        np.random.Generator(np.random.PCG64([order.seed, self.epoch, lane, number])).shuffle(samples)
        if order.lengths:
            steps = len(samples) // order.share  # what is left over is no step: any samples, not the longest
            whole_steps = samples[: steps * order.share]
            by_length = whole_steps[np.argsort(order.lengths(whole_steps), kind="stable")].reshape(steps, order.share)
            step_order = np.random.Generator(np.random.PCG64([order.seed, self.epoch, number])).permutation(steps)
            samples[: steps * order.share] = by_length[step_order].ravel()
        return samples
