"""Orders samples into batches with their nearest neighbours, each other's hard negatives (Sample4Geo, arXiv:2303.11851)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.mixture import MixtureDataset
from mmcontrast.data.negatives import Candidates, UnknownIds, open_candidates, rows_of
from mmcontrast.data.order import WholeEpochs


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of every sample of a data set, by position.

    Attributes:
        digest: of the table that named them.
        starts: int64 [N + 1], where each sample's begin; none of a sample without a row.
        positions: int32 or int64 [M], the nearest of each first.
    """

    digest: str
    starts: np.ndarray
    positions: np.ndarray

    @classmethod
    def none(cls, samples: int) -> "Neighbours":
        """Return neighbours of which no sample has any: batches are drawn at random."""
        return cls("none yet", np.zeros(samples + 1, dtype=np.int64), np.empty(0, dtype=np.int32))


@dataclass(frozen=True)
class NeighbourOrder(WholeEpochs):
    """Every step's samples are some that are drawn and their neighbours.

    An epoch permutes the samples. The first of them that no batch has yet is a seed: it goes into the batch at hand, and after
    it up to `count` of its `nearest` neighbours that no batch of the epoch has yet, the nearest ones for `share` of them and
    random ones of the others; then comes the next seed, until the batch is full. The batches come in a random order, each
    sample once, but for fewer than a batch. Samples are read one by one, wherever they are, not in blocks.

    Attributes:
        nearest: so many of a sample's neighbours may be chosen.
        count: so many neighbours of a seed are in its batch, at most.
        share: of these, the share that are the nearest.
    """

    nearest: int
    count: int
    share: float
    neighbours: Neighbours = field(compare=False, repr=False)

    @property
    def samples(self) -> int:
        return len(self.neighbours.starts) - 1

    def make_epoch(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        size, total = self.batch_size, self.steps_per_epoch * self.batch_size
        positions, filled = np.empty(total, dtype=np.int64), 0
        free = np.ones(self.samples, dtype=bool)  # in no batch yet
        for seed in random.permutation(self.samples).tolist():
            if filled == total:
                break
            if not free[seed]:
                continue
            free[seed], positions[filled] = False, seed
            filled += 1
            if room := min(self.count, -filled % size):
                chosen = list(_pick_neighbours(self, seed, room, free, random))
                free[chosen], positions[filled : filled + len(chosen)] = False, chosen
                filled += len(chosen)
        return positions.reshape(-1, size)[random.permutation(self.steps_per_epoch)]


def _pick_neighbours(
    order: NeighbourOrder, seed: int, room: int, free: np.ndarray, random: np.random.Generator
) -> Iterator[int]:
    """Yield the neighbours that go into a seed's batch, at most `room`, the nearest first."""
    neighbours = order.neighbours
    start, stop = neighbours.starts[seed], neighbours.starts[seed + 1]
    row = neighbours.positions[start : min(stop, start + order.nearest)]
    available = list(dict.fromkeys(row[free[row]].tolist()))  # a table may name one twice
    if len(available) <= room:
        yield from available
        return
    nearest_count = round(room * order.share)
    yield from available[:nearest_count]
    for number in np.sort(random.choice(len(available) - nearest_count, room - nearest_count, replace=False)).tolist():
        yield available[nearest_count + number]


def open_neighbours(
    dataset: ShardDataset | MixtureDataset,
    table: str,
    nearest: int,
    unknown_ids: UnknownIds = "error",
    known: np.ndarray | None = None,
) -> Neighbours:
    """Open a table of neighbours, the nearest of each sample first: as `open_candidates`, `nearest` of each row.

    Raises:
        UserError: as `open_candidates`.
    """
    known = dataset.sample_ids() if known is None else known
    candidates = open_candidates(dataset, table, "data.batches", unknown_ids, nearest, known)
    return by_position(candidates, known)


def by_position(candidates: Candidates, known: np.ndarray) -> Neighbours:
    """Return the neighbours of a data set whose sample ids are `known`, int64 [N]."""
    rows = np.minimum(np.searchsorted(candidates.ids, known), len(candidates.ids) - 1)
    starts, positions = rows_of(candidates.starts, candidates.positions, np.where(candidates.ids[rows] == known, rows, -1))
    return Neighbours(candidates.digest, starts, positions)
