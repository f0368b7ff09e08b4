"""Runs a stage over shards: it writes a table of each, which appears when it is whole and is a function of the shard and the
stage's options alone.

So any number of processes, on any number of machines that share the folder, may run it; what was killed goes on; and the bytes
are the same. Stages that must see all shards to judge one (the best 30 %, duplicates) do so in two passes: the tables of the
first are in `measured/`, and the process that finds them complete does the second.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcontrast.curation.outputs import write_table
from mmcontrast.curation.report import report_page
from mmcontrast.curation.stage import PRIVATE, Judgement, Stage
from mmcontrast.data.engines import check_engine, run_jobs
from mmcontrast.data.files import expand_shards, tell_of_newer
from mmcontrast.data.folder import FolderIndex
from mmcontrast.data.index import index_shard, open_shards
from mmcontrast.data.parts import key_array
from mmcontrast.data.selection import FORMAT, MANIFEST, OWN, PARTS, NamedSamples, StageSelection, open_selection
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import is_table, open_table
from mmcontrast.errors import UserError
from mmcontrast.training.distributed import rank_of_launcher
from mmcontrast.whole_files import write_json, write_text

BEGUN, MEASURED, SUMMARY, REPORT = "stage.json", "measured", "summary.json", "report.html"
PART_INFO = b"mmcontrast"  # the entry of a part's Parquet metadata
EXAMPLES = 3  # rows of each reason that a part names


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run of a stage: all of it, or its own share.

    Attributes:
        missing: shards whose tables other processes have not yet written.
    """

    folder: Path
    shards: int
    missing: int
    summary: dict[str, Any]

    @property
    def complete(self) -> bool:
        return not self.missing


@dataclass(frozen=True)
class _Job:
    """One shard of a stage."""

    stage: Stage
    folder: Path
    number: int
    shard: str
    select: str | None
    rows: np.ndarray | None  # of a selection that is a list; None: all, or those that the stage before kept
    reasons: list[str | None] | None = None  # [n] that list's reasons for samples that it does not keep

    def __str__(self) -> str:
        return self.shard


def run_stage(
    stage: Stage,
    patterns: str | Sequence[str],
    out: Path,
    *,
    select: str | None = None,
    workers: int | None = None,
    engine: str = "pool",
) -> Outcome:
    """Run a stage over shards, or the part of it that is not done.

    Under torchrun (RANK, WORLD_SIZE) and in a Slurm array (SLURM_ARRAY_TASK_ID) each process takes every W-th shard; they need
    no communication, and the last one completes the selection.

    Args:
        out: the selection's folder.
        select: the selection to continue: samples that it dropped stay dropped, for its reason.
        workers, engine: as `run_jobs`.

    Raises:
        UserError: for shards that are missing or damaged; if `out` holds something else; as `check_engine` and `run_jobs`.
    """
    check_engine(engine)
    names = expand_shards(patterns)
    index, count = share_of_this_process()
    selection = open_selection(select) if select else None
    _check_folder(stage, out, names, _identity(select))
    lists: list[Any] = [(None,)] * len(names)
    if isinstance(selection, NamedSamples):
        lists = _rows_of_list(selection, names, stage)
    jobs = [_Job(stage, out, number, name, select, *lists[number]) for number, name in enumerate(names)]
    if (out / MANIFEST).exists():
        if index == 0:
            _check_unchanged(jobs, out)
    else:
        share = jobs[index::count]
        for error in run_jobs(_measure_job, share, f"{stage.name}: {len(share)} shards", engine=engine, workers=workers):
            if error:
                raise UserError(error)
    return _complete(jobs, out)


def share_of_this_process() -> tuple[int, int]:
    """Return (number, of how many) of this process among those that share a stage.

    Raises:
        UserError: for an array whose tasks are not numbered from its first one on.
    """
    rank, world = rank_of_launcher()
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return rank, world
    task, tasks = int(os.environ["SLURM_ARRAY_TASK_ID"]), int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    task -= int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    if not 0 <= task < tasks:
        raise UserError(f"task {task} of an array of {tasks}: number its tasks from 0 on, as --array=0-{tasks - 1}")
    return task * world + rank, tasks * world


def _read_part_info(path: Path) -> dict[str, Any]:
    """Return a part's own metadata: samples, kept, reasons, counts, examples."""
    return json.loads(pq.read_schema(path).metadata[PART_INFO])


def _identity(select: str | None) -> str | None:
    """Return a digest of the selection to continue, which does not depend on its folder."""
    if select is None:
        return None
    path = Path(select)
    return hashlib.blake2b((path / MANIFEST if path.is_dir() else path).read_bytes(), digest_size=16).hexdigest()


def _check_folder(stage: Stage, out: Path, names: Sequence[str], select: str | None) -> None:
    """Write the stage and its options into its folder, or check that the folder holds the same.

    Raises:
        UserError: if the folder holds anything else.
    """
    if stage.two_passes and len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{repeated} is named twice: name it once, or all of its samples are duplicates")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    description: dict[str, Any] = {"stage": stage.name, "version": stage.version, "options": stage.options, "select": select}
    if stage.two_passes:  # another shard would change what was judged of all
        description["shards"] = len(names)
    description = json.loads(json.dumps(description))
    path = out / BEGUN
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is there, and holds no selection that was begun: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f".{BEGUN}.{uuid4().hex}.partial"
        partial.write_text(json.dumps(description, indent=1))
        try:
            os.link(partial, path)  # the first of several processes
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(partial, path)
        partial.unlink(missing_ok=True)
    try:
        existing = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove {out}, or choose another folder") from error
    for name, value in description.items():
        if existing.get(name) != value:
            difference = f"{name}: {_shorten(existing.get(name))} there, {_shorten(value)} here"
            raise UserError(f"{out} holds another selection ({difference}): choose another folder, or remove it")
    for folder in (PARTS, *([MEASURED] if stage.two_passes else [])):
        (out / folder).mkdir(exist_ok=True)
    manifest = out / MANIFEST
    if manifest.exists() and [entry["name"] for entry in json.loads(manifest.read_text())["shards"]] != list(names):
        if stage.two_passes:
            raise UserError(f"{out} holds a selection of other shards, or elsewhere: choose another folder")
        manifest.unlink()  # more shards than before: theirs are added


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else f"{text[:300]}…"


def _rows_of_list(
    selection: NamedSamples, names: Sequence[str], stage: Stage
) -> list[tuple[np.ndarray, list[str | None] | None]]:
    """Return the rows of each shard that a list of samples keeps, and its reasons for the others."""
    shards = open_shards(names, True, stage.file_columns, stage.files)
    sample_names = selection.names_of(shards)
    result = []
    for kept, shard_names in zip(selection.narrowed(shards, sample_names), sample_names, strict=True):
        rows = getattr(kept, "rows", None)
        reasons = selection.reasons_of(shard_names) if selection.dropped is not None else None
        result.append((np.arange(len(kept)) if rows is None else rows, reasons))
    return result


def _measure_job(job: _Job) -> str:
    """Measure a shard, and judge it if that can be done at once; return what is wrong with it."""
    try:
        shard = _open(job)
        path = _part_path(job, _content_of(shard), MEASURED if job.stage.two_passes else PARTS)
        if path.exists():
            return ""
        rows, previous = _rows(job, shard)
        previous_measures = previous.drop_columns(list(OWN)).take(pa.array(rows)) if previous is not None else None
        measured = job.stage.measure(shard, rows, previous_measures)
        if job.stage.two_passes:
            write_table(measured, path)
        else:
            write_table(_make_part(job, shard, measured, job.stage.judge(measured, None, job.number)), path)
    except UserError as error:
        return str(error)
    return ""


def _open(job: _Job) -> ShardIndex:
    if is_table(job.shard):
        return open_table(job.shard, job.stage.file_columns, job.stage.files)
    return index_shard(job.shard)


@lru_cache(maxsize=1)
def _read_selection(path: str, _changed: int) -> StageSelection:
    """Return a stage's selection, which a process reads once, and again if it has changed."""
    return StageSelection.read(Path(path))


def _part_path(job: _Job, content: str, folder: str) -> Path:
    return job.folder / folder / f"{job.number:05d}-{content}.parquet"


def _content_of(shard: ShardIndex) -> str:
    """Return a shard's digest; of a folder, whose digest has names and sizes alone, with the times of its files."""
    if not isinstance(shard, FolderIndex):
        return shard.digest
    return hashlib.blake2b(f"{shard.digest}{shard.changed}".encode(), digest_size=8).hexdigest()


def _check_unchanged(jobs: Sequence[_Job], out: Path) -> None:
    """Check that a complete selection is of the shards as they are now.

    Raises:
        UserError: for a shard that has changed.
    """
    made: list[tuple[str, float]] = []
    for job, entry in zip(jobs, json.loads((out / MANIFEST).read_text())["shards"], strict=True):
        if _part_path(job, _content_of(_open(job)), PARTS).name != entry["part"]:
            raise UserError(f"{out} is complete, and {job.shard} has changed since: remove it, or choose another folder")
        made.append((job.shard, (out / PARTS / entry["part"]).stat().st_mtime))
    tell_of_newer(made, out)


def _rows(job: _Job, shard: ShardIndex) -> tuple[np.ndarray, pa.Table | None]:
    """Return the rows that are kept so far, and the previous selection's table of all."""
    if job.rows is not None or job.select is None:
        return np.arange(len(shard)) if job.rows is None else job.rows, None
    previous = _read_selection(job.select, (Path(job.select) / MANIFEST).stat().st_mtime_ns)
    table = previous.read_part(previous.part(shard), None, len(shard))
    return np.flatnonzero(table["keep"].to_numpy(zero_copy_only=False)), table


def _make_part(job: _Job, shard: ShardIndex, measured: pa.Table, judgement: Judgement) -> pa.Table:
    """Return the part of a shard: a row for each of its samples, also those that were dropped before."""
    rows, previous = _rows(job, shard)
    reasons = pa.array(judgement.reasons, pa.string())
    judged_row = np.full(len(shard), -1, dtype=np.int64)
    judged_row[rows] = np.arange(len(rows))
    take_rows = pa.array(judged_row, mask=judged_row < 0)
    keep = np.zeros(len(shard), dtype=bool)
    keep[rows] = reasons.is_null().to_numpy(zero_copy_only=False)
    columns: dict[str, Any] = {"key": _key_texts(shard), "row": pa.array(np.arange(len(shard))), "keep": pa.array(keep)}
    all_reasons = reasons.take(take_rows).to_pylist()
    dropped_before = np.flatnonzero(judged_row < 0)
    earlier_reasons = previous["reason"].to_pylist() if previous is not None else job.reasons or [None] * len(shard)
    for row in dropped_before.tolist():
        all_reasons[row] = earlier_reasons[row] or f"not in {Path(str(job.select)).name}"
    columns["reason"] = pa.array(all_reasons, pa.string())
    if previous is not None:
        columns |= {name: previous[name] for name in previous.column_names if name not in columns}
    for name in measured.column_names:
        if not name.startswith(PRIVATE):  # a table may have a column `row` itself
            columns[f"measured {name}" if name in OWN else name] = measured[name].take(take_rows)
    kinds = judgement.kinds or judgement.reasons
    info: dict[str, Any] = {"samples": len(shard), "kept": int(keep.sum()), "given": len(rows), "counts": judgement.counts}
    info["reasons"], info["examples"] = {}, {}
    for row, kind in zip(rows.tolist(), kinds, strict=True):
        if kind is not None:
            info["reasons"][kind] = info["reasons"].get(kind, 0) + 1
            if info["reasons"][kind] <= EXAMPLES:
                info["examples"].setdefault(kind, []).append(row)
    if keep.any():
        info["examples"]["kept"] = np.flatnonzero(keep)[:EXAMPLES].tolist()
    return pa.table(columns).replace_schema_metadata({PART_INFO: json.dumps(info)})


def _key_texts(shard: ShardIndex) -> pa.Array:
    """Return the keys as texts; what is not UTF-8 in one is written as \\xff."""
    keys = key_array(shard.keys)
    with suppress(pa.ArrowInvalid):
        return keys.cast(pa.large_string())
    return pa.array([key.decode("utf-8", "backslashreplace") for key in keys.to_pylist()], pa.large_string())


def _complete(jobs: Sequence[_Job], out: Path) -> Outcome:
    """Write the manifest if all shards are done; of a stage of two passes, once the second is."""
    if (out / MANIFEST).exists():
        return Outcome(out, len(jobs), 0, json.loads((out / SUMMARY).read_text()))
    stage = jobs[0].stage
    folder = out / (MEASURED if stage.two_passes else PARTS)
    done = {int(path.name.partition("-")[0]) for path in folder.glob("[0-9]*-*.parquet")}
    missing = len(jobs) - len(done & set(range(len(jobs))))
    # one at a time: the indexes of all may not fit
    opened = [] if missing else [(shard.digest, _content_of(shard)) for shard in map(_open, jobs)]
    digests, contents = zip(*opened, strict=True) if opened else ((), ())
    paths = [_part_path(job, content, folder.name) for job, content in zip(jobs, contents, strict=False)]
    missing += sum(not path.exists() for path in paths)
    if missing:
        return Outcome(out, len(jobs), missing, {})
    if stage.two_passes:
        decisions = stage.decide(pq.read_table(path) for path in paths)
        for job, content, path in zip(jobs, contents, paths, strict=True):
            if not (part := _part_path(job, content, PARTS)).exists():
                measured = pq.read_table(path)
                write_table(_make_part(job, _open(job), measured, stage.judge(measured, decisions, job.number)), part)
        paths = [_part_path(job, content, PARTS) for job, content in zip(jobs, contents, strict=True)]
    infos = [_read_part_info(path) for path in paths]
    entries = [
        {"name": job.shard, "digest": digest, "samples": info["samples"], "kept": info["kept"], "part": path.name}
        for job, digest, path, info in zip(jobs, digests, paths, infos, strict=True)
    ]
    summary = _summary(stage, infos)
    write_json(out / SUMMARY, summary)
    text = report_page(stage.name, summary, lambda number: _open(jobs[number]), paths, infos)
    write_text(out / REPORT, text, errors="replace")
    description = json.loads((out / BEGUN).read_text())
    write_json(out / MANIFEST, {"format": FORMAT, **description, "shards": entries})
    obsolete = set((out / PARTS).iterdir()) - set(paths)  # of other shards, or of processes that were killed
    for path_to_remove in [*obsolete, *out.rglob(".*.partial")]:
        path_to_remove.unlink(missing_ok=True)
    return Outcome(out, len(jobs), 0, summary)


def _summary(stage: Stage, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {"samples": 0, "given": 0, "kept": 0}
    reasons: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for info in infos:
        for name in totals:
            totals[name] += info[name]
        reasons.update(info["reasons"])
        counts.update(info["counts"])
    ordered = dict(sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0])))
    return {"stage": stage.name, "shards": len(infos), **totals, "reasons": ordered, **stage.summary(counts)}
