"""Verifies shards in a worker process of `mmcontrast data verify`: scans a shard, and decodes every member of its samples."""

import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from mmcontrast.data.dataset import MAX_MEMBER_BYTES
from mmcontrast.data.files import is_remote
from mmcontrast.data.ids import ids_of, read_json, weight_of
from mmcontrast.data.index import index_shard
from mmcontrast.data.keys import ENTRY, FieldKeys, entries_of, member_name, names_of
from mmcontrast.data.loading import start_worker
from mmcontrast.data.page import media_type
from mmcontrast.data.parts import ShardPart
from mmcontrast.data.selection import Selection, open_selection
from mmcontrast.data.shard import LABELS, ShardIndex
from mmcontrast.data.tables import FILE_COLUMNS, TableIndex, is_table, open_table
from mmcontrast.data.writer import MANIFEST
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, Modality, TextModality

ROWS = 256  # samples a worker takes at a time
OTHER_FILES = {".npy", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".mp4", ".m4a", ".opus", ".dat"}  # that a column may name
FILES = OTHER_FILES | {f".{extension}" for kind in (ImageModality, AudioModality) for extension in kind.extensions}


@dataclass(frozen=True)
class Fault:
    """A fault of a shard, or of a member of one of its samples.

    Attributes:
        where: the sample and its member, with row or path, as a person finds them.
    """

    shard: str
    error: str
    sample: str = ""
    member: str = ""
    where: str = ""

    def __str__(self) -> str:
        if not self.where:
            return self.error if self.error.startswith(self.shard) else f"{self.shard}: {self.error}"
        return f"{self.shard}, {self.where}: {self.error}"


@dataclass(frozen=True)
class Reading:
    """The way samples are read: every member whose name is known, and some more; or as training reads them.

    Attributes:
        fields: modalities.
        keys: of those fields, or of any others, whose members are decoded by their first bytes.
        files: the folder of files that tables name.
        as_training: read these fields alone, and transform them too.
        select: a selection: only the samples that a stage's keeps are read; a list is not applied.
    """

    fields: Mapping[str, Modality] = field(default_factory=dict)
    keys: Mapping[str, FieldKeys] = field(default_factory=dict)
    files: str | None = None
    as_training: bool = False
    select: str | None = None

    @property
    def names(self) -> dict[str, list[str]]:
        """Return per key the fields that read it."""
        names: dict[str, list[str]] = {}
        for field_name in dict.fromkeys([*self.fields, *self.keys]):
            for key in names_of(self.keys.get(field_name) or self.fields[field_name].extensions):
                names.setdefault(key, []).append(field_name)
        return names


@dataclass
class Decoded:
    """The findings of a worker in some samples.

    Attributes:
        members: how many were decoded.
        untried: members that were not decoded, by extension.
        named, missing: names of files in each column, and how many of the files are missing.
        empty, first_empty: how many samples have no field, and the first of them.
        ids, rows: the ids in the json of samples, and these samples' rows.
    """

    members: int = 0
    faults: list[Fault] = field(default_factory=list)
    untried: Counter[str] = field(default_factory=Counter)
    named: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    first_empty: str = ""
    ids: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@cache
def _decoders() -> dict[str, Modality]:
    decoders: tuple[Modality, ...] = (ImageModality(size=224), TextModality(), AudioModality())
    return {extension: modality for modality in decoders for extension in modality.extensions}


_reading = Reading()  # of a worker


def start_verifying(reading: Reading) -> None:
    global _reading
    _reading = reading
    open_shard.cache_clear()
    _selection.cache_clear()
    start_worker()


def scan_shard(name: str) -> tuple[int, str, tuple[str, ...]]:
    """Scan a shard; return its number of samples, what is wrong with it as a whole, and what is left out of it."""
    try:
        shard = index_shard(name, scan=True)
        return len(_select(shard)), _manifest_error(name), shard.notes
    except UserError as error:
        return 0, str(error), ()


def _select(shard: ShardIndex) -> ShardIndex:
    """Return a shard with the samples that a stage's selection keeps alone, if the reading has one."""
    if _reading.select and Path(_reading.select).is_dir():
        return _selection(_reading.select).of_shard(shard)
    return shard


@lru_cache(maxsize=1)
def _selection(path: str) -> Selection:
    return open_selection(path)


def _manifest_error(name: str) -> str:
    """Return how a shard differs from the manifest beside it, "" if it does not."""
    path = Path(name)
    if is_remote(name) or path.is_dir():
        return ""
    try:
        manifest = json.loads((path.parent / MANIFEST).read_text())
        entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
        written = {entry["name"]: (entry["bytes"], entry["crc32"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # none, or not ours
    if path.name not in written:
        return f"shard {path} is not named in the {MANIFEST} beside it: left from another corpus, or the manifest is not whole"
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(2**24):
            checksum = zlib.crc32(data, checksum)
    if (path.stat().st_size, checksum) == written[path.name]:
        return ""
    return f"shard {path} is not as it was written: {MANIFEST} has other bytes for it; build or copy it again"


def decode_rows(job: tuple[str, int]) -> Decoded:
    """Decode the members of `ROWS` samples of a shard, from the row of the job on."""
    name, start = job
    shard, result, names = open_shard(name), Decoded(), _reading.names
    table = shard.shard if isinstance(shard, ShardPart) else shard
    wanted = {member_name(key) for key in names}
    for row in range(start, min(start + ROWS, len(shard))):
        has_field = False
        for extension in shard.extensions:
            size = shard.size(row, extension)
            if size < 0:
                continue
            is_read = extension in wanted or extension == "json" or (not _reading.as_training and _is_known(extension))
            if is_read:
                result.members += 1
                has_field |= extension not in LABELS or any(key.startswith(ENTRY) for key in names)
                for error in _member_errors(shard, row, extension, size, result):
                    where = shard.describe(row, extension)
                    result.faults.append(Fault(name, error, shard.keys[row], extension, where))
            elif not isinstance(table, TableIndex) or extension in table.undescribed:
                result.untried[extension] += 1
            else:
                _count_file_names(table, int(shard.rows[row]) if isinstance(shard, ShardPart) else row, extension, result)
        if not has_field:
            result.empty += 1
            result.first_empty = result.first_empty or shard.describe(row)
    if (rows := getattr(shard, "rows", None)) is not None:  # of the whole shard, as the main process opens it
        result.rows = rows[result.rows].tolist() if result.rows else []
    return result


def _is_known(extension: str) -> bool:
    return extension.rpartition(".")[2] in {*_decoders(), *LABELS, "npy"}


def _count_file_names(shard: TableIndex, row: int, column: str, result: Decoded) -> None:
    """Count a text that looks like a file's name, and whether the file is missing."""
    value = shard.table[column][row].as_py()
    if isinstance(value, str) and len(value) < 1000 and "\n" not in value and PurePosixPath(value).suffix.lower() in FILES:
        result.named[column] += 1
        try:
            result.missing[column] += not (shard.folder / value).is_file()
        except (OSError, ValueError):
            result.missing[column] += 1


@lru_cache(maxsize=1)  # a worker takes a shard's jobs one after the other
def open_shard(name: str) -> ShardIndex:
    if not is_table(name):
        return _select(index_shard(name))
    columns = set() if _reading.as_training else {*FILE_COLUMNS}
    for key, field_names in _reading.names.items():
        if all(isinstance(_reading.fields.get(name), TextModality) for name in field_names):
            columns.discard(key)
        else:
            columns.add(key)
    return _select(open_table(name, columns, _reading.files))


def _member_errors(shard: ShardIndex, row: int, extension: str, size: int, result: Decoded) -> Iterable[str]:
    """Return what is wrong with a member, for each field that reads it."""
    if size > MAX_MEMBER_BYTES:
        return [f"more than {MAX_MEMBER_BYTES} bytes"]
    try:
        data = shard.read(row, [extension]).get(extension)
    except (DecodeError, UserError) as error:
        return [str(error)]
    if data is None:  # of a table: a list of nothing
        return []
    members, errors = {extension: data}, []
    if extension == "json":
        if problem := _decode_error("json", data, None, row, result):
            return [problem]
        try:
            metadata = read_json(data)
            members = entries_of(metadata, [key for key in _reading.names if key.startswith(ENTRY)])
        except (DecodeError, ValueError) as error:
            return [str(error)]
    for key, value in members.items():
        for field_name in _reading.names.get(key, [""]):
            if problem := _decode_error(key, value, _reading.fields.get(field_name), row, result):
                errors.append(f"{problem} ({key})" if key.startswith(ENTRY) else problem)
    return list(dict.fromkeys(errors))


def _decode_error(extension: str, data: bytes, modality: Modality | None, row: int, result: Decoded) -> str:
    """Return what is wrong with a member, "" if nothing is."""
    last = extension.rpartition(".")[2]
    try:
        if extension == "json":
            metadata = read_json(data)
            sample_id, _ = ids_of(metadata, 0)
            weight_of(metadata)
            if metadata.get("sample_id") not in (None, ""):
                result.ids.append(sample_id)
                result.rows.append(row)
        elif decoder := modality or _decoders().get(last if last != "cls" else "") or _guess_modality(data, last):
            value = decoder.decode(data)
            if _reading.as_training:
                decoder.transform(value, False)
            return decoder.suspicious(value) or ""
        elif last == "npy":
            np.load(io.BytesIO(data), allow_pickle=False)
        elif last != "cls":
            return (
                f"neither a picture nor a sound by its first bytes: say what it is (--keys image={extension}, audio=…, text=…)"
            )
    except (DecodeError, UserError) as error:
        return str(error)
    except (ValueError, TypeError, EOFError, MemoryError, RuntimeError) as error:
        return f"not an array as it should be ({error or type(error).__name__})"
    return ""


def _guess_modality(data: bytes, last: str) -> Modality | None:
    """Return the modality of a picture or a sound by its first bytes."""
    kind = "" if last in ("npy", "cls") else media_type(data) or ""
    return _decoders()[{"image": "png", "audio": "wav"}[kind.partition("/")[0]]] if kind else None
