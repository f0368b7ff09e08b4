"""`mmcontrast data verify`: scans every shard, decodes every member, and reports all faults and what was not decoded."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.files import expand_shards
from mmcontrast.data.ids import read_json
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.verify_worker import ROWS, Decoded, Fault, Reading, decode_rows, open_shard, scan_shard, start_verifying
from mmcontrast.errors import UserError

SHOWN_REPEATS = 1000  # faults of ids that repeat, of each kind


def verify_shards(
    patterns: str | Sequence[str], workers: int | None = None, progress: bool = True, reading: Reading | None = None
) -> dict[str, Any]:
    """Scan and decode everything, in parallel; damaged shards and members are listed, not raised. Where a manifest.json lies
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
    """Verify several sources by name, as `verify_shards`, in one report.

    Args:
        shared: sources for which the same sample_id is the same sample.
    """
    total: dict[str, Any] = {"shards": 0, "samples": 0, "members": 0, "faults": [], "notes": []}
    seen: dict[str, np.ndarray] = {}
    for name, (patterns, reading) in sources.items():
        try:
            report, ids = _verify(patterns, reading, workers, progress)
        except UserError as error:  # no such shards
            total["faults"].append(asdict(Fault(name, str(error))))
            continue
        report["notes"] = [f"{name}: {note}" for note in report["notes"]]
        total = {key: value + report[key] for key, value in total.items()}
        for other, other_ids in seen.items() if name in shared else ():
            if count := len(np.intersect1d(ids, other_ids)):
                total["notes"].append(
                    f"{other} and {name}: {count} samples have the same sample_id, and are the same to training"
                    " (own_ids: true keeps a source's apart)"
                )
        if name in shared:
            seen[name] = ids
    return total


def _verify(
    patterns: str | Sequence[str], reading: Reading, workers: int | None, progress: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the report, and the ids that samples have in their json."""
    faults: list[Fault] = []
    paths, jobs, samples, notes = expand_shards(patterns), [], 0, []
    results: dict[str, Decoded] = {}
    bar_options: dict[str, Any] = {"console": Console(stderr=True), "transient": True, "disable": not progress}
    with ProcessPoolExecutor(workers, initializer=start_verifying, initargs=(reading,)) as pool:
        scanned = track(pool.map(scan_shard, paths), "scanning", len(paths), **bar_options)
        for path, (samples_of_shard, error, shard_notes) in zip(paths, scanned, strict=True):
            samples += samples_of_shard
            if error:
                faults.append(Fault(path, error))
            notes += [f"{path}: {note}" for note in shard_notes]
            jobs += [(path, start) for start in range(0, samples_of_shard, ROWS)] if path not in results else []
            results[path] = Decoded()
        decoded = track(pool.map(decode_rows, jobs), "decoding", len(jobs), **bar_options)
        for (path, _), result in zip(jobs, decoded, strict=True):
            _merge(results[path], result)
    faults += [fault for result in results.values() for fault in result.faults] + _repeated_ids(results)
    faults += _missing_files(results)
    if reading.as_training and not faults:
        faults += _training_faults(patterns, reading)
    report = {
        "shards": len(paths),
        "samples": samples,
        "members": sum(result.members for result in results.values()),
        "faults": [asdict(fault) for fault in faults],
        "notes": [*notes, *_undecoded_notes(results, reading)],
    }
    return report, np.array([i for result in results.values() for i in result.ids], dtype=np.int64)


def _merge(total: Decoded, part: Decoded) -> None:
    """Add what a worker found in some samples to a shard's."""
    total.members += part.members
    total.empty += part.empty
    total.first_empty = total.first_empty or part.first_empty
    for name in ("faults", "ids", "rows"):
        getattr(total, name).extend(getattr(part, name))
    for name in ("untried", "named", "missing"):
        getattr(total, name).update(getattr(part, name))


def _training_faults(patterns: str | Sequence[str], reading: Reading) -> list[Fault]:
    """Return the error with which training would refuse the shards, as a fault."""
    try:
        ShardDataset(patterns, reading.fields, reading.keys, partial=True, files=reading.files, select=reading.select)
    except UserError as error:
        return [Fault(", ".join([patterns] if isinstance(patterns, str) else patterns), str(error))]
    return []


def _missing_files(results: Mapping[str, Decoded]) -> list[Fault]:
    """Return a fault for each column that names files that are not there, and was not decoded."""
    return [
        Fault(path, f"column {name!r} names {count} files, {missing} of which are missing: --keys FIELD={name} says which")
        for path, result in results.items()
        for name, count in result.named.items()
        if (missing := result.missing[name])
    ]


def _undecoded_notes(results: Mapping[str, Decoded], reading: Reading) -> list[str]:
    """Return a line for each kind of member, column or sample that was not decoded."""
    untried: Counter[str] = sum((result.untried for result in results.values()), Counter())
    lines = [f"{count} members .{name}" for name, count in untried.most_common()]
    for path, result in results.items():
        for name, count in result.named.items():
            lines.append(f"{path}: column {name!r} names {count} files, which were not read: add --keys FIELD={name}")
    if empty := sum(result.empty for result in results.values()):
        first = next(f"{path}, {result.first_empty}" for path, result in results.items() if result.first_empty)
        fields = " or ".join(reading.fields) if reading.as_training else "member that is known"
        lines.append(f"{empty} samples have no {fields}, as {first}")
    return lines


def _repeated_ids(results: Mapping[str, Decoded]) -> list[Fault]:
    """Return a fault for every sample whose id is that of one before."""
    paths = list(results)
    ids = np.array([i for result in results.values() for i in result.ids], dtype=np.int64)
    rows = np.array([row for result in results.values() for row in result.rows], dtype=np.int64)
    shards = np.repeat(np.arange(len(paths)), [len(result.ids) for result in results.values()])
    order = np.argsort(ids, kind="stable")
    repeats = np.flatnonzero(np.diff(ids[order]) == 0) + 1
    faults: list[Fault] = []
    open_shard.cache_clear()  # of this process, in which a shard may have been written anew since
    first_of = {int(ids[order[k]]): int(order[k - 1]) for k in repeats[::-1]}  # id: its first sample
    for sample in order[repeats[:SHOWN_REPEATS]].tolist():
        first = first_of[int(ids[sample])]
        shard, row = open_shard(paths[shards[sample]]), int(rows[sample])
        other, other_row = open_shard(paths[shards[first]]), int(rows[first])
        sample_id, other_id = _read_id(shard, row), _read_id(other, other_row)
        owner = f"that of {other.name}, {other.describe(other_row)}, too"
        if str(sample_id) == str(other_id):
            error = f"its sample_id {sample_id!r} is {owner}: a sample_id is one sample's; what several are about is a group_id"
        else:
            error = f"its sample_id {sample_id!r} has the same hash as {other_id!r}, {owner}: give one of them another"
        faults.append(Fault(shard.name, error, shard.keys[row], "json", shard.describe(row)))
    if len(repeats) > SHOWN_REPEATS:
        faults.append(Fault(faults[-1].shard, f"{len(repeats) - SHOWN_REPEATS} more samples have a sample_id of another"))
    return faults


def _read_id(shard: ShardIndex, row: int) -> Any:
    return read_json(shard.read(row, ["json"])["json"]).get("sample_id")
