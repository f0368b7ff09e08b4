"""Samples of shards, decoded and transformed per field, collated into a `Batch`."""

import copy
import hashlib
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from mmcontrast.data.class_texts import CLASS_NAME, FOLDER, class_of, folder_of, group_of, prompt_of
from mmcontrast.data.files import identities, is_remote
from mmcontrast.data.held_out import Part, divide
from mmcontrast.data.ids import default_id, ids_of, read_json, stable_hash, weight_of
from mmcontrast.data.index import open_shards
from mmcontrast.data.negatives import MinedNegatives
from mmcontrast.data.selection import ids_of_shard, open_selection
from mmcontrast.data.shard import LABELS, NO_EXTENSION, ShardIndex, member_of
from mmcontrast.data.tables import refuse_repeated_ids
from mmcontrast.data.views import StoredEmbeddings, TeacherView
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, Modality, TextModality
from mmcontrast.types import Batch

REPLACEMENTS = 16  # tried for a sample, before its error ends the run
MAX_MEMBER_BYTES = 256 * 2**20  # a member larger than this is no sample of a contrastive corpus
READERS = 16  # samples of a batch that are read at a time, where they are remote
ENTRY = "json:"  # before the name of an entry of a sample's json, which is read like a member
LOOKED_INTO = 16  # samples whose json is read to see whether it has an entry
UNREADABLE = (DecodeError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, RuntimeError)  # of one sample
Members = dict[str, bytes] | Exception  # of a sample, by extension; or why they could not be read
FieldKeys = Sequence[str | Mapping[str, float]]  # tried in turn; of several with weights one is drawn
logger = logging.getLogger("mmcontrast")


@dataclass
class Sample:
    """One sample in a worker: transformed fields, or the reason why it cannot be used.

    Attributes:
        lost: the reason lies with the storage, not with the sample: no other stands in for it.
        bad_member: where the reason lies.
        replaces: the `error` of each of those in whose place it stands, its `sample_id`, and its `source` if there are several;
            and of its negatives that cannot be decoded, which are left out.
        weight: how much it counts in the loss.
        views: fields as each teacher reads them.
    """

    values: dict[str, torch.Tensor]
    sample_id: int
    group_id: int
    metadata: dict[str, Any]
    error: str | None = None
    lost: bool = False
    bad_member: str = ""
    replaces: tuple[dict[str, str], ...] = ()
    weight: float = 1.0
    views: tuple[dict[str, torch.Tensor], ...] = ()

    @property
    def bad(self) -> dict[str, str]:
        """Return what is written down of a sample that cannot be used."""
        given = self.metadata.get("sample_id") or self.sample_id
        return {"error": str(self.error), "key": self.metadata["key"], "sample_id": str(given)}

    @property
    def id_in_words(self) -> str:
        return f", sample_id {self.metadata['sample_id']!r}" if self.metadata.get("sample_id") is not None else ""


class Samples(Dataset[Sample]):
    """Random access by position, in two steps: `fetch` the bytes, then `make` a sample of them. Bytes that come from afar are
    fetched for many samples at a time."""

    remote: bool
    modalities: dict[str, Modality]
    views: Sequence[TeacherView] = ()
    negatives: Sequence[MinedNegatives] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, position: int, field: str | None = None) -> Members:
        """Return what all fields are read from, or one."""

    @abstractmethod
    def make(self, epoch: int, position: int, members: Members) -> Sample: ...

    @abstractmethod
    def make_candidate(self, epoch: int, position: int, members: Members, field: str) -> Sample:
        """Return a sample with one field alone, or why it cannot be decoded; no other stands for it."""

    def __getitem__(self, place: int | tuple[int, int]) -> Sample:
        """The sample at (epoch, position), or at position."""
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int | tuple[int, int]]) -> list[Sample]:
        pairs = [place if isinstance(place, tuple) else (0, place) for place in places]
        fetched = self._fetched(self.fetch, [position for _, position in pairs])
        samples = [self.make(epoch, position, members) for (epoch, position), members in zip(pairs, fetched, strict=True)]
        for negatives in self.negatives:
            self._add_negatives([epoch for epoch, _ in pairs], samples, negatives)
        return samples

    def _fetched(self, fetch: Callable[[int], Members], positions: Sequence[int]) -> Iterator[Members]:
        if not self.remote:
            yield from map(fetch, positions)
            return
        with ThreadPoolExecutor(READERS) as threads:
            yield from threads.map(fetch, positions)

    def _add_negatives(self, epochs: Sequence[int], samples: list[Sample], negatives: MinedNegatives) -> None:
        """Give each sample the values of its negatives. One of the sample's own group is none; one that cannot be decoded, or
        lacks the field, is absent."""
        drawn = [negatives.draw(epoch, s.sample_id) if not s.error else [] for epoch, s in zip(epochs, samples, strict=True)]
        wanted = [(k, name, at) for k, of in enumerate(drawn) for name, at in zip(negatives.names, of, strict=False)]
        fetched = self._fetched(partial(self.fetch, field=negatives.field), [at for _, _, at in wanted])
        for (number, name, position), members in zip(wanted, fetched, strict=True):
            sample, other = samples[number], self.make_candidate(epochs[number], position, members, negatives.field)
            if other.error and other.lost:
                sample.error, sample.lost = other.error, True
            elif other.error:
                sample.replaces += (other.bad | {"error": f"{other.error} (a negative of {sample.sample_id}: left out)"},)
            elif negatives.field in other.values and other.group_id != sample.group_id:
                sample.values[name] = other.values[negatives.field]

    def collate(self, samples: list[Sample]) -> Batch | str:
        encoded_as = {name: negatives.field for negatives in self.negatives for name in negatives.names}
        modalities = self.modalities | {name: self.modalities[field] for name, field in encoded_as.items()}
        batch = collate(samples, modalities, self.views)
        return batch if isinstance(batch, str) else replace(batch, encoded_as=encoded_as)


class ShardDataset(Samples):
    """Random access to the samples of shards (tars, folders, tables), by position in the concatenated shards.

    In training a sample that cannot be decoded is replaced by another, a function of (seed, epoch, position), and reported with
    its batch; otherwise its error ends the iteration.

    A sample is its members of one key. `json` may hold `sample_id` and `group_id`, whole numbers or texts; without them the
    sample id is a hash of shard and key and the group id equals it, so that all samples are different; and `sample_weight`, how
    much the sample counts in the loss, 1 without it. `cls` is a class.

    Args:
        shards: paths, globs or brace ranges.
        modalities: per field.
        keys: per field, the extensions that are tried in turn, e.g. ("jpg", "png"); default: its modality's own. "json:caption"
            is an entry of the json, "json:captions.en" one within. Of {"json:caption": 0.7, "txt": 0.3} training draws one of
            those that a sample has, with these weights, and evaluation takes the first.
        seed: of augmentation, with the epoch and the sample's id.
        training: augment, and replace what cannot be decoded.
        partial: leave out fields of which no sample has a member, instead of refusing.
        files: of tables whose columns name files: the folder in which these are; default: the table's own.
        templates: per field whose values are names of classes, the prompts made of them: training draws one, evaluation takes
            the first. Samples of one class have one group id, so that they are no negatives of each other. The key "folder" is
            the name of the folder that a sample lies in.
        part: of the samples these alone: held out from training, or trained on. Of those held out, one that cannot be decoded
            is absent from all fields, and reported with its batch, as it does not end a training either.
        views: what teachers read beside it, in training.
        select: the folder or file of a selection (`mmcontrast.data.selection`): the samples that it keeps alone. `part` is then
            a part of these.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        modalities: Mapping[str, Modality],
        keys: Mapping[str, FieldKeys],
        seed: int = 0,
        training: bool = False,
        partial: bool = False,
        files: str | None = None,
        part: Part | None = None,
        templates: Mapping[str, Sequence[str]] | None = None,
        views: Sequence[TeacherView] = (),
        select: str | None = None,
    ) -> None:
        self.templates, self.views = dict(templates or {}), views
        self.tolerant = bool(part and part.held_out and not training)
        self.modalities, self.seed, self.training = dict(modalities), seed, training
        self.choices = {field: choices_of(keys.get(field) or modality.extensions) for field, modality in modalities.items()}
        self.keys = {field: names_of(choices) for field, choices in self.choices.items()}
        named = {e for field, of in self.keys.items() if not isinstance(modalities[field], TextModality) for e in of}
        named |= {key for view in views for key in view.keys.values()}
        selection = open_selection(select) if select else None
        if selection:
            self.shards = selection.of_all(open_shards(shards, True, named, files, selection.of_shard))
        else:
            self.shards = open_shards(shards, True, named, files)
        if part:
            refuse_repeated_ids(self.shards)
            self.shards = divide(self.shards, part, [*self._columns_of(ImageModality), *self._columns_of(AudioModality)])
        self.remote = any(is_remote(shard.name) for shard in self.shards)
        self.starts = np.cumsum([0, *map(len, self.shards)])
        self.identities = identities([shard.name for shard in self.shards])
        if not len(self):
            raise UserError(f"{shards}: no sample in {len(self.shards)} shards ({self.shards[0].name})")
        if not part:
            refuse_repeated_ids(self.shards)
        there = {extension for shard in self.shards for extension in shard.extensions}
        there |= self._entries({key for of in self.keys.values() for key in of if key.startswith(ENTRY)})
        if any(FOLDER in of for of in self.keys.values()) and any("/" in key for shard in self.shards for key in shard.keys):
            there.add(FOLDER)
        for field, extensions in list(self.keys.items()):
            if not there & set(extensions) and partial:
                del self.keys[field], self.choices[field], self.modalities[field]
            elif not there & set(extensions):
                raise UserError(
                    f"field {field!r}: no sample of {shards} has a member {' or '.join('.' + e for e in extensions)}; "
                    f"they have {', '.join('.' + e for e in sorted(there))}: set fields.{field}.keys, or drop the field"
                )
        for view in views:
            for field, key in view.keys.items():
                if field in self.keys:
                    self._look_at_stored(view.modalities[field], key, shards)
            view.check_widths()
        self._tell_what_is_left_out()

    def _look_at_stored(self, modality: Modality, key: str, shards: str | Sequence[str]) -> None:
        """Take note of how wide a teacher's stored embeddings are, from the first sample that has some.

        Raises:
            UserError: if none of those that are looked into has.
        """
        assert isinstance(modality, StoredEmbeddings)
        member, places = member_name(key), [*np.linspace(0, len(self) - 1, LOOKED_INTO).astype(np.int64).tolist()]
        if member == key:
            having = (
                start + np.flatnonzero(shard.has(key))[:1]
                for shard, start in zip(self.shards, self.starts, strict=False)
                if key in shard.extensions
            )
            places = [int(found[0]) for found in having if len(found)]
        for position in places:
            try:
                data = self.members(position, [key]).get(key)
                if data is not None:
                    modality.decode(data)
                    return
            except DecodeError:  # a bad sample is reported when it is read
                continue
        there = sorted({f".{extension}" for shard in self.shards for extension in shard.extensions})
        raise UserError(
            f"train.teacher: no sample of {shards} has a member .{key} with stored embeddings; they have {', '.join(there)}"
        )

    def _columns_of(self, kind: type[Modality]) -> list[str]:
        """Return the members that a modality is read from, in turn: those of its fields, and what it is usually read from."""
        fields = [field for field, modality in self.modalities.items() if isinstance(modality, kind)]
        named = [key for field in fields for key in self.keys[field] if not key.startswith(ENTRY)]
        return [*named, *kind.extensions, *(["filepath"] if kind is ImageModality else [])]

    def _entries(self, wanted: set[str]) -> set[str]:
        """Return the wanted entries that the json of one of a few samples has, spread over all; and all entries there."""
        found: set[str] = set()
        positions = np.unique(np.linspace(0, len(self) - 1, LOOKED_INTO).astype(np.int64)) if wanted else ()
        for position in positions:
            try:
                about = read_json(self.members(int(position), ["json"]).get("json", b"{}"))
            except (DecodeError, ValueError, RecursionError):
                continue
            found |= {key for key in wanted if entry_of(about, key) is not None} | {f"{ENTRY}{name}" for name in about}
        return found

    def _tell_what_is_left_out(self) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        notes = [(shard.name, note) for shard in self.shards for note in shard.notes if NO_EXTENSION not in note]
        if notes:
            more = f"; so {len(notes) - 1} more, which `mmcontrast data verify` lists" if len(notes) > 1 else ""
            logger.warning("shard %s: %s%s", *notes[0], more)
        if not self.keys:
            return
        count, total, example = 0, len(self), ""
        members = {member_name(key) for of in self.keys.values() for key in of}
        for shard in self.shards:
            lacking = np.ones(len(shard), dtype=bool)
            for extension in members & set(shard.extensions):
                lacking &= ~shard.has(extension)
            if lacking.any() and not count:
                row = int(lacking.argmax())
                have = ", ".join(f".{e}" for e in shard.extensions if shard.has(e)[row])
                example = f"shard {shard.name}, {shard.describe(row)}, which has {have or 'nothing'}"
            count += int(lacking.sum())
        if count:
            logger.warning("%d of %d samples have none of the fields %s, as %s", count, total, ", ".join(self.keys), example)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def digest(self) -> str:
        """Return the shards' digest: equal for equal samples in the same places, wherever the files are; with their names where
        the samples' ids are made of them."""
        names = [] if self._have_ids else self.identities
        whole = "\0".join(["".join(shard.digest for shard in self.shards), *names])
        return hashlib.blake2b(whole.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    @cached_property
    def _have_ids(self) -> bool:
        """Return whether samples say their ids, as far as the first of the first shard with a json tells."""
        for number, shard in enumerate(self.shards):
            rows = np.flatnonzero(shard.has("json")) if "json" in shard.extensions else np.empty(0, dtype=np.int64)
            if len(rows):
                try:
                    about = read_json(self.members(int(self.starts[number] + rows[0]), ["json"])["json"])
                except (DecodeError, ValueError, RecursionError):
                    return False
                return about.get("sample_id") is not None
        return False

    def locate(self, position: int) -> tuple[ShardIndex, int]:
        """(shard, row in it) of a sample."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.shards[number], position - int(self.starts[number])

    def shard_name(self, position: int) -> str:
        return self.locate(position)[0].name

    def evaluated(self, modalities: Mapping[str, Modality]) -> "ShardDataset":
        """Return the same samples in the same places as evaluation reads them, with some fields alone: without augmentation,
        negatives or views. One that cannot be decoded is absent from all fields.

        Args:
            modalities: the model's; where a source has its own, that one is kept.
        """
        view = copy.copy(self)
        view.training, view.tolerant, view.negatives, view.views = False, True, (), ()
        view.modalities = {}
        for field, modality in modalities.items():
            if field in self.modalities:
                changed = self.modalities[field] is not modality.for_training()
                view.modalities[field] = self.modalities[field] if changed else modality
        read = {*view.modalities, *self.templates}  # of names of classes the groups are made
        view.keys = {field: keys for field, keys in self.keys.items() if field in read}
        view.choices = {field: choices for field, choices in self.choices.items() if field in read}
        return view

    def key(self, position: int) -> str:
        shard, row = self.locate(position)
        return shard.keys[row]

    def sample_id(self, position: int) -> int:
        """Read from its json, if there is one.

        Raises:
            UserError: if that is wrong.
        """
        shard, row = self.locate(position)
        try:
            sample = decoded(shard.keys[row], self.default_id(position), self.members(position, ["json"]), {}, {}, None)
        except DecodeError as error:
            raise UserError(f"shard {shard.name}, {shard.describe(row)}: {error}") from error
        if sample.error:
            raise UserError(f"shard {shard.name}, {shard.describe(row)}: {sample.error}")
        return sample.sample_id

    def sample_ids(self) -> np.ndarray:
        """Return the ids of all samples, int64 [N], by position. Reads the json of each.

        Raises:
            UserError: if one is wrong.
        """
        shards = track(self.shards, "reading sample ids", console=Console(stderr=True), transient=True)
        return np.concatenate([ids_of_shard(shard, name) for shard, name in zip(shards, self.identities, strict=True)])

    def default_id(self, position: int) -> int:
        """The id of a sample that says none: of its shard and its name there."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return default_id(self.identities[number], self.shards[number].identity(position - int(self.starts[number])))

    def lengths(self, field: str, positions: np.ndarray) -> np.ndarray:
        """Bytes of a field's member, of the first of its keys that a sample has; 0 where it has none."""
        found = np.zeros(len(positions), dtype=np.int64)
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            shard, rows = self.shards[number], positions[here] - self.starts[number]
            for extension in reversed([member_name(key) for key in self.keys[field]]):
                if extension in shard.extensions:
                    sizes = shard.sizes_of(extension)[rows]
                    found[here] = np.where(sizes >= 0, sizes, found[here])
        return found

    def members(self, position: int, extensions: Sequence[str]) -> dict[str, bytes]:
        """Bytes per extension, of those that the sample has; entries of its json too.

        Raises:
            DecodeError: before anything is read, if one of them is larger than a sample's member may be; if its json is wrong.
            UserError: if they cannot be read.
        """
        members = self._read(position, [*map(member_name, extensions)])
        entries = [key for key in extensions if key.startswith(ENTRY)]
        try:
            return members | (entries_of(read_json(members["json"]), entries) if entries and "json" in members else {})
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"member .json: {error}") from error

    def _read(self, position: int, extensions: Sequence[str]) -> dict[str, bytes]:
        shard, row = self.locate(position)
        for extension in shard.extensions:
            if extension in extensions and (size := shard.size(row, extension)) > MAX_MEMBER_BYTES:
                raise DecodeError(f"member .{extension}: {size} bytes, more than {MAX_MEMBER_BYTES}")
        members = shard.read(row, extensions)
        if FOLDER in extensions and FOLDER not in shard.extensions and (name := folder_of(shard.keys[row])) is not None:
            members[FOLDER] = name
        return members

    def fetch(self, position: int, field: str | None = None) -> Members:
        fields = self.keys if field is None else [field, *self.templates]  # of which the group is made
        wanted = [member_name(key) for one in fields for key in self.keys.get(one, ())]
        wanted += [member_name(key) for view in self.views for key in view.keys.values()] if field is None else []
        try:
            return self._read(position, list(dict.fromkeys([*wanted, *LABELS])))
        except (DecodeError, UserError) as error:
            return error

    def make(self, epoch: int, position: int, members: Members) -> Sample:
        sample = self._sample(epoch, position, members)
        errors: list[dict[str, str]] = []
        while sample.error and not sample.lost and self.training and len(errors) < REPLACEMENTS:
            errors.append(sample.bad)
            other = stable_hash(f"{self.seed} {epoch} {position} {len(errors)}") % len(self)
            sample = replace(self._sample(epoch, other, self.fetch(other)), replaces=tuple(errors))
        if sample.error and not sample.lost and self.tolerant:
            sample = replace(sample, values={}, error=None, replaces=(sample.bad,))
        return sample

    def make_candidate(self, epoch: int, position: int, members: Members, field: str) -> Sample:
        return self._sample(epoch, position, members, field)

    def _sample(self, epoch: int, position: int, members: Members, field: str | None = None) -> Sample:
        """A sample of its members, with all fields or one."""
        modalities = {name: modality for name, modality in self.modalities.items() if field in (None, name)}
        shard, row = self.locate(position)
        seed = f"{self.seed} {epoch}" if self.training else None
        key, default = shard.keys[row], self.default_id(position)
        views = self.views if field is None else ()
        sample = decoded(key, default, members, modalities, self.choices, seed, self.templates, views)
        if sample.error and not sample.lost:
            where, colon = shard.describe(row, sample.bad_member), ":" if sample.bad_member else ","
            sample.error = f"shard {shard.name}{sample.id_in_words}, {where}{colon} {sample.error}"
        return sample


def decoded(
    key: str,
    default: int,
    members: Members,
    modalities: Mapping[str, Modality],
    choices: Mapping[str, Sequence[Mapping[str, float]]],
    seed: str | None,
    templates: Mapping[str, Sequence[str]] | None = None,
    views: Sequence[TeacherView] = (),
) -> Sample:
    """A sample of its members, or the first error.

    Args:
        default: its id, if it says none.
        choices: per field, the keys that are tried in turn, and of each the weights with which one is drawn.
        seed: of augmentation, with the sample's id; None: not training.
        templates: per field that holds names of classes, what its texts are made of.
        views: what teachers read of the same fields.
    """
    sample = Sample({}, default, default, {"key": key}, views=tuple({} for _ in views))
    if isinstance(members, Exception):
        return replace(sample, error=str(members), lost=isinstance(members, UserError))
    extension = "json"
    try:
        if "json" in members:
            about = read_json(members["json"])
            sample.sample_id, sample.group_id = ids_of(about, sample.sample_id)
            sample.weight = weight_of(about)
            sample.metadata = about | sample.metadata  # the key is the sample's
            stored = [key for view in views for key in view.keys.values()]
            for extension in [*(key for of in choices.values() for choice in of for key in choice), *stored]:
                members = members | (entries_of(about, [extension]) if extension.startswith(ENTRY) else {})
        if "cls" in members:
            sample.metadata.setdefault("cls", members["cls"].decode("utf-8", "replace").strip())
        for field in templates or ():
            if extension := chosen(choices.get(field, ()), members, False):
                sample.metadata[CLASS_NAME] = class_of(members[extension])
                sample.group_id = group_of(sample.metadata[CLASS_NAME])
        if seed is not None:
            torch.default_generator.manual_seed(stable_hash(f"{seed} {sample.sample_id}"))
        for field, modality in modalities.items():
            extension = chosen(choices[field], members, seed is not None)
            if not extension:
                continue
            member = members[extension]
            if templates and field in templates:
                member = prompt_of(class_of(member), templates[field], seed is not None)
            raw, drawn = modality.decode(member), torch.get_rng_state() if views else None
            value = modality.transform(raw, seed is not None)
            if value is None:
                continue
            sample.values[field] = value
            for view, read in zip(views, sample.views, strict=True):
                if field in view.modalities and drawn is not None:
                    extension = view.keys.get(field, extension)
                    read[field] = view.read(field, modality, raw, members.get(extension), drawn)
    except UNREADABLE as error:
        sample.error, sample.bad_member = str(error) or type(error).__name__, extension
    return sample


def choices_of(keys: FieldKeys) -> tuple[dict[str, float], ...]:
    return tuple({key: 1.0} if isinstance(key, str) else dict(key) for key in keys)


def names_of(keys: FieldKeys) -> tuple[str, ...]:
    """All that a field may be read from, in turn."""
    return tuple(key for choice in choices_of(keys) for key in choice)


def chosen(choices: Sequence[Mapping[str, float]], members: Mapping[str, bytes], training: bool) -> str:
    """The key that a field reads of those that a sample has, "" if it has none."""
    for choice in choices:
        there = [key for key in choice if key in members]
        if len(there) > 1 and training:
            weights = torch.tensor([choice[key] for key in there], dtype=torch.float64)
            return there[int(torch.multinomial(weights, 1))]
        if there:
            return there[0]
    return ""


def member_name(key: str) -> str:
    """The member that a field's key is read from: itself, or the json."""
    return "json" if key.startswith(ENTRY) else key


def entry_of(about: Mapping[str, Any], key: str) -> Any:
    """Return what "json:a.b" names: the entry "a.b", or the entry b of a; None if there is none."""
    name, value = key.removeprefix(ENTRY), cast(Any, about)
    if name in about:
        return about[name]
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def entries_of(about: Mapping[str, Any], keys: Iterable[str]) -> dict[str, bytes]:
    """Entries as members, without those that are empty.

    Raises:
        DecodeError: for one that is neither a text, nor a list of texts or of numbers.
    """
    found = {key: member_of(entry_of(about, key)) for key in keys}
    return {key: data for key, data in found.items() if data}


def collate(samples: list[Sample], modalities: Mapping[str, Modality], views: Sequence[TeacherView] = ()) -> Batch | str:
    """The batch, or the first bad sample's error: workers cannot raise it in one line."""
    for sample in samples:
        if sample.error and sample.lost:
            return f"{sample.error}. When it can be read again, --resume continues the run"
        if sample.error:
            return f"{sample.error}; repair or remove the sample (`mmcontrast data verify` finds all of them)"
    ids = torch.tensor([s.sample_id for s in samples]), torch.tensor([s.group_id for s in samples])
    return Batch(
        *stacked([s.values for s in samples], modalities),
        *ids,
        [s.metadata for s in samples],
        [dict(bad) for s in samples for bad in s.replaces],
        torch.tensor([s.weight for s in samples]),
        [Batch(*stacked([s.views[k] for s in samples], view.modalities), *ids, []) for k, view in enumerate(views)],
    )


def stacked(
    samples: Sequence[Mapping[str, torch.Tensor]], modalities: Mapping[str, Modality]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the values of a batch, and who has them."""
    values = {}
    for field, modality in modalities.items():
        rows = [sample[field] for sample in samples if field in sample]
        values[field] = modality.collate(rows or [modality.blank()])
    return values, {field: torch.tensor([field in sample for sample in samples]) for field in modalities}
