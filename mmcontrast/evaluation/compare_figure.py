"""Plot a comparison of runs: a dot for each run with its interval, a row for each result, panels by task and split."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcontrast.data.page import page, svg
from mmcontrast.errors import UserError
from mmcontrast.evaluation.compare import Comparison, comparison_html

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")  # Okabe and Ito, for the colour-blind
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
ROW, PANEL, LEGEND = 0.17, 0.75, 0.5  # inches: height of a row without its runs, margins of a panel, height of the legend


def comparison_figure(comparison: Comparison) -> Any:
    """Return a matplotlib figure; it needs no display."""
    from matplotlib.figure import Figure

    splits, tasks = list(comparison.splits), _tasks(comparison)
    row = ROW + 0.07 * len(comparison.runs)
    heights = [PANEL + row * len(names) for names in tasks.values()]
    figure = Figure(figsize=(2.6 + 3.2 * len(splits), LEGEND + sum(heights)), layout="constrained")
    axes = figure.subplots(len(tasks), len(splits), squeeze=False, sharey="row", height_ratios=heights)
    for (task, names), panels in zip(tasks.items(), axes, strict=True):
        for split, axis in zip(splits, panels, strict=True):
            _draw(axis, comparison, [f"{split}/{name}" for name in names])
            axis.set_title(f"{split} · {task}", fontsize=10)
        panels[0].set_yticks(range(len(names)), [_label(name) for name in names], fontsize=8)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
    handles = []
    for k, run in enumerate(comparison.runs):
        handles += axes[0, 0].plot([], [], linestyle="", label=run.name, **_style(k))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), frameon=False, fontsize=9)
    return figure


def write_picture(comparison: Comparison, path: Path) -> None:
    """Write the figure as .png, .svg or .pdf.

    Raises:
        UserError: for another suffix, or a missing folder.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--png {path}: give a file that ends in .png, .svg or .pdf")
    _check_folder("--png", path)
    comparison_figure(comparison).savefig(path, dpi=150)


def write_page(comparison: Comparison, path: Path) -> None:
    """Write one HTML file with the figure, the table and the warnings.

    Raises:
        UserError: for a missing folder.
    """
    _check_folder("--html", path)
    heading = '<b style="color:#D55E00">Do not compare:</b>'
    warnings = [f"<p>{heading} {html.escape(warning)}</p>" for warning in comparison.warnings()]
    title = " · ".join(run.name for run in comparison.runs)
    sections = [*warnings, svg(comparison_figure(comparison)), comparison_html(comparison)]
    path.write_text(page(title, sections), encoding="utf-8")


def _check_folder(option: str, path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: no such folder")


def _tasks(comparison: Comparison) -> dict[str, list[str]]:
    """Return the results' names without their split, by panel: a task, with its ranks in a panel of their own."""
    tasks: dict[str, list[str]] = {}
    for name in dict.fromkeys(name.partition("/")[2] for name in comparison.names):
        task = name.partition("/")[0].replace("_", " ") + (", ranks" if "_rank" in name else "")
        tasks.setdefault(task, []).append(name)
    return tasks


def _draw(axis: Any, comparison: Comparison, names: Sequence[str]) -> None:
    """Draw one panel, the runs of a result slightly below each other."""
    count = len(comparison.runs)
    for k, run in enumerate(comparison.runs):
        shift = 0.7 * ((k + 0.5) / count - 0.5)
        for row, name in enumerate(names):
            if (result := run.results.get(name)) is None:
                continue
            if result.low is not None:
                axis.hlines(row + shift, result.low, result.high, color=_style(k)["color"], linewidth=1.3)
            axis.plot(result.value, row + shift, **_style(k))
    for row in range(1, len(names)):
        axis.axhline(row - 0.5, color="0.9", linewidth=0.6, zorder=0)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _style(k: int) -> dict[str, Any]:
    return {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "markersize": 4}


def _label(name: str) -> str:
    """Return "image → text, recall at 1" for "retrieval/image_to_text/recall_at_1"."""
    return ", ".join(part.replace("_to_", " → ").replace("_", " ") for part in name.split("/")[1:]) or name
