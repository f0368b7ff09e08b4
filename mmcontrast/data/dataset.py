"""Samples of shards, decoded and transformed per field, collated into a `Batch`."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mmcontrast.data.files import is_remote
from mmcontrast.data.index import open_shards
from mmcontrast.data.shard import ShardIndex
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError, Modality, TextModality
from mmcontrast.types import Batch

REPLACEMENTS = 16  # tried for a sample, before its error ends the run
MAX_MEMBER_BYTES = 256 * 2**20  # a member larger than this is no sample of a contrastive corpus
LABELS = ("json", "cls")  # members that say what a sample is, or of which class
READERS = 16  # samples of a batch that are read at a time, where they are remote
UNREADABLE = (DecodeError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, RuntimeError)  # of one sample
Members = dict[str, bytes] | Exception  # of a sample, by extension; or why they could not be read


@dataclass
class Sample:
    """One sample in a worker: transformed fields, or the reason why it cannot be used.

    Attributes:
        lost: the reason lies with the storage, not with the sample: no other stands in for it.
        replaces: the `error` of each of those in whose place it stands, and its `source` if there are several.
    """

    values: dict[str, torch.Tensor]
    sample_id: int
    group_id: int
    metadata: dict[str, Any]
    error: str | None = None
    lost: bool = False
    replaces: tuple[dict[str, str], ...] = ()


class Samples(Dataset[Sample]):
    """Random access by position, in two steps: `fetch` the bytes, then `make` a sample of them. Bytes that come from afar are
    fetched for many samples at a time."""

    remote: bool
    modalities: dict[str, Modality]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, position: int) -> Members: ...

    @abstractmethod
    def make(self, epoch: int, position: int, members: Members) -> Sample: ...

    def __getitem__(self, place: int | tuple[int, int]) -> Sample:
        """The sample at (epoch, position), or at position."""
        epoch, position = place if isinstance(place, tuple) else (0, place)
        return self.make(epoch, position, self.fetch(position))

    def __getitems__(self, places: Sequence[int | tuple[int, int]]) -> list[Sample]:
        if not self.remote:
            return [self[place] for place in places]
        pairs = [place if isinstance(place, tuple) else (0, place) for place in places]
        with ThreadPoolExecutor(READERS) as threads:
            fetched = threads.map(self.fetch, [position for _, position in pairs])
            return [self.make(epoch, position, members) for (epoch, position), members in zip(pairs, fetched, strict=True)]

    def collate(self, samples: list[Sample]) -> Batch | str:
        return collate(samples, self.modalities)


class ShardDataset(Samples):
    """Random access to the samples of shards (tars, folders, tables), by position in the concatenated shards.

    In training a sample that cannot be decoded is replaced by another, a function of (seed, epoch, position), and reported with
    its batch; otherwise its error ends the iteration.

    A sample is its members of one key. `json` may hold `sample_id` and `group_id`; without them the sample id is a hash
    of the key and the group id equals it, so that all samples are different. `cls` is a class.

    Args:
        shards: paths, globs or brace ranges.
        modalities: per field.
        keys: per field, the extensions that are tried in turn, e.g. ("jpg", "png"); default: its modality's own.
        seed: of augmentation, with the epoch and the sample's id.
        training: augment, and replace what cannot be decoded.
        partial: leave out fields of which no sample has a member, instead of refusing.
        files: of tables whose columns name files: the folder in which these are; default: the table's own.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        modalities: Mapping[str, Modality],
        keys: Mapping[str, Sequence[str]],
        seed: int = 0,
        training: bool = False,
        partial: bool = False,
        files: str | None = None,
    ) -> None:
        self.modalities, self.seed, self.training = dict(modalities), seed, training
        self.keys = {field: tuple(keys.get(field) or modality.extensions) for field, modality in modalities.items()}
        named = {e for field, of in self.keys.items() if not isinstance(modalities[field], TextModality) for e in of}
        self.shards: list[ShardIndex] = open_shards(shards, True, named, files)
        self.remote = any(is_remote(shard.name) for shard in self.shards)
        self.starts = np.cumsum([0, *map(len, self.shards)])
        there = {extension for shard in self.shards for extension in shard.extensions}
        for field, extensions in list(self.keys.items()):
            if not there & set(extensions) and partial:
                del self.keys[field], self.modalities[field]
            elif not there & set(extensions):
                raise UserError(
                    f"field {field!r}: no sample of {shards} has a member {' or '.join('.' + e for e in extensions)}; "
                    f"they have {', '.join('.' + e for e in sorted(there))}: set fields.{field}.keys, or drop the field"
                )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def digest(self) -> str:
        """Of the shards: equal for equal samples in the same places, wherever the files are."""
        return hashlib.blake2b("".join(shard.digest for shard in self.shards).encode(), digest_size=8).hexdigest()

    def locate(self, position: int) -> tuple[ShardIndex, int]:
        """(shard, row in it) of a sample."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.shards[number], position - int(self.starts[number])

    def key(self, position: int) -> str:
        shard, row = self.locate(position)
        return shard.keys[row]

    def sample_id(self, position: int) -> int:
        """Read from its json, if there is one.

        Raises:
            UserError: if that is wrong.
        """
        key = self.key(position)
        try:
            sample = decoded(key, self.members(position, ["json"]), {}, {}, None)
        except DecodeError as error:
            raise UserError(f"sample {key!r}: {error}") from error
        if sample.error:
            raise UserError(f"sample {key!r}: {sample.error}")
        return sample.sample_id

    def lengths(self, field: str, positions: np.ndarray) -> np.ndarray:
        """Bytes of a field's member, of the first of its keys that a sample has; 0 where it has none."""
        found = np.zeros(len(positions), dtype=np.int64)
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            shard, rows = self.shards[number], positions[here] - self.starts[number]
            for extension in reversed(self.keys[field]):
                if extension in shard.extensions:
                    sizes = shard.sizes_of(extension)[rows]
                    found[here] = np.where(sizes >= 0, sizes, found[here])
        return found

    def members(self, position: int, extensions: Sequence[str]) -> dict[str, bytes]:
        """Bytes per extension, of those that the sample has.

        Raises:
            DecodeError: before anything is read, if one of them is larger than a sample's member may be.
            UserError: if they cannot be read.
        """
        shard, row = self.locate(position)
        for extension in shard.extensions:
            if extension in extensions and (size := shard.size(row, extension)) > MAX_MEMBER_BYTES:
                raise DecodeError(f"member .{extension}: {size} bytes, more than {MAX_MEMBER_BYTES}")
        return shard.read(row, extensions)

    def fetch(self, position: int) -> Members:
        wanted = [extension for extensions in self.keys.values() for extension in extensions]
        try:
            return self.members(position, [*wanted, *LABELS])
        except (DecodeError, UserError) as error:
            return error

    def make(self, epoch: int, position: int, members: Members) -> Sample:
        sample = self._sample(epoch, position, members)
        errors: list[dict[str, str]] = []
        while sample.error and not sample.lost and self.training and len(errors) < REPLACEMENTS:
            errors.append({"error": sample.error})
            other = stable_hash(f"{self.seed} {epoch} {position} {len(errors)}") % len(self)
            sample = replace(self._sample(epoch, other, self.fetch(other)), replaces=tuple(errors))
        return sample

    def _sample(self, epoch: int, position: int, members: Members) -> Sample:
        shard, row = self.locate(position)
        seed = f"{self.seed} {epoch}" if self.training else None
        sample = decoded(shard.keys[row], members, self.modalities, self.keys, seed)
        if sample.error and not sample.lost:
            sample.error = f"shard {shard.name}, sample {shard.keys[row]!r}, {sample.error}"
        return sample


def decoded(
    key: str, members: Members, modalities: Mapping[str, Modality], keys: Mapping[str, Sequence[str]], seed: str | None
) -> Sample:
    """A sample of its members, or the first error.

    Args:
        seed: of augmentation, with the sample's id; None: not training.
    """
    sample = Sample({}, stable_hash(key), stable_hash(key), {"key": key})
    if isinstance(members, Exception):
        return replace(sample, error=str(members), lost=isinstance(members, UserError))
    extension = "json"
    try:
        if "json" in members:
            about = json.loads(members["json"])
            sample.sample_id, sample.group_id = ids_of(about, sample.sample_id)
            sample.metadata = about | sample.metadata  # the key is the sample's
        if "cls" in members:
            sample.metadata.setdefault("cls", members["cls"].decode("utf-8", "replace").strip())
        if seed is not None:
            torch.default_generator.manual_seed(stable_hash(f"{seed} {sample.sample_id}"))
        for field, modality in modalities.items():
            extension = next((e for e in keys[field] if e in members), "")
            if extension:
                value = modality.transform(modality.decode(members[extension]), seed is not None)
                if value is not None:
                    sample.values[field] = value
    except UNREADABLE as error:
        sample.error = f"member .{extension}: {error or type(error).__name__}"
    return sample


def ids_of(about: Any, default: int) -> tuple[int, int]:
    """(sample id, group id) of what a json member says.

    Raises:
        DecodeError: if it cannot be so.
    """
    if not isinstance(about, dict):
        raise DecodeError(f"a JSON {type(about).__name__}, not an object")
    try:
        sample_id = int(about.get("sample_id", default))
        group_id = int(about.get("group_id", sample_id))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DecodeError(f"not JSON as it should be ({error})") from error
    if group_id < 0:
        raise DecodeError(f"group_id {group_id} is negative")
    if max(abs(sample_id), group_id) >= 2**63:
        raise DecodeError(f"sample_id {sample_id}, group_id {group_id}: beyond 64 bits")
    return sample_id, group_id


def collate(samples: list[Sample], modalities: Mapping[str, Modality]) -> Batch | str:
    """The batch, or the first bad sample's error: workers cannot raise it in one line."""
    for sample in samples:
        if sample.error and sample.lost:
            return f"{sample.error}. When it can be read again, --resume continues the run"
        if sample.error:
            return f"{sample.error}; repair or remove the sample (`mmcontrast data verify` finds all of them)"
    values = {}
    for field, modality in modalities.items():
        rows = [s.values[field] for s in samples if field in s.values]
        values[field] = modality.collate(rows or [modality.blank()])
    return Batch(
        values,
        {field: torch.tensor([field in s.values for s in samples]) for field in modalities},
        torch.tensor([s.sample_id for s in samples]),
        torch.tensor([s.group_id for s in samples]),
        [s.metadata for s in samples],
        [dict(bad) for s in samples for bad in s.replaces],
    )


def stable_hash(text: str) -> int:
    """A stable id in [0, 2^63)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1
