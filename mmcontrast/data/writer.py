"""Writes webdataset shards that appear only when they are complete, in parallel, with a manifest."""

import multiprocessing
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import webdataset
from rich.console import Console
from rich.progress import track

from mmcontrast.whole_files import write_json, write_whole

MANIFEST = "manifest.json"
Sample = dict[str, Any]  # "__key__" and one value per extension: bytes, str (txt) or a dict (json)


def write_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one tar under a temporary name, flush it to the disk, then rename it; return its manifest entry, with how many
    members it has of each extension."""
    members: Counter[str] = Counter()
    entry: dict[str, Any] = {"name": path.name, "samples": 0, "bytes": 0, "crc32": 0}

    def write(partial: Path) -> None:
        with partial.open("wb+") as file:
            with webdataset.TarWriter(file, mtime=0) as writer:
                for sample in samples:
                    writer.write(sample)
                    members.update(name for name in sample if not name.startswith("__"))
                    entry["samples"] += 1
            entry["bytes"] = file.tell()
            file.seek(0)
            while data := file.read(2**24):
                entry["crc32"] = zlib.crc32(data, entry["crc32"])

    write_whole(path, write)
    return entry | {"members": dict(sorted(members.items()))}


@runtime_checkable
class Source(Protocol):
    """The source of a corpus. It is sent to worker processes: keep it small, and open large files in `make_sample`."""

    def splits(self) -> dict[str, Sequence[Any]]:
        """Return per split one item per sample, in the order in which they are written."""
        ...

    def make_sample(self, split: str, item: Any) -> Sample: ...


def write_corpus(
    folder: Path,
    source: Source,
    *,
    samples_per_shard: int = 1000,
    workers: int | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make every sample of every split, write `<split>-<number>.tar`, and last `manifest.json`; return the manifest. Further
    shards that an earlier corpus of these splits left are removed.

    Args:
        folder: made if it does not exist. Shards of the same names are replaced, one by one, whole.
        workers: processes; all cores by default.
        about: further entries of the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = source.splits()
    jobs = [
        (folder / f"{split}-{number:05d}.tar", source, split, items[start : start + samples_per_shard])
        for split, items in splits.items()
        for number, start in enumerate(range(0, len(items), samples_per_shard))
    ]
    with multiprocessing.get_context("spawn").Pool(workers or os.cpu_count()) as pool:
        results = track(pool.imap(_run_job, jobs), f"writing {folder}", total=len(jobs), console=Console(stderr=True))
        entries = list(results)
    split_entries: dict[str, dict[str, Any]] = {split: {"samples": 0, "members": Counter(), "shards": []} for split in splits}
    for (_, _, split, _), entry in zip(jobs, entries, strict=True):
        split_entries[split]["samples"] += entry["samples"]
        split_entries[split]["members"].update(entry.pop("members"))
        split_entries[split]["shards"].append(entry)
    manifest = {**(about or {}), "splits": split_entries}
    for split in splits:
        names = {entry["name"] for entry in split_entries[split]["shards"]}
        for shard in folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].tar"):
            if shard.name not in names:
                shard.unlink()
    write_json(folder / MANIFEST, manifest)  # last: a corpus with a manifest is complete
    remove_partial(folder)
    return manifest


def remove_partial(folder: Path) -> None:
    """Remove the partial shards that killed processes have left, when all are there; others that write them know that."""
    for partial in folder.glob(".*.tar.*.partial"):
        partial.unlink(missing_ok=True)


def _run_job(job: tuple[Path, Source, str, Sequence[Any]]) -> dict[str, Any]:
    path, source, split, items = job
    return write_shard(path, [source.make_sample(split, item) for item in items])
