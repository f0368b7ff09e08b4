"""Random access to the samples of shards, decoded and transformed per field."""

import copy
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from rich.console import Console
from rich.progress import track

from mmcontrast.data.class_texts import FOLDER, folder_of
from mmcontrast.data.decoding import Members, Sample, decode_sample
from mmcontrast.data.files import identities, is_remote
from mmcontrast.data.held_out import Part, divide
from mmcontrast.data.ids import default_id, read_json, stable_hash
from mmcontrast.data.index import open_shards
from mmcontrast.data.keys import ENTRY, FieldKeys, choices_of, entries_of, entry_of, member_name, names_of
from mmcontrast.data.samples import Samples
from mmcontrast.data.selection import open_selection
from mmcontrast.data.shard import LABELS, NO_EXTENSION, ShardIndex
from mmcontrast.data.shard_values import ids_of_shard
from mmcontrast.data.tables import refuse_repeated_ids
from mmcontrast.data.views import StoredEmbeddings, TeacherView
from mmcontrast.errors import UserError
from mmcontrast.libraries import tell
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, Modality, TextModality

REPLACEMENTS = 16  # tried for a sample, before its error ends the run
MAX_MEMBER_BYTES = 256 * 2**20  # a member larger than this is no sample of a contrastive corpus
PROBES, MORE_PROBES = 16, 4096  # samples whose json is read to see whether it has an entry, and those that few have
logger = logging.getLogger("mmcontrast")


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
        self.pairless = ""  # why training finds no pair
        self.tolerant = bool(part and part.held_out and not training)
        self.modalities, self.seed, self.training = dict(modalities), seed, training
        self.choices = {field: choices_of(keys.get(field) or modality.extensions) for field, modality in modalities.items()}
        self.keys = {field: names_of(choices) for field, choices in self.choices.items()}
        file_columns = {key for view in views for key in view.keys.values()}
        for field, field_keys in self.keys.items():
            file_columns |= set() if isinstance(modalities[field], TextModality) else set(field_keys)
        selection = open_selection(select) if select else None
        if selection:
            self.shards = selection.of_all(open_shards(shards, True, file_columns, files, selection.of_shard))
        else:
            self.shards = open_shards(shards, True, file_columns, files)
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
        wanted = list(self.keys)
        self._check_fields(shards, partial)
        for view in views:
            for field, key in view.keys.items():
                if field in self.keys:
                    self._read_stored_width(view.modalities[field], key, shards)
            view.check_widths()
        self._warn_of_left_out_samples(shards, wanted)

    def _check_fields(self, shards: str | Sequence[str], partial: bool) -> None:
        """Leave out the fields of which no sample has a member if `partial`, else refuse them.

        Raises:
            UserError: for such a field.
        """
        members = {extension for shard in self.shards for extension in shard.extensions}
        all_keys = {key for keys in self.keys.values() for key in keys}
        members |= self._probe_entries({key for key in all_keys if key.startswith(ENTRY)}, PROBES)
        if FOLDER in all_keys and any("/" in key for shard in self.shards for key in shard.keys):
            members.add(FOLDER)
        rare = {key for keys in self.keys.values() if not members & {*keys} for key in keys if key.startswith(ENTRY)}
        number = MORE_PROBES // 16 if self.remote else MORE_PROBES
        members |= self._probe_entries(rare, number)
        for field, keys in list(self.keys.items()):
            if not members & {*keys} and partial and number < len(self) and (entries := sorted(rare & {*keys})):
                tell(f"{shards}: field {field!r} is left out: of {number} samples none has {' or '.join(entries)}")
            if not members & set(keys) and partial:
                del self.keys[field], self.choices[field], self.modalities[field]
            elif not members & set(keys):
                raise UserError(
                    f"field {field!r}: no sample of {shards} has a member {' or '.join('.' + key for key in keys)}; "
                    f"they have {', '.join('.' + name for name in sorted(members))}: set fields.{field}.keys, or drop the field"
                )

    def _read_stored_width(self, modality: Modality, key: str, shards: str | Sequence[str]) -> None:
        """Read how wide a teacher's stored embeddings are, from the first sample that has some.

        Raises:
            UserError: if none of those that are tried has.
        """
        assert isinstance(modality, StoredEmbeddings)
        for position in self._first_with(key) if member_name(key) == key else self._spread(PROBES):
            try:
                data = self.members(position, [key]).get(key)
                if data is not None:
                    modality.decode(data)
                    return
            except DecodeError:  # a bad sample is reported when it is read
                continue
        members = sorted({f".{extension}" for shard in self.shards for extension in shard.extensions})
        raise UserError(
            f"train.teacher: no sample of {shards} has a member .{key} with stored embeddings; they have {', '.join(members)}"
        )

    def _columns_of(self, kind: type[Modality]) -> list[str]:
        """Return the members that a modality is read from, in turn: those of its fields, and what it is usually read from."""
        fields = [field for field, modality in self.modalities.items() if isinstance(modality, kind)]
        named = [key for field in fields for key in self.keys[field] if not key.startswith(ENTRY)]
        return [*named, *kind.extensions, *(["filepath"] if kind is ImageModality else [])]

    def _first_with(self, member: str) -> Iterator[int]:
        """Yield the position of the first sample of each shard that has a member."""
        for shard, start in zip(self.shards, self.starts, strict=False):
            rows = np.flatnonzero(shard.has(member)) if member in shard.extensions else np.empty(0, dtype=np.int64)
            if len(rows):
                yield int(start + rows[0])

    def _spread(self, number: int) -> list[int]:
        """Return the positions of so many samples, spread over all."""
        return [int(position) for position in np.unique(np.linspace(0, len(self) - 1, number).astype(np.int64))]

    def _probe_entries(self, keys: set[str], number: int) -> set[str]:
        """Return which of these keys the json of some of so many samples has, spread over all, and all entries of those that
        were read; reading ends when each key was found."""
        entries: set[str] = set()
        for position in self._spread(number):
            if keys <= entries:
                break
            try:
                metadata = read_json(self.members(position, ["json"]).get("json", b"{}"))
            except (DecodeError, ValueError, RecursionError):
                continue
            entries |= {key for key in keys if entry_of(metadata, key) is not None} | {f"{ENTRY}{name}" for name in metadata}
        return entries

    def _warn_of_left_out_samples(self, shards: str | Sequence[str], fields: Sequence[str]) -> None:
        """Warn of samples with none of the fields, or in training a single one: of all that were asked for."""
        if os.environ.get("RANK", "0") != "0":
            return
        notes = [(shard.name, note) for shard in self.shards for note in shard.notes if NO_EXTENSION not in note]
        if notes:
            more = f"; so {len(notes) - 1} more, which `mmcontrast data verify` lists" if len(notes) > 1 else ""
            logger.warning("shard %s: %s%s", *notes[0], more)
        if not self.keys:
            return
        members = {field: {member_name(key) for key in self.keys.get(field, ())} for field in fields}
        counts, examples = [0, 0], ["", ""]  # of samples with none of the fields, and with a single one
        for shard in self.shards:
            present = np.zeros(len(shard), dtype=np.int64)
            for extensions in members.values():
                has = [shard.has(extension) for extension in extensions & set(shard.extensions)]
                present += np.any(has, axis=0) if has else FOLDER in extensions
            for number in range(min(2, len(members))):
                rows = np.flatnonzero(present == number)
                if len(rows) and not counts[number]:
                    there = ", ".join(f".{e}" for e in shard.extensions if shard.has(e)[rows[0]])
                    examples[number] = f"shard {shard.name}, {shard.describe(int(rows[0]))}, which has {there or 'nothing'}"
                counts[number] += len(rows)
        names, total = ", ".join(fields), len(self)
        if self.training and len(fields) > 1 and sum(counts) == total and not self.views:
            self.pairless = (
                f"{shards}: no sample has two of the fields {names}, so nothing can be learnt, as {examples[1] or examples[0]}:"
                " set the fields' keys, or, of a folder with a metadata.csv, give that table"
            )
        if counts[0]:
            logger.warning("%d of %d samples have none of the fields %s, as %s", counts[0], total, names, examples[0])
        if counts[1] and self.training:
            logger.warning(
                "%d of %d samples have a single one of the fields %s, so they are in no pair, as %s",
                *(counts[1], total, names, examples[1]),
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def digest(self) -> str:
        """Return the shards' digest: equal for equal samples in the same places, wherever the files are; with their names where
        the samples' ids are made of them."""
        names = [] if self._have_ids else self.identities
        text = "\0".join(["".join(shard.digest for shard in self.shards), *names])
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    @cached_property
    def _have_ids(self) -> bool:
        """Return whether samples have ids of their own, as far as the first with a json tells."""
        for number, shard in enumerate(self.shards):
            rows = np.flatnonzero(shard.has("json")) if "json" in shard.extensions else np.empty(0, dtype=np.int64)
            if len(rows):
                try:
                    metadata = read_json(self.members(int(self.starts[number] + rows[0]), ["json"])["json"])
                except (DecodeError, ValueError, RecursionError):
                    return False
                return metadata.get("sample_id") is not None
        return False

    def locate(self, position: int) -> tuple[ShardIndex, int]:
        """Return the shard of a sample, and its row in it."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.shards[number], position - int(self.starts[number])

    def shard_name(self, position: int) -> str:
        return self.locate(position)[0].name

    def evaluated(self, modalities: Mapping[str, Modality]) -> "ShardDataset":
        """Return the same samples in the same places as evaluation reads them, with some fields alone: without augmentation,
        negatives or views. One that cannot be decoded is absent from all fields.

        Args:
            modalities: the model's; where a source has one of its own, that is kept.
        """
        view = copy.copy(self)
        view.training, view.tolerant, view.negatives, view.views = False, True, (), ()
        view.modalities = {}
        for field, modality in modalities.items():
            if field in self.modalities:
                is_own = self.modalities[field] is not modality.for_training()
                view.modalities[field] = self.modalities[field] if is_own else modality
        fields = {*view.modalities, *self.templates}  # group ids are made of names of classes
        view.keys = {field: keys for field, keys in self.keys.items() if field in fields}
        view.choices = {field: choices for field, choices in self.choices.items() if field in fields}
        return view

    def key(self, position: int) -> str:
        shard, row = self.locate(position)
        return shard.keys[row]

    def sample_id(self, position: int) -> int:
        """Return a sample's id, read from its json if there is one.

        Raises:
            UserError: if the json is wrong.
        """
        shard, row = self.locate(position)
        try:
            sample = decode_sample(shard.keys[row], self.default_id(position), self.members(position, ["json"]), {}, {}, None)
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
        """Return the id of a sample that has none of its own: a hash of its shard and its name there."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return default_id(self.identities[number], self.shards[number].identity(position - int(self.starts[number])))

    def lengths(self, field: str, positions: np.ndarray) -> np.ndarray:
        """Return the bytes of a field's member, of the first of its keys that a sample has; 0 where it has none."""
        lengths = np.zeros(len(positions), dtype=np.int64)
        shard_numbers = np.searchsorted(self.starts, positions, side="right") - 1
        for number in np.unique(shard_numbers):
            in_shard = np.flatnonzero(shard_numbers == number)
            shard, rows = self.shards[number], positions[in_shard] - self.starts[number]
            for extension in reversed([member_name(key) for key in self.keys[field]]):
                if extension in shard.extensions:
                    sizes = shard.sizes_of(extension)[rows]
                    lengths[in_shard] = np.where(sizes >= 0, sizes, lengths[in_shard])
        return lengths

    def members(self, position: int, extensions: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those members that the sample has, by extension; entries of its json too.

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
        fields = self.keys if field is None else [field, *self.templates]  # of which the group id is made
        wanted = [member_name(key) for name in fields for key in self.keys.get(name, ())]
        wanted += [member_name(key) for view in self.views for key in view.keys.values()] if field is None else []
        try:
            return self._read(position, list(dict.fromkeys([*wanted, *LABELS])))
        except (DecodeError, UserError) as error:
            return error

    def make(self, epoch: int, position: int, members: Members) -> Sample:
        sample = self._decode(epoch, position, members)
        errors: list[dict[str, str]] = []
        while sample.error and not sample.lost and self.training and len(errors) < REPLACEMENTS:
            errors.append(sample.bad)
            substitute = stable_hash(f"{self.seed} {epoch} {position} {len(errors)}") % len(self)
            sample = replace(self._decode(epoch, substitute, self.fetch(substitute)), replaces=tuple(errors))
        if sample.error and not sample.lost and self.tolerant:
            sample = replace(sample, values={}, error=None, replaces=(sample.bad,))
        return sample

    def make_candidate(self, epoch: int, position: int, members: Members, field: str) -> Sample:
        return self._decode(epoch, position, members, field)

    def _decode(self, epoch: int, position: int, members: Members, field: str | None = None) -> Sample:
        """Decode a sample from its members, with all fields or one."""
        modalities = {name: modality for name, modality in self.modalities.items() if field in (None, name)}
        shard, row = self.locate(position)
        seed = f"{self.seed} {epoch}" if self.training else None
        key, default = shard.keys[row], self.default_id(position)
        views = self.views if field is None else ()
        sample = decode_sample(key, default, members, modalities, self.choices, seed, self.templates, views)
        if sample.error and not sample.lost:
            colon = ":" if sample.bad_member else ","
            sample.error = (
                f"shard {shard.name}{sample.id_in_words}, {shard.describe(row, sample.bad_member)}{colon} {sample.error}"
            )
        return sample
