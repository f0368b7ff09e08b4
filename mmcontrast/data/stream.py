"""Reads tars sequentially, from their beginning to their end, through the webdataset package, where they cannot be indexed.

It promises less than the exact order: shards are drawn with replacement, each worker of each rank for itself, so no epoch
shows each sample once, batches depend on the numbers of ranks and workers, and a resumed run goes on with other samples.
"""

import logging
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

import numpy as np
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from mmcontrast.data.dataset import MAX_MEMBER_BYTES
from mmcontrast.data.decoding import Members, Sample, collate, decode_sample
from mmcontrast.data.files import expand_shards, identities, open_stream
from mmcontrast.data.ids import default_id
from mmcontrast.data.keys import FieldKeys, choices_of, member_name
from mmcontrast.data.shard import LABELS, sample_of
from mmcontrast.data.tar import MAX_NAME_BYTES
from mmcontrast.data.views import TeacherView
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError, Modality
from mmcontrast.types import Batch

MAX_REPORTED = 100  # extensions of which a warning says that no field reads them
BUFFER = 1000  # samples that a worker shuffles at a time
END_MARK = bytes(1024)
NAMES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
logger = logging.getLogger("mmcontrast")


@dataclass(frozen=True)
class StreamOrder:
    """The order of a sequential run: it has no state that a resumed run must repeat."""

    batch_size: int
    seed: int

    def state(self) -> dict[str, Any]:
        return {"sequential": True}


class StreamDataset(IterableDataset[Sample]):
    """Endless samples of shards drawn at random. Samples that cannot be decoded are left out and reported with the next; what
    is left of a shard that breaks off is lost, with a warning.

    Args:
        shards: paths, globs, brace ranges, URLs.
        modalities, keys, seed, views: as for `ShardDataset`; no embeddings that are stored.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        modalities: Mapping[str, Modality],
        keys: Mapping[str, FieldKeys],
        seed: int,
        views: Sequence[TeacherView] = (),
    ) -> None:
        self.views = views
        self.names, self.modalities, self.seed = expand_shards(shards), dict(modalities), seed
        self.identity_of = dict(zip(self.names, identities(self.names), strict=True))
        self.choices = {field: choices_of(keys.get(field) or modality.extensions) for field, modality in modalities.items()}
        self.reported: set[str] = set()  # extensions that no field reads
        self.start = self.rank = 0

    def starting(self, step: int, rank: int) -> "StreamDataset":
        """Return itself, set to the stream of a rank that begins at a step: another for each."""
        self.start, self.rank = step, rank
        return self

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        seeds = [self.seed, self.start, self.rank, worker.id if worker else 0]
        random = np.random.Generator(np.random.PCG64(seeds))
        grouped = webdataset.tariterators.group_by_keys(self._draw_members(random), sample_of, handler=_warn)
        shuffled = webdataset.filters.shuffle(BUFFER, initial=BUFFER // 2, seed=int(random.integers(2**31)))(grouped)
        skipped: list[dict[str, str]] = []
        try:
            for number, raw in enumerate(shuffled):
                bad = next((value for value in raw.values() if isinstance(value, DecodeError)), None)
                members: Members = bad or {name: value for name, value in raw.items() if not name.startswith("__")}
                default = default_id(self.identity_of[raw["__url__"]], raw["__key__"])
                seed = f"{seeds} {number}"
                sample = decode_sample(raw["__key__"], default, members, self.modalities, self.choices, seed, views=self.views)
                if sample.error and len(skipped) >= BUFFER:
                    raise UserError(f"{len(skipped)} samples in turn could not be decoded; the last: {skipped[-1]['error']}")
                if sample.error:
                    member = f", member .{sample.bad_member}" if sample.bad_member else ""
                    place = f"shard {raw['__url__']}{sample.id_in_words}, sample {raw['__key__']!r}{member}"
                    skipped.append(sample.bad | {"error": f"{place}: {sample.error}"})
                else:
                    sample.replaces, skipped = tuple(skipped), []
                    yield sample
        except UserError as error:
            yield Sample({}, 0, 0, {}, str(error), lost=True)

    def _draw_members(self, random: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Yield the members of shards drawn with replacement, one after the other.

        Raises:
            UserError: after so many shards in turn without a member that no shard can have any.
        """
        keys = [key for choices in self.choices.values() for choice in choices for key in choice]
        empty, wanted = 0, {*LABELS, *map(member_name, keys)}
        while empty < max(8, 2 * len(self.names)):
            members, name = 0, self.names[int(random.integers(len(self.names)))]
            try:
                for member in _members(name, wanted, self.reported):
                    members += 1
                    yield member
            except Exception as error:  # every file system has its own kinds
                logger.warning("%s", error if isinstance(error, UserError) else f"shard {name} breaks off: {error}")
            yield {}  # what follows belongs to other samples
            empty = 0 if members else empty + 1
        raise UserError(f"no member came of {empty} shards in turn ({', '.join(self.names[:3])} …): see the warnings")

    def collate(self, samples: list[Sample]) -> Batch | str:
        return collate(samples, self.modalities, self.views)


def _members(name: str, wanted: Collection[str], reported: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the members of a tar that have a wanted extension, as webdataset groups them. Nothing is decompressed.

    Args:
        reported: extensions of which a warning has said that they are left out; it grows to `MAX_REPORTED`.
    """
    with closing(open_stream(name)) as file:
        tail = _Tail(file)
        with tarfile.open(fileobj=cast(IO[bytes], tail), mode="r|", tarinfo=_Entry) as tar:
            for entry in tar:
                extension = sample_of(entry.name)[1]
                if entry.isreg() and extension in wanted:
                    yield {"fname": entry.name.removeprefix("./"), "data": _read_data(tar, entry), "__url__": name}
                elif extension.rpartition(".")[2] in wanted and extension not in reported and len(reported) < MAX_REPORTED:
                    reported.add(extension)
                    reason = f"no field reads .{extension}" if entry.isreg() else "it is no regular file"
                    logger.warning("shard %s: member %r is left out (%s)", name, entry.name, reason)
                tar.members = []  # type: ignore[attr-defined]  # it would grow
        while tail.read(2**20):
            pass
        if tail.last != END_MARK:
            raise EOFError("it has no end; it is truncated")


def _read_data(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes | DecodeError:
    if entry.issparse():
        return DecodeError(f"member {entry.name} is sparse: write the shard again without tar's --sparse")
    if entry.size > MAX_MEMBER_BYTES:
        return DecodeError(f"member {entry.name}: {entry.size} bytes, more than {MAX_MEMBER_BYTES}")
    file = tar.extractfile(entry)
    return file.read() if file else b""


class _Entry(tarfile.TarInfo):
    """A member's header that refuses a name of more than a name's size, which tarfile would read whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Entry":
        entry = super().frombuf(buf, encoding, errors)
        if entry.type in NAMES and entry.size > MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a name of {entry.size} bytes")
        return entry


class _Tail:
    """A stream that remembers its last bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.last = file, b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.last = (self.last + data)[-len(END_MARK) :]
        return data


def _warn(error: Exception) -> bool:
    """Log an error, and let webdataset go on."""
    logger.warning("%s", error)
    return True
