"""Mixes several sources into one order and one data set: exact weights, an epoch count for each, one integer of state."""

import copy
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.decoding import Members, Sample
from mmcontrast.data.files import identities
from mmcontrast.data.ids import stable_hash
from mmcontrast.data.order import SampleOrder, lanes_of
from mmcontrast.data.samples import Samples
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.views import TeacherView
from mmcontrast.errors import UserError
from mmcontrast.modalities import Modality

SLOTS = 8192  # in which every source has its share to within two


@dataclass(frozen=True)
class MixtureOrder:
    """The source that the samples of every step come from, a pure function of the seed; within a source, its own order.

    Each lane's slots are cut into windows; a window holds every source as often as its weight says, shuffled. A source's lane
    walks its epochs one after the other, whatever the others do. So weights hold to within two slots of a window and never
    drift, no sample of a source comes again before its epoch is over (but for fewer than `lanes` of them), and the state is the
    step.

    Attributes:
        orders: of the sources, with the same lanes, batch size and seed.
        weights: of the sources, adding up to 1.
        batches: "mixed", or "single": all samples of a step are of one source, which weighs by steps then.
    """

    orders: tuple[SampleOrder, ...]
    weights: tuple[float, ...]
    batches: Literal["mixed", "single"] = "mixed"

    def __post_init__(self) -> None:
        if min(self.weights) * SLOTS < 2:
            raise UserError(
                f"data.train: the smallest weight is {min(self.weights):.2g} of all; at least {2 / SLOTS:.2g} is needed"
            )
        for order in self.orders:
            if order.lane_length < 1:
                raise UserError(f"a source has {order.samples} samples, fewer than data.lanes={order.lanes}")

    @property
    def lanes(self) -> int:
        return self.orders[0].lanes

    @property
    def batch_size(self) -> int:
        return self.orders[0].batch_size

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one."""
        return {"orders": [order.state() for order in self.orders], "weights": self.weights, "batches": self.batches}

    def places(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """Return (epoch of its source, position in the concatenated sources) of each sample of a rank at a global step."""
        share, places = self.batch_size // self.lanes, []
        for lane in lanes_of(self.lanes, rank, world_size):
            if self.batches == "single":
                source, steps_before = self._slots(-1, step, step + 1)[0]
                chosen = [(source, steps_before * share + k) for k in range(share)]
            else:
                chosen = self._slots(lane, step * share, (step + 1) * share)
            places += self._samples(lane, chosen)
        return places

    def _samples(self, lane: int, chosen: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the samples of (source, number in the source's lane); the numbers of a source follow each other."""
        starts = [0, *accumulate(order.samples for order in self.orders)]
        streams: dict[int, Iterator[tuple[int, int]]] = {}
        for source, order in enumerate(self.orders):
            numbers = [number for chosen_source, number in chosen if chosen_source == source]
            if numbers:
                streams[source] = iter(order.endless_lane(lane, numbers[0], numbers[-1] + 1))
        places = []
        for source, _ in chosen:
            epoch, position = next(streams[source])
            places.append((epoch, starts[source] + position))
        return places

    def _slots(self, lane: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (source, how many of it came before in this lane) of slots start … stop − 1."""
        slots = []
        for number in range(start // SLOTS, (stop - 1) // SLOTS + 1):
            sources, before = _window(self.weights, self.orders[0].seed, lane, number)
            part = slice(max(start - number * SLOTS, 0), stop - number * SLOTS)
            slots += list(zip(sources[part].tolist(), before[part].tolist(), strict=True))
        return slots


@lru_cache(maxsize=256)
def _window(weights: tuple[float, ...], seed: int, lane: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sources of a window [SLOTS], and how often each came before [SLOTS]."""
    ends = np.array([*accumulate(weights[:-1]), 1.0])
    first, last = (np.diff(np.floor(k * SLOTS * ends), prepend=0).astype(np.int64) for k in (number, number + 1))
    sources = np.repeat(np.arange(len(weights)), last - first)
    np.random.Generator(np.random.PCG64([seed, lane + 1, number])).shuffle(sources)
    before = np.empty(SLOTS, dtype=np.int64)
    for source, count in enumerate(first):
        is_source = sources == source
        before[is_source] = count + np.arange(is_source.sum())
    return sources, before


class MixtureDataset(Samples):
    """The concatenation of several sources, each with its own shards, modalities and transforms.

    Args:
        sources: by name. A field that a source lacks is absent from its samples.
        modalities: per field, by which a batch is collated.
        own_ids: sources whose sample and group ids mean nothing to the others: theirs are kept apart.
        views: what teachers read, those of the sources.
    """

    def __init__(
        self,
        sources: Mapping[str, ShardDataset],
        modalities: Mapping[str, Modality],
        own_ids: Collection[str] = (),
        views: Sequence[TeacherView] = (),
    ) -> None:
        self.views = views
        self.sources, self.modalities, self.own_ids = dict(sources), dict(modalities), frozenset(own_ids)
        self.remote = any(source.remote for source in self.sources.values())
        self.names, self.starts = list(self.sources), [0, *accumulate(map(len, self.sources.values()))]
        shard_identities = iter(identities([shard.name for source in self.sources.values() for shard in source.shards]))
        for source in self.sources.values():  # another source's shards may have the same names
            source.identities = [next(shard_identities) for _ in source.shards]
        for field in self.modalities:
            if not any(field in source.modalities for source in self.sources.values()):
                raise UserError(f"field {field!r}: no sample of any source ({', '.join(self.names)}) has a member for it")

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def shards(self) -> list[ShardIndex]:
        """Return the shards of all sources."""
        return [shard for source in self.sources.values() for shard in source.shards]

    def locate(self, position: int) -> tuple[str, int]:
        """Return the source of a sample, and its position in that."""
        number = bisect_right(self.starts, position) - 1
        return self.names[number], position - self.starts[number]

    def shard_name(self, position: int) -> str:
        name, row = self.locate(position)
        return self.sources[name].shard_name(row)

    def evaluated(self, modalities: Mapping[str, Modality]) -> "MixtureDataset":
        """Return the samples as evaluation reads them: as `ShardDataset.evaluated`."""
        view = copy.copy(self)
        view.negatives, view.views, view.modalities = (), (), dict(modalities)
        view.sources = {name: source.evaluated(modalities) for name, source in self.sources.items()}
        return view

    def key(self, position: int) -> str:
        name, row = self.locate(position)
        return self.sources[name].key(row)

    def sample_id(self, position: int) -> int:
        name, row = self.locate(position)
        sample_id = self.sources[name].sample_id(row)
        return stable_hash(f"{name} {sample_id}") if name in self.own_ids else sample_id

    def sample_ids(self) -> np.ndarray:
        """Return the ids of all samples, int64 [N], by position, as `ShardDataset.sample_ids`."""
        ids_of_sources = []
        for name, source in self.sources.items():
            ids = source.sample_ids()
            if name in self.own_ids:
                ids = np.array([stable_hash(f"{name} {sample_id}") for sample_id in ids.tolist()])
            ids_of_sources.append(ids)
        return np.concatenate(ids_of_sources)

    @property
    def digest(self) -> str:
        return " ".join(source.digest for source in self.sources.values())

    def fetch(self, position: int, field: str | None = None) -> Members:
        name, row = self.locate(position)
        return self.sources[name].fetch(row, field)

    def make(self, epoch: int, position: int, members: Members) -> Sample:
        """Make a sample; `epoch` is of its source."""
        name, row = self.locate(position)
        return self._label_source(name, self.sources[name].make(epoch, row, members))

    def make_candidate(self, epoch: int, position: int, members: Members, field: str) -> Sample:
        name, row = self.locate(position)
        return self._label_source(name, self.sources[name].make_candidate(epoch, row, members, field))

    def _label_source(self, name: str, sample: Sample) -> Sample:
        """Write a sample's source into its metadata, and keep its ids apart if its source has ids of its own."""
        sample.metadata["source"] = name
        for bad in sample.replaces:
            bad["source"] = name
        if name in self.own_ids:
            sample.sample_id, sample.group_id = (stable_hash(f"{name} {i}") for i in (sample.sample_id, sample.group_id))
        return sample
