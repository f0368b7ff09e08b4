"""Scores samples by how well two fields of each fit, by a model's embeddings, and selects the best of them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmcontrast.curation.outputs import (
    about_table,
    check_out,
    counts_table,
    finish,
    ids_of_table,
    open_stored,
    parquet_file,
    sample_cell,
    spread,
)
from mmcontrast.data.page import svg
from mmcontrast.errors import UserError
from mmcontrast.search.table import StoredTable

SCHEMA = pa.schema(
    [("sample_id", pa.int64()), ("key", pa.string()), ("keep", pa.bool_()), ("reason", pa.string()), ("score", pa.float32())]
)
ROWS, SHOWN = 16_384, 12  # that are read, that the page shows of each kind


@dataclass(frozen=True)
class ScoreOptions:
    """The fields that are scored, and the samples that are kept.

    Attributes:
        first, second: fields, whose cosine is a sample's score.
        min: the least score that is kept: for CLIP ViT-B/32 LAION took 0.28, DataComp's pools 0.25.
        top: instead, the share of the samples that is kept, those with the largest scores: 0.3 for DataComp's best pools.
            Neither: every sample that has a score is kept.
    """

    first: str
    second: str
    min: float | None = None
    top: float | None = None

    def check(self) -> None:
        """Check the options.

        Raises:
            UserError: for options that contradict each other.
        """
        if self.first == self.second:
            raise UserError(f"--pair {self.first} {self.second}: name two fields")
        if self.min is not None and self.top is not None:
            raise UserError("--min, --top: say one of the two")
        if self.min is not None and not np.isfinite(self.min):
            raise UserError(f"--min {self.min}: it must be finite")
        if self.top is not None and not 0 < self.top <= 1:
            raise UserError(f"--top {self.top}: more than 0, and at most 1")


def score(table: Path, out: Path, options: ScoreOptions) -> dict[str, Any]:
    """Score the samples of an embedding table, and return the summary, which is also in the file's metadata and beside it.

    Args:
        table: a folder that `mmcontrast embed` wrote.
        out: a Parquet file, which is a selection: of every sample, in the table's order, `sample_id`, `key`, `keep`, `reason`,
            and `score`, null for one that lacks a field.

    Raises:
        UserError: for a table that is damaged or lacks a field, a file that exists, options that contradict each other; if no
            sample is kept.
    """
    options.check()
    check_out(out)
    stored = open_stored(table, {"--pair, first": options.first, "--pair, second": options.second})
    ids, scores = ids_of_table(stored), _scores(stored, options)
    has_score = ~np.isnan(scores)
    least = options.min
    if options.top is not None and has_score.any():
        number = min(int(has_score.sum()), max(1, int(options.top * len(scores) + 0.5)))
        least = float(np.partition(scores[has_score], -number)[-number])
    keep = has_score if least is None else has_score & (scores >= np.float32(least))
    if not keep.any():
        best = f"the largest score is {np.nanmax(scores):.4f}" if has_score.any() else "no sample has both fields"
        raise UserError(f"{table}: no sample is kept: {best}")
    below = "" if least is None else f"score < {least:.6g}" + (f", the top {options.top:g}" if options.top is not None else "")
    with parquet_file(out, SCHEMA) as writer:
        start = 0
        for part in stored.columns("key"):
            rows = slice(start, start := start + len(part))
            missing = {
                int(row): _missing_fields(stored, int(row), options) for row in np.flatnonzero(~has_score[rows]) + rows.start
            }
            reasons = [None if kept else missing.get(rows.start + k, below) for k, kept in enumerate(keep[rows].tolist())]
            columns = [
                pa.array(ids[rows]),
                part["key"],
                pa.array(keep[rows]),
                pa.array(reasons, pa.string()),
                pa.array(scores[rows], pa.float32(), mask=~has_score[rows]),
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA))
        stored.check_unchanged()
        quantiles = {f"{q:g}": float(np.quantile(scores[has_score], q)) for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
        summary = {
            "stage": "score", "table": about_table(stored), "options": asdict(options), "samples": len(ids),
            "kept": int(keep.sum()), "without_score": int((~has_score).sum()), "least_score_kept": least,
            "quantiles": quantiles,
        }  # fmt: skip
        finish(out, writer, summary, _sections(stored, scores, keep, summary))
    return summary


def _scores(table: StoredTable, options: ScoreOptions) -> np.ndarray:
    """Return float32 [N] cosines, NaN for samples that lack a field. Rows are of length one."""
    scores = np.full(len(table), np.nan, dtype=np.float32)
    both = np.intersect1d(table.present(options.first), table.present(options.second), assume_unique=True)
    for start in range(0, len(both), ROWS):
        rows = both[start : start + ROWS]
        first, second = (table.vectors(field, rows).astype(np.float64) for field in (options.first, options.second))
        scores[rows] = (first * second).sum(1)
    return scores


def _missing_fields(table: StoredTable, row: int, options: ScoreOptions) -> str:
    return " and ".join(f"no {field}" for field in (options.first, options.second) if not table.has(row, field))


def _sections(table: StoredTable, scores: np.ndarray, keep: np.ndarray, summary: dict[str, Any]) -> list[str]:
    """Return the page: the scores' histogram, and samples from the least to the largest score."""
    from matplotlib.figure import Figure

    scored = np.flatnonzero(~np.isnan(scores))
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.hist(
        [scores[keep], scores[scored][~keep[scored]]],
        bins=60,
        stacked=True,
        label=["kept", "dropped"],
        color=["#2166ac", "#d6604d"],
    )
    axis.set_xlabel("score")
    axis.legend(fontsize=8)
    ordered = scored[np.argsort(scores[scored], kind="stable")]
    examples = [ordered[number] for number in spread(SHOWN, len(ordered))]
    cells = "".join(sample_cell(table, int(row), f"{scores[row]:.3f}{'' if keep[row] else ', dropped'}") for row in examples)
    counts = {name.replace("_", " "): summary[name] for name in ("samples", "kept", "without_score", "least_score_kept")}
    counts |= {f"quantile {name}": value for name, value in summary["quantiles"].items()}
    return [
        counts_table("What was kept", {name: value for name, value in counts.items() if value is not None}),
        f"<h2>Scores</h2>{svg(figure)}",
        f'<h2>From the least to the largest</h2><div class="row">{cells}</div>',
    ]
