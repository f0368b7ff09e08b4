"""Makes the page of a stage: which samples were dropped and why, with some to look at and listen to."""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmcontrast.data.page import media, media_type, page, svg
from mmcontrast.data.shard import ShardIndex
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, TextModality
from mmcontrast.modalities.image import DAMAGED, FORMATS

SHOWN = 6  # samples of each reason
REASONS = 20  # that are shown, the most frequent
DRAWN = 64  # parts, evenly spread, whose numbers are drawn
LARGEST, LARGEST_SOUND = 8 * 2**20, 200_000  # bytes of a member that is shown
SIDE = 160  # pixels of a picture's larger side on the page
KEPT = "kept"
SEEN = (*ImageModality.extensions, *AudioModality.extensions, *TextModality.extensions)


def report_page(
    stage: str,
    summary: Mapping[str, Any],
    open_shard: Callable[[int], ShardIndex],
    parts: Sequence[Path],
    infos: Sequence[Mapping[str, Any]],
) -> str:
    """Return the page as HTML: the same from the same samples.

    Args:
        open_shard: opens the shard of a number; few are opened.
        infos: the metadata of the parts.
    """
    sections = [_reasons(summary), _histograms(parts)]
    for reason in [KEPT, *list(summary["reasons"])[:REASONS]]:
        examples = [(k, row) for k, info in enumerate(infos) for row in info["examples"].get(reason, ())]
        chosen = [examples[k] for k in np.unique(np.linspace(0, len(examples) - 1, SHOWN).astype(int))] if examples else []
        cards = "".join(_card(open_shard(k), row, parts[k]) for k, row in chosen)
        if cards:
            sections.append(f'<h2>{html.escape(reason)}</h2><div class="cards">{cards}</div>')
    title = f"{stage}: {summary['kept']} of {summary['samples']} samples are kept"
    return page(title, sections)


def table_of(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _reasons(summary: Mapping[str, Any]) -> str:
    total = max(1, summary["samples"])
    rows = [(reason, count, f"{count / total:.2%}") for reason, count in summary["reasons"].items()]
    before = summary["samples"] - summary["given"]
    rows += [("dropped before", before, f"{before / total:.2%}")] if before else []
    rows.append((KEPT, summary["kept"], f"{summary['kept'] / total:.2%}"))
    text = table_of(("reason", "samples", "of all"), rows)
    if summary.get("rules"):
        rules = [(rule["rule"], rule["removed"], rule["alone"]) for rule in summary["rules"]]
        text += "<h2>Rules</h2>" + table_of(("rule", "removed, first of all", "would remove alone"), rules)
    return text


def _histograms(parts: Sequence[Path]) -> str:
    """Draw the measures of some of the parts."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    chosen = [parts[k] for k in np.unique(np.linspace(0, len(parts) - 1, DRAWN).astype(int))]
    schema = pq.read_schema(chosen[0])
    names = [field.name for field in schema if _is_number(field.type) and field.name != "row"]
    tables = [pq.read_table(path, columns=[name for name in names if name in pq.read_schema(path).names]) for path in chosen]
    drawn = []
    for name in names:
        values = [table[name].drop_null().to_numpy() for table in tables if name in table.column_names]
        column = np.concatenate(values).astype(np.float64) if values else np.empty(0)
        column = column[np.isfinite(column)]
        if len(column) and column.min() < column.max():
            low, high = np.quantile(column, (0.001, 0.999))
            drawn.append((name, column[(column >= low) & (column <= high)]))
    if not drawn:
        return ""
    with mpl.rc_context({"svg.hashsalt": "mmcontrast"}):  # the same page from the same numbers
        height = -(-len(drawn) // 4)
        figure = Figure(figsize=(11, 2.2 * height))
        axes = list(figure.subplots(height, 4, squeeze=False).flat)
        figure.subplots_adjust(0.06, 0.3 / (2.2 * height), 0.99, 1 - 0.3 / (2.2 * height), wspace=0.35, hspace=0.4)
        for axis, (name, column) in zip(axes, drawn, strict=False):
            axis.stairs(*np.histogram(column, bins=30), fill=True)
            axis.set_title(name, fontsize=10, y=1.0)
            axis.tick_params(labelsize=8)
            axis.locator_params(nbins=4)
        for axis in axes[len(drawn) :]:
            axis.set_axis_off()
        return f"<h2>Measures</h2>{svg(figure)}"


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _card(shard: ShardIndex, row: int, part: Path) -> str:
    """Show a sample: its members that can be seen and heard, and why it was dropped."""
    shown = []
    for extension in sorted(shard.extensions, key=lambda name: (name.rpartition(".")[2] not in ImageModality.extensions, name)):
        if extension.rpartition(".")[2] not in SEEN or not 0 <= shard.size(row, extension) <= LARGEST:
            continue
        try:
            data = shard.read(row, [extension]).get(extension)
        except (DecodeError, UserError) as error:
            data = str(error).encode()
        shown += [f"<p>{_thumbnail(data)}</p>"] if data else []
        if len(shown) == 4:
            break
    reason = pq.read_table(part, columns=["reason"])["reason"][row].as_py()
    reason_text = "" if reason is None else f"<p><small>{html.escape(reason)}</small></p>"
    return f'<div class="card"><small>{html.escape(shard.keys[row])}</small>{"".join(shown)}{reason_text}</div>'


def _thumbnail(data: bytes) -> str:
    """Return a member as HTML, a picture scaled down."""
    if not (media_type(data) or "").startswith("image"):
        return media(data) if len(data) <= LARGEST_SOUND else f"{len(data)} bytes"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > 64_000_000:
                return f"{image.width} × {image.height} pixels"
            image.draft("RGB", (SIDE, SIDE))
            small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except DAMAGED as error:
        return html.escape(f"a picture that cannot be decoded ({error})")
    small.thumbnail((SIDE, SIDE))
    target = io.BytesIO()
    small.save(target, "PNG" if small.mode == "RGBA" else "JPEG")
    return media(target.getvalue())
