"""Defines random access to samples by position: fetched, made, and given their mined negatives."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from torch.utils.data import Dataset

from mmcontrast.data.decoding import Members, Sample, collate
from mmcontrast.data.negatives import MinedNegatives
from mmcontrast.data.views import TeacherView
from mmcontrast.modalities import Modality
from mmcontrast.types import Batch

READERS = 16  # samples of a batch that are read at a time, where they are remote


class Samples(Dataset[Sample]):
    """Random access by position, in two steps: `fetch` the bytes, then `make` a sample of them. Remote bytes are fetched for
    many samples at a time."""

    remote: bool
    modalities: dict[str, Modality]
    views: Sequence[TeacherView] = ()
    negatives: Sequence[MinedNegatives] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, position: int, field: str | None = None) -> Members:
        """Return the members that all fields are read from, or one field."""

    @abstractmethod
    def make(self, epoch: int, position: int, members: Members) -> Sample: ...

    @abstractmethod
    def make_candidate(self, epoch: int, position: int, members: Members, field: str) -> Sample:
        """Return a sample with one field alone, or why it cannot be decoded; no other replaces it."""

    def __getitem__(self, place: int | tuple[int, int]) -> Sample:
        """Return the sample at (epoch, position), or at position."""
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int | tuple[int, int]]) -> list[Sample]:
        pairs = [place if isinstance(place, tuple) else (0, place) for place in places]
        fetched = self._fetch_many(self.fetch, [position for _, position in pairs])
        samples = [self.make(epoch, position, members) for (epoch, position), members in zip(pairs, fetched, strict=True)]
        for negatives in self.negatives:
            self._add_negatives([epoch for epoch, _ in pairs], samples, negatives)
        return samples

    def _fetch_many(self, fetch: Callable[[int], Members], positions: Sequence[int]) -> Iterator[Members]:
        if not self.remote:
            yield from map(fetch, positions)
            return
        with ThreadPoolExecutor(READERS) as threads:
            yield from threads.map(fetch, positions)

    def _add_negatives(self, epochs: Sequence[int], samples: list[Sample], negatives: MinedNegatives) -> None:
        """Give each sample the values of its negatives. A candidate of the sample's own group is no negative; one that cannot
        be decoded, or lacks the field, is absent."""
        wanted: list[tuple[int, str, int]] = []  # (number of the sample, name of the negative, position of the candidate)
        for number, (epoch, sample) in enumerate(zip(epochs, samples, strict=True)):
            positions = negatives.draw(epoch, sample.sample_id) if not sample.error else []
            wanted += [(number, name, position) for name, position in zip(negatives.names, positions, strict=False)]
        fetched = self._fetch_many(partial(self.fetch, field=negatives.field), [position for _, _, position in wanted])
        for (number, name, position), members in zip(wanted, fetched, strict=True):
            sample, candidate = samples[number], self.make_candidate(epochs[number], position, members, negatives.field)
            if candidate.error and candidate.lost:
                sample.error, sample.lost = candidate.error, True
            elif candidate.error:
                error = f"{candidate.error} (a negative of {sample.sample_id}: left out)"
                sample.replaces += (candidate.bad | {"error": error},)
            elif negatives.field in candidate.values and candidate.group_id != sample.group_id:
                sample.values[name] = candidate.values[negatives.field]

    def collate(self, samples: list[Sample]) -> Batch | str:
        encoded_as = {name: negatives.field for negatives in self.negatives for name in negatives.names}
        modalities = self.modalities | {name: self.modalities[field] for name, field in encoded_as.items()}
        batch = collate(samples, modalities, self.views)
        return batch if isinstance(batch, str) else replace(batch, encoded_as=encoded_as)
