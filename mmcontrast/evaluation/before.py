"""Show what training has changed: results at the first and the last evaluation, their curves, and samples that are retrieved
now and were not before, or the reverse.

`train.evaluate_first` keeps step 0: its results are a line of evaluations.jsonl, and its embeddings of the split that the page
shows (of its first 10,000 samples) an embedding table in the run's folder, `before/`.
"""

import html
import json
import math
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcontrast.data import ShardDataset
from mmcontrast.data.page import folded, svg
from mmcontrast.evaluation.compare import HEADLINES
from mmcontrast.evaluation.embed import MANIFEST, EmbeddingTable
from mmcontrast.evaluation.gallery import candidates_of, drawn, galleries, row_of_hits, sample_as_html
from mmcontrast.evaluation.neighbours import nearest
from mmcontrast.evaluation.options import EvaluationOptions
from mmcontrast.evaluation.results import Evaluation, shown_results
from mmcontrast.models import ContrastiveModel

EVALUATIONS, BEFORE = "evaluations.jsonl", "before"
KEPT = 10_000  # samples whose embeddings of step 0 are kept
CHANGED, HITS = 3, 4  # queries that are shown of each kind of change, and hits of each
NO_RESULT = {"splits", "resamples", "best", "report_split", "batch_size", "num_workers"}  # options that change no value
CURVES = re.compile(r"/(mean_recall_at_\d+|top1)$")  # results whose curve is drawn
PANELS, COLUMNS = 8, 3  # splits whose curves are drawn, and of these in a row


def report_split(options: EvaluationOptions) -> str:
    """Return the name of the split whose samples a page shows."""
    return options.report_split or next(iter(options.splits))


def keep_before(
    folder: Path, evaluation: Evaluation, datasets: Mapping[str, ShardDataset], options: EvaluationOptions
) -> EmbeddingTable:
    """Write the embeddings of step 0 to a run's folder, with the conditions that a comparison requires; return them."""
    split = report_split(options)
    table = evaluation.tables[split].first(KEPT)
    table.write(folder / BEFORE, {"split": split, **_conditions(datasets, options)})
    return table


def _conditions(datasets: Mapping[str, ShardDataset], options: EvaluationOptions) -> dict[str, Any]:
    """Return the data and the options that determine results beside the model, as JSON."""
    digests = {split: datasets[split].digest for split in options.splits}
    return {"data": digests, "options": options.model_dump(mode="json", exclude=NO_RESULT)}


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's evaluations.jsonl, each with its `step`; null becomes NaN."""
    file = folder / EVALUATIONS
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


def before_and_after(
    folder: Path,
    evaluation: Evaluation,
    step: int | None,
    model: ContrastiveModel,
    datasets: Mapping[str, ShardDataset],
    options: EvaluationOptions,
) -> list[str]:
    """Return sections of a run's page: the curves of its results, and the changes since step 0, if that was evaluated.

    Args:
        evaluation: the current results, at `step` if they are no line of evaluations.jsonl yet.
    """
    lines = read_evaluations(folder)
    if step is not None and step not in [line["step"] for line in lines]:
        lines.append({"step": step, **evaluation.values})
    sections = [f"<h2>Results by step</h2>{_courses(lines)}"] if len(lines) > 1 else []
    first = next((line for line in lines if line["step"] == 0), None)
    if first is None or not (folder / BEFORE / MANIFEST).exists():
        return sections
    recorded, current = json.loads((folder / BEFORE / MANIFEST).read_text()), _conditions(datasets, options)
    same_splits = [split for split in current["data"] if current["data"][split] == recorded["data"].get(split)]
    if not same_splits or current["options"] != recorded["options"]:
        return sections  # other data, or other tasks, than those of step 0
    sections.append(f"<h2>Before and after training</h2>{_differences(first, evaluation, same_splits)}")
    split = recorded["split"]
    if split in same_splits and split in evaluation.tables:
        table_before, table_after = EmbeddingTable.read(folder / BEFORE), evaluation.tables[split].first(KEPT)
        sections += changes(split, table_before, table_after, model, datasets[split])
    return sections


def _courses(lines: list[dict[str, Any]]) -> str:
    """Plot the main results of each split by step, as one SVG."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for line in lines for name in line if name != "step"))
    names = [name for name in names if CURVES.search(name)] or names[:PANELS]
    splits = list(dict.fromkeys(name.partition("/")[0] for name in names))[:PANELS]
    height = math.ceil(len(splits) / COLUMNS)
    figure = Figure(figsize=(11, 3 * height))
    axes = figure.subplots(height, COLUMNS, squeeze=False)
    figure.subplots_adjust(0.06, 0.5 / (3 * height), 0.99, 1 - 0.3 / (3 * height), wspace=0.25, hspace=0.45)
    for axis, split in zip_longest(axes.flat, splits):
        if split is None:
            axis.set_axis_off()
            continue
        for name in (name for name in names if name.startswith(f"{split}/")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name.partition("/")[2])
        axis.set_title(split, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    return svg(figure)


def _differences(first: Mapping[str, float], evaluation: Evaluation, splits: list[str]) -> str:
    """Return a table of results at step 0, now, and their differences: the main ones, and all of them folded."""
    _, rows = shown_results(evaluation)
    names = [name for name, *_ in rows if not name.startswith("geometry/")]
    head = "".join(f"<th>{html.escape(split)}: before</th><th>after</th><th>difference</th>" for split in splits)
    body, main = [], []
    for name in names:
        cells = []
        for split in splits:
            before, after = first.get(f"{split}/{name}"), evaluation.values.get(f"{split}/{name}")
            if before is None or after is None:
                cells += [""] * 3
                continue
            digits = 1 if name.partition("@")[0].endswith("median_rank") else 3
            difference = round(after - before, digits) + 0.0  # no −0
            cells += [f"{before:.{digits}f}", f"{after:.{digits}f}", f"{difference:+.{digits}f}"]
        body.append(f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        if name.rpartition("/")[2] in HEADLINES:
            main.append(body[-1])
    of_main, of_all = (f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>" for rows in (main, body))
    if len(main) in (0, len(body)):
        return f'<div class="wide">{of_all}</div>'
    return f'<div class="wide">{of_main}</div>{folded("All results before and after", of_all)}'


def first_hits(query: str, candidate: str, model: ContrastiveModel, table: EmbeddingTable) -> tuple[Tensor, Tensor]:
    """Return (rows [Q] that have the query's field, rows [Q, k] of their first hits, the best first)."""
    queries, candidates = table.present[query].nonzero().squeeze(1), candidates_of(model, candidate, table)
    if not len(queries) or not len(candidates):
        return queries[:0], torch.zeros(0, HITS, dtype=torch.int64)
    k = min(HITS, len(candidates))
    rows = table.compared(table.fields[query][queries]), table.compared(table.fields[candidate][candidates], columns=True)
    _, hits = nearest(*rows, k)
    return queries, candidates[hits]


def changes(
    split: str, before: EmbeddingTable, after: EmbeddingTable, model: ContrastiveModel, dataset: ShardDataset
) -> list[str]:
    """Return a section for every pair of fields: how many queries' first hits have become right, and wrong, with examples of
    each, their hits before above those after. None if the tables are not of the same samples and fields."""
    same_samples = torch.equal(before.sample_ids, after.sample_ids) and list(before.fields) == list(after.fields)
    if not same_samples or any(not torch.equal(present, after.present[field]) for field, present in before.present.items()):
        return []
    sections = []
    for query, candidate in galleries(model, after):
        queries, hits_before = first_hits(query, candidate, model, before)
        _, hits_after = first_hits(query, candidate, model, after)
        if not len(queries):
            continue
        groups = after.group_ids
        right_before, right_after = (groups[hits[:, 0]] == groups[queries] for hits in (hits_before, hits_after))
        gained, lost = (right_after & ~right_before).nonzero().squeeze(1), (right_before & ~right_after).nonzero().squeeze(1)
        blocks = []
        for title, positions in (("right now, wrong before", gained), ("wrong now, right before", lost)):
            blocks += [f"<h3>{title}: {len(positions)} of {len(queries)}</h3>"]
            for position in drawn(positions, CHANGED):
                row = int(queries[position])
                sample_html = f"{sample_as_html(dataset, query, row, after)}<br><small>before</small>"
                for heading, hits in ((sample_html, hits_before), ("<small>after</small>", hits_after)):
                    blocks.append(row_of_hits(heading, hits[position].tolist(), row, candidate, dataset, after))
        title = f"What has changed: {html.escape(query)} → {html.escape(candidate)}, {html.escape(split)}"
        sections.append(f"<h2>{title}</h2>{''.join(blocks)}")
    return sections
