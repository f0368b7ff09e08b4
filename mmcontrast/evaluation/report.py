"""A run as one self-contained page: its curves, its results, and galleries of what it finds."""

import base64
import html
import io
import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from mmcontrast.data import ShardDataset
from mmcontrast.evaluation.embed import EmbeddingTable
from mmcontrast.evaluation.evaluate import Results, shown_results
from mmcontrast.evaluation.retrieval import first_of_each_group
from mmcontrast.modalities import AudioModality, ImageModality, TextModality
from mmcontrast.model import ContrastiveModel

QUERIES, SHOWN = 6, 8  # of each gallery: rows, and hits in a row
TYPES = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
TYPES |= {"flac": "audio/flac", "wav": "audio/wav", "ogg": "audio/ogg", "mp3": "audio/mpeg"}
STYLE = """
:root{color-scheme:light dark;--line:#8884;--hit:#1a9850}
body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left}
.row{display:grid;grid-template-columns:12rem repeat(auto-fill,minmax(6.2rem,1fr));gap:.4rem;padding:.5rem 0;
border-bottom:1px solid var(--line)}
.query{font-weight:600;align-self:center}.item{font-size:.78rem;text-align:center;overflow-wrap:anywhere;
border:2px solid transparent;border-radius:.4rem;padding:.2rem}
.hit{border-color:var(--hit)}.hit::after{content:"✓";color:var(--hit);font-weight:700}
img.media{width:56px;height:56px;image-rendering:auto;background:#fff}audio{width:100%;height:2rem}
.curves svg{max-width:100%;height:auto;background:#fff}
"""


def write_report(
    path: Path,
    name: str,
    results: Results,
    log: Sequence[dict[str, Any]],
    split: str,
    model: ContrastiveModel,
    dataset: ShardDataset,
    table: EmbeddingTable,
) -> None:
    """Writes the page. `log` are the lines of metrics.jsonl; `split` is the data set shown in the galleries."""
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        f'<h2>Training</h2><div class="curves">{_curves(log)}</div>' if log else "",
        f"<h2>Results</h2>{_results(results)}",
        *(_gallery(query, found, split, model, dataset, table) for query, found in _galleries(model, table)),
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(name)}</title><style>{STYLE}</style>{''.join(sections)}</html>"
    )
    path.write_text(page, encoding="utf-8")


def _galleries(model: ContrastiveModel, table: EmbeddingTable) -> list[tuple[str, str]]:
    """Every ordered pair of fields that a person can look at or listen to."""
    shown = [f for f in table.fields if isinstance(model.modality(f), ImageModality | TextModality | AudioModality)]
    return list(permutations(shown, 2))


def _curves(log: Sequence[dict[str, Any]]) -> str:
    """Loss, logit scale, learning rate and speed by step, and the signals of pairs and directions, as one SVG."""
    from matplotlib.figure import Figure

    rows = [["loss", "logit_scale", "lr", "samples_per_second"]]
    if any(key.startswith("signals/") for key in log[-1]):
        rows.append(["accuracy", "effective_negatives", "alignment", "loss of pairs"])
    figure = Figure(figsize=(11, 2.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False)
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
        axis.set_title(key.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = target.getvalue()
    return text[text.index("<svg") :]


def _results(results: Results) -> str:
    splits, rows = shown_results(results)
    head = "".join(f"<th>{html.escape(split)}</th>" for split in ["", *splits])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _gallery(query: str, found: str, split: str, model: ContrastiveModel, dataset: ShardDataset, table: EmbeddingTable) -> str:
    """Queries drawn once and for all by a fixed seed, so that the galleries of two runs can be compared."""
    queries = table.present[query].nonzero().squeeze(1)
    candidates = table.present[found].nonzero().squeeze(1)
    if isinstance(model.modality(found), TextModality):
        candidates = candidates[first_of_each_group(table.group_ids[candidates])]
    chosen = queries[torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:QUERIES]]
    rows = []
    for row in chosen.tolist():
        scores = table.fields[found][candidates] @ table.fields[query][row]
        items = []
        for best in candidates[scores.topk(min(SHOWN, len(candidates))).indices].tolist():
            hit = " hit" if table.group_ids[best] == table.group_ids[row] else ""
            items.append(f'<div class="item{hit}">{_media(dataset, found, best, table)}</div>')
        rows.append(f'<div class="row"><div class="query">{_media(dataset, query, row, table)}</div>{"".join(items)}</div>')
    return f"<h2>{html.escape(query)} → {html.escape(found)}, {html.escape(split)}</h2>{''.join(rows)}"


def _media(dataset: ShardDataset, field: str, row: int, table: EmbeddingTable) -> str:
    """A sample's field as HTML: its own bytes, embedded."""
    extensions = dataset.keys[field]
    members = dataset.members(row, extensions)
    extension = next(e for e in extensions if e in members)
    data = members[extension]
    caption = html.escape(str(table.metadata[row].get("name", "")))
    if extension not in TYPES:
        return html.escape(data.decode("utf-8", "replace")[:300])
    source = f"data:{TYPES[extension]};base64,{base64.b64encode(data).decode()}"
    if TYPES[extension].startswith("image"):
        return f'<img class="media" src="{source}" alt="{caption}"><br>{caption}'
    return f'<audio controls preload="none" src="{source}"></audio>{caption}'


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are losses of training steps; none if there is no such file."""
    if not path.exists():
        return []
    return [line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]
