"""A run as one self-contained page: its curves, its results, and galleries of what it finds."""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcontrast.data import ShardDataset, ShardOptions
from mmcontrast.data.page import folded, heat_map, page, svg
from mmcontrast.evaluation.before import before_and_after, report_split
from mmcontrast.evaluation.classification import Report
from mmcontrast.evaluation.compare import HEADLINES
from mmcontrast.evaluation.embed import write_json
from mmcontrast.evaluation.gallery import galleries, gallery
from mmcontrast.evaluation.options import EvaluationOptions
from mmcontrast.evaluation.results import Evaluation, shown_results
from mmcontrast.models import ContrastiveModel

LOG, RESULTS, REPORT = "metrics.jsonl", "results.json", "report.html"
CLASSES, PICTURED = 100, 40  # that a table lists, and that a matrix of confusion can show
PAIR = re.compile(r"retrieval/(?P<query>[^/]+)_to_(?P<candidate>[^/]+)/recall_at_1")


def write_report(
    path: Path,
    name: str,
    found: Evaluation,
    log: Sequence[dict[str, Any]],
    step: int | None,
    model: ContrastiveModel,
    datasets: Mapping[str, ShardDataset],
    options: EvaluationOptions,
) -> None:
    """Writes the page. `log` are the lines of metrics.jsonl; `step`: that of results that evaluations.jsonl lacks."""
    split = report_split(options)
    table, dataset = found.tables[split], datasets[split]
    sections = [
        f"<h2>Results</h2>{_summary(found)}",
        *before_and_after(path.parent, found, step, model, datasets, options),
        *(gallery(query, candidate, split, model, dataset, table, found.bank) for query, candidate in galleries(model, table)),
        f"<h2>Training</h2>{_curves(log)}" if log else "",
        "<h2>Details</h2>",
        *(_classes(place, *report) for place, report in found.reports.items()),
        folded("All results", _results(found)),
    ]
    path.write_text(page(name, sections), encoding="utf-8")


def _summary(found: Evaluation) -> str:
    """Return the numbers that matter first: recall at 1 of every pair of fields as a matrix, and the accuracy of each task."""
    splits = list(dict.fromkeys(name.partition("/")[0] for name in found.values))
    matrices, table = [], ""
    for split in splits:
        pairs = {}
        for name in found.values:
            if match := PAIR.fullmatch(name.removeprefix(f"{split}/")):
                pairs[match["query"], match["candidate"]] = name
        if pairs:
            fields = sorted({field for pair in pairs for field in pair})
            places = {(fields.index(query), fields.index(candidate)): name for (query, candidate), name in pairs.items()}
            shares = {place: found.values[name] for place, name in places.items() if not math.isnan(found.values[name])}
            notes = {}
            for place, name in places.items():
                if name in found.intervals:
                    low, high = found.intervals[name]
                    notes[place] = f"{low:.3f} to {high:.3f}"
            matrices.append(heat_map(f"{split}: recall at 1", fields, [f"→ {field}" for field in fields], shares, notes))
    headlines = []
    for row in shown_results(found)[1]:
        if row[0].rpartition("/")[2] in HEADLINES and not PAIR.fullmatch(row[0]):
            headlines.append(row)
    if headlines:
        table = _table(splits, headlines)
    return f'<div class="side">{"".join(matrices)}</div>{table}' if matrices or table else _results(found)


def _curves(log: Sequence[dict[str, Any]]) -> str:
    """Loss, logit scale, learning rate and speed by step, and the signals of pairs and directions, as one SVG."""
    from matplotlib.figure import Figure

    rows = [["loss", "logit_scale", "lr", "samples_per_second"]]
    if any(key.startswith("signals/") for key in log[-1]):
        rows.append(["accuracy", "effective_negatives", "alignment", "loss of pairs"])
    figure = Figure(figsize=(11, 2.6 * len(rows)))
    axes = figure.subplots(len(rows), 4, squeeze=False)
    # a fixed layout: to compute a constrained one of eight axes takes longer than to draw them
    figure.subplots_adjust(0.06, 0.5 / (2.6 * len(rows)), 0.99, 1 - 0.3 / (2.6 * len(rows)), wspace=0.3, hspace=0.4)
    for axis, key in zip(axes[0], rows[0], strict=True):
        axis.plot([line["step"] for line in log], [line[key] for line in log], linewidth=1.3)
    for axis, key in zip(axes[1:].flat, rows[1] if len(rows) > 1 else [], strict=True):
        for name in (n for n in log[-1] if n.startswith("signals/") and n.endswith(f"/{key.split()[0]}")):
            points = [(line["step"], line[name]) for line in log if name in line]
            label = name.split("/")[1].replace("_to_", " → ")
            axis.plot(*zip(*points, strict=True), linewidth=1.2, label=label)
        if axis.lines:
            axis.legend(fontsize=7)
    for axis, key in zip(axes.flat, (key for row in rows for key in row), strict=True):
        axis.set_title(key.replace("_", " "), fontsize=10, y=1.0)  # a given place: to find one takes a fifth of the time
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.locator_params(nbins=4)  # half of the drawing's time is that of ticks and their labels
    return svg(figure)


def write_results(
    folder: Path,
    name: str,
    found: Evaluation,
    model: ContrastiveModel,
    datasets: Mapping[str, ShardDataset],
    options: EvaluationOptions,
    about: Mapping[str, Any],
) -> None:
    """results.json and report.html. `about` says which model it was."""
    data = {
        split: {
            "shards": ShardOptions.of(options.splits[split]).shown(),
            "digest": datasets[split].digest,
            "samples": len(table),
        }
        for split, table in found.tables.items()
    }
    write_json(folder / RESULTS, found.to_json({**about, "data": data, "options": options.model_dump(mode="json")}))
    step = about.get("training", {}).get("step")
    write_report(folder / REPORT, name, found, read_log(folder / LOG), step, model, datasets, options)


def _classes(place: str, report: Report, classes: Sequence[str]) -> str:
    """What each class is taken for: its numbers, and the classes that it is mistaken for most."""
    lines = []
    for k in report.f1.argsort()[:CLASSES].tolist():
        others = report.confusion[k].clone()
        others[k] = 0
        mistaken = [f"{classes[o]} ({int(others[o])})" for o in others.argsort(descending=True)[:3].tolist() if others[o]]
        numbers = [f"{float(of[k]):.3f}" for of in (report.precision, report.recall, report.f1)]
        cells = [classes[k], *numbers, str(int(report.support[k])), ", ".join(mistaken)]
        lines.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("", "precision", "recall", "F1", "samples", "mistaken for"))
    picture = _confusion(report, classes) if len(classes) <= PICTURED else ""
    shown = "" if len(classes) <= CLASSES else f", the {CLASSES} of {len(classes)} with the least F1"
    table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    return folded(f"{place}: classes{shown}", f"{table}{picture}")


def _confusion(report: Report, classes: Sequence[str]) -> str:
    """Return the share of each true class, a row, that is taken for each class."""
    shares = report.confusion / report.support.clamp(min=1)[:, None]
    cells = {(row, column): float(shares[row, column]) for row, column in (shares >= 0.0005).nonzero().tolist()}
    return heat_map("Confusion: a row's class is taken for a column's", classes, classes, cells, {})


def _results(found: Evaluation) -> str:
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in found.notes)
    return _table(*shown_results(found)) + notes


def _table(splits: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of a result's name and its value in each split, as HTML."""
    head = "".join(f"<th>{html.escape(split)}</th>" for split in ["", *splits])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl that are losses of training steps; none if there is no such file. What is null there
    is NaN."""
    if not path.exists():
        return []
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
