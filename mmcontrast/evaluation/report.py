"""Write a run's results as JSON and as one self-contained page: results, galleries, curves, details."""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcontrast.data import ShardDataset, ShardOptions
from mmcontrast.data.class_texts import FOLDER
from mmcontrast.data.keys import member_name
from mmcontrast.data.page import folded, heat_map, page, svg
from mmcontrast.evaluation.before import before_and_after, report_split
from mmcontrast.evaluation.classification import Report
from mmcontrast.evaluation.compare import HEADLINES
from mmcontrast.evaluation.gallery import galleries, gallery
from mmcontrast.evaluation.options import EvaluationOptions
from mmcontrast.evaluation.results import Evaluation, shown_results
from mmcontrast.models import ContrastiveModel
from mmcontrast.whole_files import write_json, write_text

LOG, RESULTS, REPORT = "metrics.jsonl", "results.json", "report.html"
LISTED, MATRIX = 100, 40  # the most classes of a table, and of a matrix of confusion
PAIR = re.compile(r"retrieval/(?P<query>[^/]+)_to_(?P<candidate>[^/]+)/recall_at_1")


def write_report(
    path: Path,
    name: str,
    evaluation: Evaluation,
    log: Sequence[dict[str, Any]],
    step: int | None,
    model: ContrastiveModel,
    datasets: Mapping[str, ShardDataset],
    options: EvaluationOptions,
) -> None:
    """Write the page. `log` are the lines of metrics.jsonl; `step`: that of results that evaluations.jsonl lacks."""
    split = report_split(options)
    table, dataset = evaluation.tables[split], datasets[split]
    sections = [
        f"<h2>Results</h2>{_summary(evaluation)}",
        *before_and_after(path.parent, evaluation, step, model, datasets, options),
        *(
            gallery(query, candidate, split, model, dataset, table, evaluation.bank)
            for query, candidate in galleries(model, table)
        ),
        f"<h2>Training</h2>{_curves(log)}" if log else "",
        "<h2>Details</h2>",
        *(_classes(task, *report) for task, report in evaluation.reports.items()),
        folded("All results", _results(evaluation)),
    ]
    write_text(path, page(name, sections), errors="backslashreplace")


def write_table_report(path: Path, name: str, evaluation: Evaluation) -> None:
    """Write the page of an evaluation whose samples are not at hand: results alone."""
    sections = [f"<h2>Results</h2>{_summary(evaluation)}", "<h2>Details</h2>", folded("All results", _results(evaluation))]
    write_text(path, page(name, sections), errors="backslashreplace")


def _summary(evaluation: Evaluation) -> str:
    """Return the main numbers: recall at 1 of every pair of fields as a matrix a split, and the headline of each task."""
    splits, rows = shown_results(evaluation)
    matrices = [matrix for split in splits if (matrix := _recall_matrix(evaluation, split))]
    headlines = [row for row in rows if row[0].rpartition("/")[2] in HEADLINES and not PAIR.fullmatch(row[0])]
    if not matrices and not headlines:
        return _results(evaluation)
    return f'<div class="side">{"".join(matrices)}</div>{_table(splits, headlines) if headlines else ""}'


def _recall_matrix(evaluation: Evaluation, split: str) -> str:
    """Return recall at 1 from every field to every other, with intervals; nothing where no pair was evaluated."""
    names = {}
    for name in evaluation.values:
        if match := PAIR.fullmatch(name.removeprefix(f"{split}/")):
            names[match["query"], match["candidate"]] = name
    fields = sorted({field for pair in names for field in pair})
    shares, intervals = {}, {}
    for (query, candidate), name in names.items():
        cell = fields.index(query), fields.index(candidate)
        if not math.isnan(evaluation.values[name]):
            shares[cell] = evaluation.values[name]
        if name in evaluation.intervals:
            intervals[cell] = "{:.3f} to {:.3f}".format(*evaluation.intervals[name])
    return heat_map(f"{split}: recall at 1", fields, [f"→ {field}" for field in fields], shares, intervals) if names else ""


def _curves(log: Sequence[dict[str, Any]]) -> str:
    """Plot loss, logit scale, learning rate and speed by step, and the signals of pairs and directions, as one SVG."""
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


def _read_keys(dataset: ShardDataset) -> dict[str, list[str]]:
    """Return the members that each field is read from, of those that the shards have."""
    members = {FOLDER, *(extension for shard in dataset.shards for extension in shard.extensions)}
    return {field: [key for key in keys if member_name(key) in members] for field, keys in dataset.keys.items()}


def write_results(
    folder: Path,
    name: str,
    evaluation: Evaluation,
    model: ContrastiveModel,
    datasets: Mapping[str, ShardDataset],
    options: EvaluationOptions,
    description: Mapping[str, Any],
) -> None:
    """Write results.json and report.html. `description` says which model it was."""
    data = {
        split: {
            "shards": ShardOptions.of(options.splits[split]).shown(),
            "digest": datasets[split].digest,
            "samples": len(table),
            "keys": _read_keys(datasets[split]),
        }
        for split, table in evaluation.tables.items()
    }
    data |= {name: {"digest": each.digest, "samples": len(each)} for name, each in datasets.items() if name not in data}
    write_json(folder / RESULTS, evaluation.to_json({**description, "data": data, "options": options.model_dump(mode="json")}))
    step = description.get("training", {}).get("step")
    write_report(folder / REPORT, name, evaluation, read_log(folder / LOG), step, model, datasets, options)


def _classes(task: str, report: Report, classes: Sequence[str]) -> str:
    """Return a folded table of each class's numbers and of the classes that it is mistaken for most, and their confusion."""
    lines = []
    for k in report.f1.argsort()[:LISTED].tolist():
        others = report.confusion[k].clone()
        others[k] = 0
        mistaken = [f"{classes[o]} ({int(others[o])})" for o in others.argsort(descending=True)[:3].tolist() if others[o]]
        numbers = [f"{float(values[k]):.3f}" for values in (report.precision, report.recall, report.f1)]
        cells = [classes[k], *numbers, str(int(report.support[k])), ", ".join(mistaken)]
        lines.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("", "precision", "recall", "F1", "samples", "mistaken for"))
    confusion = _confusion(report, classes) if len(classes) <= MATRIX else ""
    extent = "" if len(classes) <= LISTED else f", the {LISTED} of {len(classes)} with the least F1"
    table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    return folded(f"{task}: classes{extent}", f"{table}{confusion}")


def _confusion(report: Report, classes: Sequence[str]) -> str:
    """Return the share of each true class, a row, that is taken for each class."""
    shares = report.confusion / report.support.clamp(min=1)[:, None]
    cells = {(row, column): float(shares[row, column]) for row, column in (shares >= 0.0005).nonzero().tolist()}
    return heat_map("Confusion: a row's class is taken for a column's", classes, classes, cells, {})


def _results(evaluation: Evaluation) -> str:
    """Return all results but the details, and the notes, as HTML."""
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in evaluation.notes)
    return _table(*shown_results(evaluation)) + notes


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
