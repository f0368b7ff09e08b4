"""`mmcontrast data verify`: every shard scanned, every member decoded, all that is wrong listed."""

import io
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from mmcontrast.data.dataset import MAX_MEMBER_BYTES, ids_of
from mmcontrast.data.files import expand_shards, is_remote
from mmcontrast.data.index import index_shard
from mmcontrast.data.loading import start_worker
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.writer import MANIFEST
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, Modality, TextModality

ROWS = 256  # samples a worker takes at a time


@dataclass(frozen=True)
class Fault:
    """What is wrong with a shard, or with a member of one of its samples."""

    shard: str
    error: str
    sample: str = ""
    member: str = ""

    def __str__(self) -> str:
        return f"{self.shard}{self.sample and f', sample {self.sample!r}, member .{self.member}: '}{self.error}"


@cache
def _decoders() -> dict[str, Modality]:
    decoders: tuple[Modality, ...] = (ImageModality(size=224), TextModality(), AudioModality())
    return {extension: modality for modality in decoders for extension in modality.extensions}


def verify_shards(patterns: str | Sequence[str], workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Scans and decodes everything, in parallel; damaged shards and members are listed, not raised. Where a manifest.json lies
    beside a shard and names it, its bytes must be those that were written.

    Returns:
        {"shards": …, "samples": …, "members": …, "faults": [{"shard", "sample", "member", "error"}, …]}
    """
    faults, jobs, samples, members = [], [], 0, 0
    paths = expand_shards(patterns)
    show: dict[str, Any] = {"console": Console(stderr=True), "transient": True, "disable": not progress}
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        for path, (number, error) in zip(paths, track(pool.map(_scanned, paths), "scanning", len(paths), **show), strict=True):
            samples += number
            if error:
                faults.append(Fault(path, error))
            jobs += [(path, start) for start in range(0, number, ROWS)]
        for count, found in track(pool.map(_decoded, jobs), "decoding", len(jobs), **show):
            members += count
            faults += found
    return {"shards": len(paths), "samples": samples, "members": members, "faults": [asdict(fault) for fault in faults]}


def _scanned(name: str) -> tuple[int, str]:
    """(samples, what is wrong with the shard as a whole)."""
    try:
        return len(index_shard(name, scan=True)), _unlike_manifest(name)
    except UserError as error:
        return 0, str(error)


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


def _decoded(job: tuple[str, int]) -> tuple[int, list[Fault]]:
    """(members tried, faults) of some of a shard's samples."""
    name, start = job
    shard, faults, tried = _opened(name), [], 0
    for row in range(start, min(start + ROWS, len(shard))):
        for extension in shard.extensions:
            size = shard.size(row, extension)
            if size >= 0:
                tried += 1
                if error := _error(shard, row, extension, size):
                    faults.append(Fault(name, error, shard.keys[row], extension))
    return tried, faults


_opened = lru_cache(maxsize=1)(index_shard)  # a worker takes a shard's jobs one after the other


def _error(shard: ShardIndex, row: int, extension: str, size: int) -> str:
    """What is wrong with a member; nothing, if only its name is unknown."""
    if size > MAX_MEMBER_BYTES:
        return f"more than {MAX_MEMBER_BYTES} bytes"
    try:
        data = shard.read(row, [extension]).get(extension)
        if data is None:  # of a table: a list of nothing
            return ""
        if extension == "json":
            ids_of(json.loads(data), 0)
        elif extension.rpartition(".")[2] == "npy":
            np.load(io.BytesIO(data), allow_pickle=False)
        elif decoder := _decoders().get(extension.rpartition(".")[2]):
            return decoder.suspicious(decoder.decode(data)) or ""
    except (DecodeError, UserError) as error:
        return str(error)
    except (ValueError, TypeError, EOFError, MemoryError, RuntimeError) as error:
        kind = "JSON" if extension == "json" else "an array"
        return f"not {kind} as it should be ({error or type(error).__name__})"
    return ""
