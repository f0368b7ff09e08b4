"""Stages: what a selection is made by. Each looks at the samples of one shard at a time and leaves a table of it, which appears
when it is whole and is a function of the shard and the stage's options alone.

So any number of processes, on any number of machines that share the folder, may be at it; what was killed goes on; and the
bytes are the same. Stages that must see all shards to judge one (the best 30 %, duplicates) do so in two passes: the tables of
the first are in `measured/`, and whoever finds them complete does the second.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcontrast.curation.report import report_page
from mmcontrast.data.engines import check_engine, run_jobs
from mmcontrast.data.files import expand_shards
from mmcontrast.data.index import index_shard, open_shards
from mmcontrast.data.parts import key_array
from mmcontrast.data.selection import FORMAT, MANIFEST, OWN, PARTS, NamedSamples, StageSelection, open_selection
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import FILE_COLUMNS, is_table, open_table
from mmcontrast.errors import UserError
from mmcontrast.strict_json import dumps

BEGUN, MEASURED, SUMMARY, REPORT = "stage.json", "measured", "summary.json", "report.html"
ABOUT = b"mmcontrast"  # entry of a part's own metadata
EXAMPLES = 3  # rows of each reason that a part names
GROUP_ROWS = 65_536  # of a part: those that are read together
PRIVATE = "_"  # begins the names of columns that the first pass leaves for the second
Decisions = Any


@dataclass(frozen=True)
class Judgement:
    """Say which of the samples that a stage was given are dropped and why, with numbers for its summary.

    Attributes:
        reasons: [n] why a sample is dropped; None: it is kept.
        kinds: [n] what the summary calls each reason; default: the reason itself.
    """

    reasons: Sequence[str | None]
    counts: dict[str, int] = field(default_factory=dict)
    kinds: Sequence[str | None] | None = None


class Stage(ABC):
    """One kind of stage, with its options. Sent to worker processes: what is large is opened there.

    Attributes:
        name: its command: `mmcontrast data NAME`.
        version: of what it writes.
        two_passes: it must have measured all shards before it can judge one.
        files, file_columns: of tables, as `open_table`.
    """

    name: str
    version = 1
    two_passes = False
    files: str | None = None

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return what the tables depend on, as JSON has it."""

    @property
    def file_columns(self) -> frozenset[str]:
        return FILE_COLUMNS

    @abstractmethod
    def measure(self, shard: ShardIndex, rows: np.ndarray, previous: pa.Table | None) -> pa.Table:
        """Return [n] measures of some rows of a shard.

        Args:
            previous: what was measured of these rows before, by the selection that this one goes on from.
        """

    def decide(self, tables: Iterator[pa.Table]) -> Decisions:
        """Return what must be known of all shards to judge one, from all that was measured. Of stages of two passes."""
        return None

    @abstractmethod
    def judge(self, measured: pa.Table, decisions: Decisions, number: int) -> Judgement:
        """Judge what was measured of one shard.

        Args:
            number: of the shard among all.
        """

    def summary(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Return what summary.json has beside the numbers of samples, from all counts of all judgements."""
        return {"counts": dict(counts)} if counts else {}


@dataclass(frozen=True)
class Outcome:
    """Say what a run of a stage has done: all of it, or its own share.

    Attributes:
        missing: shards of which other processes have not yet written their tables.
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
    reasons: list[str | None] | None = None  # [n] what that list says of samples that it does not keep

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
    """Run a stage over shards, or what is left of it to do.

    Under torchrun (RANK, WORLD_SIZE) and in a Slurm array (SLURM_ARRAY_TASK_ID) each process takes every W-th shard; they need
    not talk to each other, and who ends last completes the selection.

    Args:
        out: the selection's folder.
        select: the selection to go on from: what that dropped stays dropped, for its first reason.
        workers, engine: as `run_jobs`.

    Raises:
        UserError: for shards that are not there or damaged; if `out` holds something else; as `check_engine` and `run_jobs`.
    """
    check_engine(engine)
    names = expand_shards(patterns)
    index, count = share_of_this_process()
    before = open_selection(select) if select else None
    _begin(stage, out, names, _identity(select))
    lists: list[Any] = [(None,)] * len(names)
    if isinstance(before, NamedSamples):
        lists = _rows_of_list(before, names, stage)
    jobs = [_Job(stage, out, number, name, select, *lists[number]) for number, name in enumerate(names)]
    if not (out / MANIFEST).exists():
        share = jobs[index::count]
        for error in run_jobs(_measured, share, f"{stage.name}: {len(share)} shards", engine=engine, workers=workers):
            if error:
                raise UserError(error)
    return _complete(jobs, out)


def share_of_this_process() -> tuple[int, int]:
    """Return (number, of how many) of this process among those that share a stage.

    Raises:
        UserError: for an array whose tasks are not numbered from its first one on.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return rank, world
    task, tasks = int(os.environ["SLURM_ARRAY_TASK_ID"]), int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    task -= int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    if not 0 <= task < tasks:
        raise UserError(f"task {task} of an array of {tasks}: number its tasks from 0 on, as --array=0-{tasks - 1}")
    return task * world + rank, tasks * world


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file appear when it is whole. Several processes, and several machines, may do so, each with the same bytes."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except FileNotFoundError:  # another process has completed the selection, and swept up
        if not path.exists():
            raise
    finally:
        partial.unlink(missing_ok=True)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that appears when it is whole."""
    write_whole(path, lambda partial: pq.write_table(table, partial, row_group_size=GROUP_ROWS))


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON that appears when it is whole."""
    write_whole(path, lambda partial: partial.write_text(dumps(content, indent=1), encoding="utf-8"))


def read_about(path: Path) -> dict[str, Any]:
    """Return what a part says of itself: samples, kept, reasons, counts, examples."""
    return json.loads(pq.read_schema(path).metadata[ABOUT])


def _identity(select: str | None) -> str | None:
    """Return what tells the selection to go on from, wherever it is."""
    if select is None:
        return None
    path = Path(select)
    return hashlib.blake2b((path / MANIFEST if path.is_dir() else path).read_bytes(), digest_size=16).hexdigest()


def _begin(stage: Stage, out: Path, names: Sequence[str], select: str | None) -> None:
    """Leave what the stage is in its folder, or compare with what is there.

    Raises:
        UserError: if the folder holds anything else.
    """
    if stage.two_passes and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice} is named twice: name it once, or all of its samples are duplicates")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    begun: dict[str, Any] = {"stage": stage.name, "version": stage.version, "options": stage.options, "select": select}
    if stage.two_passes:  # another shard would change what was judged of all
        begun["shards"] = len(names)
    begun = json.loads(json.dumps(begun))
    path = out / BEGUN
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is there, and holds no selection that was begun: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f".{BEGUN}.{uuid4().hex}.partial"
        partial.write_text(json.dumps(begun, indent=1))
        try:
            os.link(partial, path)  # the first of several processes
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(partial, path)
        partial.unlink(missing_ok=True)
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove {out}, or choose another folder") from error
    for name, value in begun.items():
        if there.get(name) != value:
            raise UserError(
                f"{out} holds another selection ({name}: {_short(there.get(name))} there, {_short(value)} here): choose another"
                " folder, or remove it"
            )
    for folder in (PARTS, *([MEASURED] if stage.two_passes else [])):
        (out / folder).mkdir(exist_ok=True)
    manifest = out / MANIFEST
    if manifest.exists() and [entry["name"] for entry in json.loads(manifest.read_text())["shards"]] != list(names):
        if stage.two_passes:
            raise UserError(f"{out} holds a selection of other shards, or elsewhere: choose another folder")
        manifest.unlink()  # more shards than before: theirs are added


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else f"{text[:300]}…"


def _rows_of_list(
    selection: NamedSamples, names: Sequence[str], stage: Stage
) -> list[tuple[np.ndarray, list[str | None] | None]]:
    """Return the rows of each shard that a list of samples keeps, and what it says of the others."""
    shards = open_shards(names, True, stage.file_columns, stage.files)
    asked = selection.names_of(shards)
    kept = selection.narrowed(shards, asked)
    rows = [getattr(shard, "rows", None) for shard in kept]
    said = [selection.reasons_of(of) if selection.dropped is not None else None for of in asked]
    return [(np.arange(len(shard)) if of is None else of, why) for shard, of, why in zip(kept, rows, said, strict=True)]


def _measured(job: _Job) -> str:
    """Measure a shard, and judge it if that can be done at once; return what is wrong with it."""
    try:
        shard = _open(job)
        path = _part(job, shard.digest, MEASURED if job.stage.two_passes else PARTS)
        if path.exists():
            return ""
        rows, previous = _rows(job, shard)
        there = previous.drop_columns(list(OWN)).take(pa.array(rows)) if previous is not None else None
        measured = job.stage.measure(shard, rows, there)
        if job.stage.two_passes:
            write_table(measured, path)
        else:
            write_table(_whole(job, shard, measured, job.stage.judge(measured, None, job.number)), path)
    except UserError as error:
        return str(error)
    return ""


def _open(job: _Job) -> ShardIndex:
    if is_table(job.shard):
        return open_table(job.shard, job.stage.file_columns, job.stage.files)
    return index_shard(job.shard)


@lru_cache(maxsize=1)
def _opened_selection(path: str, _changed: int) -> StageSelection:
    """Return a stage's selection, which a process reads once, and again if it has changed."""
    return StageSelection.read(Path(path))


def _part(job: _Job, digest: str, folder: str) -> Path:
    return job.folder / folder / f"{job.number:05d}-{digest}.parquet"


def _rows(job: _Job, shard: ShardIndex) -> tuple[np.ndarray, pa.Table | None]:
    """Return the rows that are still there, and what the previous selection has of all."""
    if job.rows is not None or job.select is None:
        return np.arange(len(shard)) if job.rows is None else job.rows, None
    previous = _opened_selection(job.select, (Path(job.select) / MANIFEST).stat().st_mtime_ns)
    table = previous.read_part(previous.part(shard), None, len(shard))
    return np.flatnonzero(table["keep"].to_numpy(zero_copy_only=False)), table


def _whole(job: _Job, shard: ShardIndex, measured: pa.Table, judgement: Judgement) -> pa.Table:
    """Return the part of a shard: a row for each of its samples, those that were dropped before too."""
    rows, previous = _rows(job, shard)
    reasons = pa.array(judgement.reasons, pa.string())
    place = np.full(len(shard), -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    spread = pa.array(place, mask=place < 0)
    keep = np.zeros(len(shard), dtype=bool)
    keep[rows] = reasons.is_null().to_numpy(zero_copy_only=False)
    columns: dict[str, Any] = {"key": _texts(shard), "row": pa.array(np.arange(len(shard))), "keep": pa.array(keep)}
    whole = reasons.take(spread).to_pylist()
    dropped_before = np.flatnonzero(place < 0)
    before = previous["reason"].to_pylist() if previous is not None else job.reasons or [None] * len(shard)
    for row in dropped_before.tolist():
        whole[row] = before[row] or f"not in {Path(str(job.select)).name}"
    columns["reason"] = pa.array(whole, pa.string())
    if previous is not None:
        columns |= {name: previous[name] for name in previous.column_names if name not in columns}
    for name in measured.column_names:
        if not name.startswith(PRIVATE):  # a table may have a column `row` itself
            columns[f"measured {name}" if name in OWN else name] = measured[name].take(spread)
    kinds = judgement.kinds or judgement.reasons
    about: dict[str, Any] = {"samples": len(shard), "kept": int(keep.sum()), "given": len(rows), "counts": judgement.counts}
    about["reasons"], about["examples"] = {}, {}
    for row, kind in zip(rows.tolist(), kinds, strict=True):
        if kind is not None:
            about["reasons"][kind] = about["reasons"].get(kind, 0) + 1
            if about["reasons"][kind] <= EXAMPLES:
                about["examples"].setdefault(kind, []).append(row)
    if keep.any():
        about["examples"]["kept"] = np.flatnonzero(keep)[:EXAMPLES].tolist()
    return pa.table(columns).replace_schema_metadata({ABOUT: json.dumps(about)})


def _texts(shard: ShardIndex) -> pa.Array:
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
    there = {int(path.name.partition("-")[0]) for path in folder.glob("[0-9]*-*.parquet")}
    missing = len(jobs) - len(there & set(range(len(jobs))))
    digests = [] if missing else [_open(job).digest for job in jobs]  # one at a time: the indexes of all may not fit
    paths = [_part(job, digest, folder.name) for job, digest in zip(jobs, digests, strict=False)]
    missing += sum(not path.exists() for path in paths)
    if missing:
        return Outcome(out, len(jobs), missing, {})
    if stage.two_passes:
        decisions = stage.decide(pq.read_table(path) for path in paths)
        for job, digest, path in zip(jobs, digests, paths, strict=True):
            if not (part := _part(job, digest, PARTS)).exists():
                measured = pq.read_table(path)
                write_table(_whole(job, _open(job), measured, stage.judge(measured, decisions, job.number)), part)
        paths = [_part(job, digest, PARTS) for job, digest in zip(jobs, digests, strict=True)]
    abouts = [read_about(path) for path in paths]
    entries = [
        {"name": job.shard, "digest": digest, "samples": about["samples"], "kept": about["kept"], "part": path.name}
        for job, digest, path, about in zip(jobs, digests, paths, abouts, strict=True)
    ]
    summary = _summary(stage, abouts)
    write_json(summary, out / SUMMARY)
    text = report_page(stage.name, summary, lambda number: _open(jobs[number]), paths, abouts)
    write_whole(out / REPORT, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace"))
    begun = json.loads((out / BEGUN).read_text())
    write_json({"format": FORMAT, **begun, "shards": entries}, out / MANIFEST)
    others = set((out / PARTS).iterdir()) - set(paths)  # of other shards, or of processes that were killed
    for left in [*others, *out.rglob(".*.partial")]:
        left.unlink(missing_ok=True)
    return Outcome(out, len(jobs), 0, summary)


def _summary(stage: Stage, abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {"samples": 0, "given": 0, "kept": 0}
    reasons: dict[str, int] = {}
    counts: dict[str, int] = {}
    for about in abouts:
        for name in totals:
            totals[name] += about[name]
        for of, into in (("reasons", reasons), ("counts", counts)):
            for name, number in about[of].items():
                into[name] = into.get(name, 0) + number
    ordered = dict(sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0])))
    return {"stage": stage.name, "shards": len(abouts), **totals, "reasons": ordered, **stage.summary(counts)}
