"""Writes the samples that a selection keeps as new shards, in their order, each member's bytes as they are."""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.data.engines import check_engine, run_jobs
from mmcontrast.data.index import index_shard, open_shards
from mmcontrast.data.parts import ShardPart
from mmcontrast.data.selection import open_selection
from mmcontrast.data.shard import COMPOUND, KNOWN, MemberIndex, ShardIndex
from mmcontrast.data.tables import FILE_COLUMNS, TableIndex, is_table, open_table, table_behind
from mmcontrast.data.writer import MANIFEST, remove_partial, write_shard
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError
from mmcontrast.whole_files import write_json

BEGUN = "writing.json"
PATH = "filepath"  # a column of files of any kind
MEMBER_COLUMNS = KNOWN | FILE_COLUMNS


@dataclass(frozen=True)
class _Job:
    """One new shard.

    Attributes:
        parts: (number, name, rows) of the shards that its samples come from.
        renamed: their keys repeat, and get the shard's and the row's number.
    """

    path: Path
    parts: tuple[tuple[int, str, np.ndarray], ...]
    renamed: bool
    files: str | None

    def __str__(self) -> str:
        return str(self.path)


def write_selected(
    patterns: str | Sequence[str],
    folder: Path,
    select: str,
    name: str = "train",
    samples_per_shard: int = 10_000,
    files: str | None = None,
    workers: int | None = None,
    engine: str = "pool",
) -> dict[str, Any]:
    """Write `NAME-00000.tar` and so on, and last `manifest.json`; return the manifest. Shards that exist are not written again.

    Rows of a table become samples whose members are its columns of bytes, pictures, sounds and texts, by their names, and
    `json` of the rest; a file in the column `filepath` is called by its suffix. Dots in a table's keys become _. Keys that
    repeat become NNNNN-ROW-KEY, with the number of their shard.

    Raises:
        UserError: for shards or a selection that cannot be read; if the folder holds other shards of this name; as
            `check_engine` and `run_jobs`.
    """
    check_engine(engine)
    selection = open_selection(select)
    shards = selection.of_all(open_shards(patterns, True, FILE_COLUMNS, files, selection.of_shard))
    rows = [_rows_of(shard) for shard in shards]
    renamed = _keys_repeat(shards)
    jobs = _make_jobs(folder, name, shards, rows, samples_per_shard, renamed, files)
    _begin(folder, name, [shard.digest for shard in shards], samples_per_shard)
    entries = list(run_jobs(_write_job, jobs, f"writing {folder}", engine=engine, workers=workers))
    for entry in entries:
        if "error" in entry:
            raise UserError(entry["error"])
    members: Counter[str] = Counter()
    for entry in entries:
        members.update(entry.pop("members"))
    split = {"samples": sum(map(len, shards)), "members": dict(sorted(members.items())), "shards": entries}
    manifest = {"select": select, "splits": {name: split}}
    write_json(folder / MANIFEST, manifest)
    remove_partial(folder)
    return manifest


def _rows_of(shard: ShardIndex) -> np.ndarray:
    rows = shard.rows if isinstance(shard, MemberIndex | ShardPart) else None
    return np.arange(len(shard)) if rows is None else rows


def _keys_repeat(shards: Sequence[ShardIndex]) -> bool:
    """Return whether a key is that of two samples."""
    seen = set()
    for shard in shards:
        for row in range(len(shard)):
            seen.add(hash(_key_of(shard, row)))
    return len(seen) < sum(map(len, shards))


def _key_of(shard: ShardIndex, row: int) -> str:
    """Return a sample's key; without the dots of a table's, as in a tar what follows a dot is the member's name."""
    key = shard.keys[row]
    return key.replace(".", "_") if table_behind(shard) else key


def _make_jobs(
    folder: Path,
    name: str,
    shards: Sequence[ShardIndex],
    rows: Sequence[np.ndarray],
    size: int,
    renamed: bool,
    files: str | None,
) -> list[_Job]:
    jobs: list[_Job] = []
    parts: list[tuple[int, str, np.ndarray]] = []
    room = size
    for number, (shard, chosen) in enumerate(zip(shards, rows, strict=True)):
        while len(chosen):
            parts.append((number, shard.name, chosen[:room]))
            room -= len(parts[-1][2])
            chosen = chosen[len(parts[-1][2]) :]
            if not room:
                jobs.append(_Job(folder / f"{name}-{len(jobs):05d}.tar", tuple(parts), renamed, files))
                parts, room = [], size
    if parts:
        jobs.append(_Job(folder / f"{name}-{len(jobs):05d}.tar", tuple(parts), renamed, files))
    return jobs


def _begin(folder: Path, name: str, digests: Sequence[str], size: int) -> None:
    """Make the folder, or check that it holds the same shards, begun before.

    Raises:
        UserError: if it holds other shards of this name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(f"{digests} {size}".encode(), digest_size=16).hexdigest()
    begun = {"name": name, "samples": digest}
    path = folder / BEGUN
    if path.exists():
        if json.loads(path.read_text()) != begun:
            raise UserError(f"{folder} holds shards of another selection: remove it, or choose another folder")
    elif next(folder.glob(f"{name}-[0-9]*.tar"), None) or (folder / MANIFEST).exists():
        raise UserError(f"{folder} holds other shards: choose another folder")
    else:
        write_json(path, begun)


def _write_job(job: _Job) -> dict[str, Any]:
    """Write one shard, or read the one that exists; return its entry of the manifest, or what is wrong."""
    try:
        if job.path.exists():
            shard = index_shard(job.path, scan=True)
            data = job.path.read_bytes()
            entry = {"name": job.path.name, "samples": len(shard), "bytes": len(data), "crc32": zlib.crc32(data)}
            return entry | {"members": {name: int(shard.has(name).sum()) for name in shard.extensions}}
        return write_shard(job.path, _samples(job))
    except UserError as error:
        return {"error": str(error)}


def _samples(job: _Job) -> Iterator[dict[str, Any]]:
    for number, name, rows in job.parts:
        shard = _open_cached(name, job.files)
        for row in rows.tolist():
            key = f"{number:05d}-{row}-{_key_of(shard, row)}" if job.renamed else _key_of(shard, row)
            yield {"__key__": key, **_members(shard, row)}


@lru_cache(maxsize=4)
def _open_cached(name: str, files: str | None) -> ShardIndex:
    return open_table(name, FILE_COLUMNS, files) if is_table(name) else index_shard(name)


def _members(shard: ShardIndex, row: int) -> dict[str, bytes]:
    wanted = list(shard.extensions)
    if isinstance(shard, TableIndex):
        wanted = [name for name in wanted if name in MEMBER_COLUMNS or name in shard.undescribed or name == "json"]
        if wanted == ["json"]:
            raise UserError(
                f"{shard.name}: no column is a member of a tar, of {', '.join(shard.table.column_names)}: name those of files"
                " filepath, image or audio, and that of texts text"
            )
    for name in wanted:
        if not COMPOUND.fullmatch(name) or name.startswith("_") or name != name.lower():
            raise UserError(f"{shard.name}: a member cannot be called {name!r} in a tar: rename the column")
    try:
        members = shard.read(row, wanted)
        if isinstance(shard, TableIndex) and PATH in members:  # its member is called as the file
            suffix = Path(str(shard.table[PATH][row].as_py())).suffix.lower().removeprefix(".")
            if suffix in members or not COMPOUND.fullmatch(suffix):
                raise UserError(f"{shard.name}, {shard.describe(row)}: a member cannot be called {suffix!r}: rename the file")
            members[suffix] = members.pop(PATH)
        return members
    except DecodeError as error:
        raise UserError(f"{shard.name}, {shard.describe(row)}: {error}") from error
