"""`mmcontrast data verify`: every shard scanned, every member decoded, all that is wrong listed, and what was not decoded."""

import io
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from mmcontrast.data.dataset import (
    ENTRY,
    MAX_MEMBER_BYTES,
    FieldKeys,
    ShardDataset,
    entries_of,
    member_name,
    names_of,
)
from mmcontrast.data.files import expand_shards, is_remote
from mmcontrast.data.ids import ids_of, read_json, weight_of
from mmcontrast.data.index import index_shard
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
SHOWN_REPEATS = 1000  # faults of ids that repeat, of each kind


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
        return f"{self.shard}{self.where and f', {self.where}: '}{self.error}"


@dataclass(frozen=True)
class Reading:
    """How samples are read: every member whose name is known, and some more; or as training reads them.

    Attributes:
        fields: modalities.
        keys: of those fields, or of any others, whose members are decoded as what their first bytes are.
        files: the folder of files that tables name.
        as_training: read these fields alone, and transform them too.
        select: a selection: of a stage's the samples that it keeps are read alone; a list's are not looked up.
    """

    fields: Mapping[str, Modality] = field(default_factory=dict)
    keys: Mapping[str, FieldKeys] = field(default_factory=dict)
    files: str | None = None
    as_training: bool = False
    select: str | None = None

    @property
    def names(self) -> dict[str, list[str]]:
        """Per key the fields that read it."""
        names: dict[str, list[str]] = {}
        for of in dict.fromkeys([*self.fields, *self.keys]):
            keys = self.keys.get(of) or self.fields[of].extensions
            for key in names_of(keys):
                names.setdefault(key, []).append(of)
        return names


@dataclass
class Decoded:
    """What a worker says of some samples: members tried; faults; members that were not decoded, by extension; columns of
    names of files, with how many there are and how many are missing; samples without a field, and the first of them; the
    ids that samples say, and their rows."""

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


def verify_shards(
    patterns: str | Sequence[str], workers: int | None = None, progress: bool = True, reading: Reading | None = None
) -> dict[str, Any]:
    """Scans and decodes everything, in parallel; damaged shards and members are listed, not raised. Where a manifest.json lies
    beside a shard and names it, its bytes must be those that were written. No two samples may have one sample_id.

    Args:
        reading: which members are decoded, and how.

    Returns:
        {"shards": …, "samples": …, "members": …, "faults": [{"shard", "sample", "member", "where", "error"}, …],
        "notes": [what was not decoded, and how much of it, a line each]}
    """
    return _verify(patterns, reading or Reading(), workers, progress)[0]


def verify_sources(
    sources: Mapping[str, tuple[str | Sequence[str], Reading]],
    shared: Collection[str] = (),
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """`verify_shards` of several sources by name, in one report.

    Args:
        shared: sources for which the same sample_id is the same sample.
    """
    whole: dict[str, Any] = {"shards": 0, "samples": 0, "members": 0, "faults": [], "notes": []}
    seen: dict[str, np.ndarray] = {}
    for name, (patterns, reading) in sources.items():
        try:
            report, ids = _verify(patterns, reading, workers, progress)
        except UserError as error:  # no such shards
            whole["faults"].append(asdict(Fault(name, str(error))))
            continue
        report["notes"] = [f"{name}: {note}" for note in report["notes"]]
        whole = {key: value + report[key] for key, value in whole.items()}
        for other, others in seen.items() if name in shared else ():
            if count := len(np.intersect1d(ids, others)):
                whole["notes"].append(
                    f"{other} and {name}: {count} samples have the same sample_id, and are the same to training"
                    " (own_ids: true keeps a source's apart)"
                )
        if name in shared:
            seen[name] = ids
    return whole


def _verify(
    patterns: str | Sequence[str], reading: Reading, workers: int | None, progress: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """(the report, the ids that samples say)."""
    faults: list[Fault] = []
    paths, jobs, samples, notes = expand_shards(patterns), [], 0, []
    of_shards: dict[str, Decoded] = {}
    show: dict[str, Any] = {"console": Console(stderr=True), "transient": True, "disable": not progress}
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(reading,)) as pool:
        scanned = track(pool.map(_scanned, paths), "scanning", len(paths), **show)
        for path, (number, error, left_out) in zip(paths, scanned, strict=True):
            samples += number
            if error:
                faults.append(Fault(path, error))
            notes += [f"{path}: {note}" for note in left_out]
            jobs += [(path, start) for start in range(0, number, ROWS)] if path not in of_shards else []
            of_shards[path] = Decoded()
        for (path, _), found in zip(jobs, track(pool.map(_decoded, jobs), "decoding", len(jobs), **show), strict=True):
            _add(of_shards[path], found)
    faults += [fault for found in of_shards.values() for fault in found.faults] + _repeats(of_shards)
    if reading.as_training and not faults:
        faults += _refused(patterns, reading)
    report = {
        "shards": len(paths),
        "samples": samples,
        "members": sum(found.members for found in of_shards.values()),
        "faults": [asdict(fault) for fault in faults],
        "notes": [*notes, *_not_decoded(of_shards, reading)],
    }
    return report, np.array([i for found in of_shards.values() for i in found.ids], dtype=np.int64)


def _add(whole: Decoded, part: Decoded) -> None:
    whole.members += part.members
    whole.empty += part.empty
    whole.first_empty = whole.first_empty or part.first_empty
    for of in ("faults", "ids", "rows"):
        getattr(whole, of).extend(getattr(part, of))
    for of in ("untried", "named", "missing"):
        getattr(whole, of).update(getattr(part, of))


def _refused(patterns: str | Sequence[str], reading: Reading) -> list[Fault]:
    """What training would say when it opens them."""
    try:
        ShardDataset(patterns, reading.fields, reading.keys, partial=True, files=reading.files, select=reading.select)
    except UserError as error:
        return [Fault(", ".join([patterns] if isinstance(patterns, str) else patterns), str(error))]
    return []


def _not_decoded(of_shards: Mapping[str, Decoded], reading: Reading) -> list[str]:
    untried: Counter[str] = sum((found.untried for found in of_shards.values()), Counter())
    lines = [f"{count} members .{name}" for name, count in untried.most_common()]
    for path, found in of_shards.items():
        for name, count in found.named.items():
            gone = found.missing[name]
            lines.append(
                f"{path}: column {name!r} has {count} names of files, {gone} of which are not there: "
                f"--keys FIELD={name} decodes them"
            )
    if empty := sum(found.empty for found in of_shards.values()):
        first = next(f"{path}, {found.first_empty}" for path, found in of_shards.items() if found.first_empty)
        fields = " or ".join(reading.fields) if reading.as_training else "member that is known"
        lines.append(f"{empty} samples have no {fields}, as {first}")
    return lines


def _repeats(of_shards: Mapping[str, Decoded]) -> list[Fault]:
    """A fault for every sample whose id is that of one before."""
    paths = list(of_shards)
    ids = np.array([i for found in of_shards.values() for i in found.ids], dtype=np.int64)
    rows = np.array([row for found in of_shards.values() for row in found.rows], dtype=np.int64)
    shards = np.repeat(np.arange(len(paths)), [len(found.ids) for found in of_shards.values()])
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(np.diff(ids[order]) == 0) + 1
    faults, starts = [], {int(ids[order[k]]): int(order[k - 1]) for k in again[::-1]}
    for place in order[again[:SHOWN_REPEATS]].tolist():
        first = starts[int(ids[place])]
        (shard, row), (other, other_row) = ((_opened(paths[shards[k]]), int(rows[k])) for k in (place, first))
        given, others = (_given_id(*of) for of in ((shard, row), (other, other_row)))
        said = f"that of {other.name}, {other.describe(other_row)}, too"
        if str(given) == str(others):
            error = f"its sample_id {given!r} is {said}: a sample_id is one sample's; what several are about is a group_id"
        else:
            error = f"its sample_id {given!r} has the same hash as {others!r}, {said}: give one of them another"
        faults.append(Fault(shard.name, error, shard.keys[row], "json", shard.describe(row)))
    if len(again) > SHOWN_REPEATS:
        faults.append(Fault(faults[-1].shard, f"{len(again) - SHOWN_REPEATS} more samples have a sample_id of another"))
    return faults


def _given_id(shard: ShardIndex, row: int) -> Any:
    return read_json(shard.read(row, ["json"])["json"]).get("sample_id")


_reading = Reading()  # of a worker


def _start(reading: Reading) -> None:
    global _reading
    _reading = reading
    _opened.cache_clear()
    _selection.cache_clear()
    start_worker()


def _scanned(name: str) -> tuple[int, str, tuple[str, ...]]:
    """(samples, what is wrong with the shard as a whole, what is left out of it)."""
    try:
        shard = index_shard(name, scan=True)
        return len(_kept(shard)), _unlike_manifest(name), shard.notes
    except UserError as error:
        return 0, str(error), ()


def _kept(shard: ShardIndex) -> ShardIndex:
    if _reading.select and Path(_reading.select).is_dir():
        return _selection(_reading.select).of_shard(shard)
    return shard


@lru_cache(maxsize=1)
def _selection(path: str) -> Selection:
    return open_selection(path)


def _unlike_manifest(name: str) -> str:
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


def _decoded(job: tuple[str, int]) -> Decoded:
    """Of some of a shard's samples."""
    name, start = job
    shard, found, names = _opened(name), Decoded(), _reading.names
    table = shard.shard if isinstance(shard, ShardPart) else shard
    wanted = {member_name(key) for key in names}
    for row in range(start, min(start + ROWS, len(shard))):
        there = False
        for extension in shard.extensions:
            size = shard.size(row, extension)
            if size < 0:
                continue
            tried = extension in wanted or extension == "json" or (not _reading.as_training and _is_known(extension))
            if tried:
                found.members += 1
                there |= extension not in LABELS or any(key.startswith(ENTRY) for key in names)
                for error in _errors(shard, row, extension, size, found):
                    where = shard.describe(row, extension)
                    found.faults.append(Fault(name, error, shard.keys[row], extension, where))
            elif not isinstance(table, TableIndex) or extension in table.undescribed:
                found.untried[extension] += 1
            else:
                _look_for_files(table, int(shard.rows[row]) if isinstance(shard, ShardPart) else row, extension, found)
        if not there:
            found.empty += 1
            found.first_empty = found.first_empty or shard.describe(row)
    if (rows := getattr(shard, "rows", None)) is not None:  # of the whole shard, as the main process opens it
        found.rows = rows[found.rows].tolist() if found.rows else []
    return found


def _is_known(extension: str) -> bool:
    return extension.rpartition(".")[2] in {*_decoders(), *LABELS, "npy"}


def _look_for_files(shard: TableIndex, row: int, column: str, found: Decoded) -> None:
    """Counts a text that is a file's name, as far as one can tell."""
    value = shard.table[column][row].as_py()
    if isinstance(value, str) and len(value) < 1000 and "\n" not in value and PurePosixPath(value).suffix.lower() in FILES:
        found.named[column] += 1
        try:
            found.missing[column] += not (shard.folder / value).is_file()
        except (OSError, ValueError):
            found.missing[column] += 1


@lru_cache(maxsize=1)  # a worker takes a shard's jobs one after the other
def _opened(name: str) -> ShardIndex:
    if not is_table(name):
        return _kept(index_shard(name))
    texts = {key for key, of in _reading.names.items() if all(isinstance(_reading.fields.get(f), TextModality) for f in of)}
    columns = {*(() if _reading.as_training else FILE_COLUMNS), *_reading.names} - texts
    return _kept(open_table(name, columns, _reading.files))


def _errors(shard: ShardIndex, row: int, extension: str, size: int, found: Decoded) -> Iterable[str]:
    """What is wrong with a member, for each field that reads it."""
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
        if wrong := _error("json", data, None, row, found):
            return [wrong]
        try:
            about = read_json(data)
            members = entries_of(about, [key for key in _reading.names if key.startswith(ENTRY)])
        except (DecodeError, ValueError) as error:
            return [str(error)]
    for key, value in members.items():
        for of in _reading.names.get(key, [""]):
            if wrong := _error(key, value, _reading.fields.get(of), row, found):
                errors.append(f"{wrong} ({key})" if key.startswith(ENTRY) else wrong)
    return list(dict.fromkeys(errors))


def _error(extension: str, data: bytes, modality: Modality | None, row: int, found: Decoded) -> str:
    """What is wrong with a member; nothing, if only its name is unknown."""
    last = extension.rpartition(".")[2]
    try:
        if extension == "json":
            about = read_json(data)
            sample_id, _ = ids_of(about, 0)
            weight_of(about)
            if about.get("sample_id") not in (None, ""):
                found.ids.append(sample_id)
                found.rows.append(row)
        elif decoder := modality or _decoders().get(last if last != "cls" else "") or _by_first_bytes(data, last):
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


def _by_first_bytes(data: bytes, last: str) -> Modality | None:
    kind = "" if last in ("npy", "cls") else media_type(data) or ""
    return _decoders()[{"image": "png", "audio": "wav"}[kind.partition("/")[0]]] if kind else None
