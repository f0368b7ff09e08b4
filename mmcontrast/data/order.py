"""In which order samples are seen: a pure function of (seed, epoch), the same for any number of ranks or workers.

Shards are cut into blocks of consecutive samples; an epoch permutes the blocks and cuts the stream of samples into
equal lanes; each lane is shuffled inside windows. A global step takes the same number of samples from every lane, and
rank r of W owns lanes r·L/W … (r+1)·L/W − 1. So the position in the data is one integer, the step.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmcontrast.errors import UserError


@dataclass(frozen=True)
class SampleOrder:
    """The order of a run.

    Attributes:
        shard_sizes: samples in each shard.
        batch_size: of all ranks together.
        lanes: divides batch_size; the number of ranks must divide it.
        block: consecutive samples that stay together until a window shuffles them; what one rank reads in one place.
        window: samples shuffled together in a lane.
    """

    shard_sizes: tuple[int, ...]
    batch_size: int
    seed: int
    lanes: int
    block: int
    window: int

    def __post_init__(self) -> None:
        if self.batch_size % self.lanes:
            raise UserError(f"data.lanes={self.lanes} must divide train.batch_size={self.batch_size}")
        if self.steps_per_epoch < 1:
            raise UserError(
                f"the training data has {sum(self.shard_sizes)} samples, fewer than train.batch_size={self.batch_size}"
                f" over data.lanes={self.lanes} lanes needs: lower the batch size or add data"
            )

    @property
    def lane_length(self) -> int:
        return sum(self.shard_sizes) // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only: fewer than lanes + batch_size samples, other ones each epoch, are left out at its end."""
        return self.lane_length // (self.batch_size // self.lanes)

    def fingerprint(self) -> str:
        """Equal for two runs exactly if they see the same samples at the same steps (of equal shards)."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[int, np.ndarray]:
        """(epoch, [batch_size / world_size] positions in the concatenated shards) of one rank at a global step."""
        if self.lanes % world_size:
            raise UserError(f"{world_size} ranks cannot share data.lanes={self.lanes}: set it to a multiple of them")
        epoch, step = divmod(step, self.steps_per_epoch)
        lanes = _epoch(self, epoch)
        share, own = self.batch_size // self.lanes, self.lanes // world_size
        return epoch, lanes[rank * own : (rank + 1) * own, step * share : (step + 1) * share].reshape(-1)


@lru_cache(maxsize=2)
def _epoch(order: SampleOrder, epoch: int) -> np.ndarray:
    """[lanes, lane_length] positions."""
    starts = np.concatenate([[0], np.cumsum(order.shard_sizes)])
    blocks = [
        np.arange(first, min(first + order.block, end))
        for start, end in zip(starts[:-1], starts[1:], strict=True)
        for first in range(start, end, order.block)
    ]
    permutation = np.random.Generator(np.random.PCG64([order.seed, epoch])).permutation(len(blocks))
    stream = np.concatenate([blocks[k] for k in permutation])
    lanes = stream[: order.lanes * order.lane_length].reshape(order.lanes, order.lane_length)
    for lane, samples in enumerate(lanes):
        for number, start in enumerate(range(0, order.lane_length, order.window)):
            generator = np.random.Generator(np.random.PCG64([order.seed, epoch, lane, number]))
            generator.shuffle(samples[start : start + order.window])
    return lanes
