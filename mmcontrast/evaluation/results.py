"""What an evaluation finds: numbers with their intervals, reports of classes, and how they are written and shown."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mmcontrast.evaluation.banks import Bank
from mmcontrast.evaluation.bootstrap import Estimate, intervals, mean_interval, quantile_interval
from mmcontrast.evaluation.classification import Report
from mmcontrast.evaluation.embed import EmbeddingTable

FORMAT = "mmcontrast results 1"
PACKAGES = ("mmcontrast", "torch", "open_clip_torch", "transformers", "timm", "numpy")
DETAILS = re.compile(r"/(num_|all_recall_at_|antihubs)|/retrieval/[^/]+_to_[^/]+/(ndcg_at_|map(@|$))")  # of results.json alone
Results = dict[str, float]  # "val/retrieval/image_to_text/recall_at_1": 0.5


@dataclass
class Evaluation:
    """
    Attributes:
        values: by name.
        intervals: of those that have one, 95 % percentile intervals of the bootstrap over samples.
        reports: of classification, with the classes' names, by task: "val/zero_shot/script".
        tables: each split's embeddings.
        resamples: of the bootstrap; 0: no intervals.
        notes: what was left out, a sentence each.
        bank: through which fields were compared.
    """

    resamples: int = 0
    values: Results = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    reports: dict[str, tuple[Report, list[str]]] = field(default_factory=dict)
    tables: dict[str, EmbeddingTable] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bank: Bank | None = None

    def add_means(self, place: str, values: Mapping[str, Tensor], clusters: Tensor | None = None) -> None:
        """Means over samples of values [N] each; of `rank`, the median.

        Args:
            clusters: int64 [N], samples that are not independent of each other.
        """
        means = {name: of for name, of in values.items() if name != "rank"}
        self.values |= {f"{place}/{name}": of.double().mean().item() for name, of in means.items()}
        if self.resamples and means:
            found = mean_interval(torch.stack(list(means.values()), 1), self.resamples, clusters=clusters)
            self._add_intervals([f"{place}/{name}" for name in means], *found)
        if "rank" in values:
            ranks = values["rank"].double()
            self.values[f"{place}/median_rank"] = ranks.quantile(0.5).item() if len(ranks) else float("nan")
            if self.resamples:
                found = quantile_interval(ranks[:, None], 0.5, self.resamples, clusters=clusters)
                self._add_intervals([f"{place}/median_rank"], *found)

    def add_estimates(self, place: str, estimates: Mapping[str, Estimate], clusters: Tensor | None = None) -> None:
        """Numbers of the same samples, which know what they are for resamples."""
        names = [f"{place}/{name}" for name in estimates]
        self.values |= {name: estimate.value for name, estimate in zip(names, estimates.values(), strict=True)}
        if self.resamples and estimates:
            found = intervals(list(estimates.values()), clusters=clusters, resamples=self.resamples)
            self._add_intervals(names, *found)

    def add_report(self, place: str, report: Report, classes: Sequence[str]) -> None:
        """Of a classification; its numbers too."""
        self.add_estimates(place, report.estimates)
        self.values[f"{place}/num_samples"] = int(report.support.sum())
        self.reports[place] = report, list(classes)

    def add_prefixes(self, found: "Evaluation", width: int) -> None:
        """What was found of the first numbers of all embeddings alone: "…/recall_at_1@64"."""
        self.values |= {f"{name}@{width}": value for name, value in found.values.items()}
        self.intervals |= {f"{name}@{width}": interval for name, interval in found.intervals.items()}

    def _add_intervals(self, names: Sequence[str], low: Tensor, high: Tensor) -> None:
        self.intervals |= dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True))

    def to_json(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """All that is needed to repeat and to compare it; `about` says of which model, on which data, by which options."""
        results = {}
        for name, value in self.values.items():
            results[name] = {"value": value}
            if name in self.intervals:
                results[name]["low"], results[name]["high"] = self.intervals[name]
        return {
            "format": FORMAT,
            **about,
            "versions": {package: installed(package) for package in PACKAGES} | {"python": sys.version.split()[0]},
            "command": " ".join(["mmcontrast", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "results": results,
            "notes": self.notes,
            "reports": {place: _report_json(*report) for place, report in self.reports.items()},
        }


def installed(package: str) -> str | None:
    """Return a package's version; None of one that is imported from a checkout without being installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _report_json(report: Report, classes: Sequence[str]) -> dict[str, Any]:
    """`confusion`: [true class, predicted class, samples] of the cells that are not empty."""
    cells = report.confusion.nonzero()
    columns = {name: getattr(report, name).tolist() for name in ("precision", "recall", "f1", "support")}
    counts = report.confusion[cells[:, 0], cells[:, 1]]
    return {"classes": list(classes), **columns, "confusion": torch.cat([cells, counts[:, None]], 1).tolist()}


def shown_results(found: Evaluation) -> tuple[list[str], list[list[str]]]:
    """What a person wants to see: the splits, and rows of a task's name and its value in each split."""
    splits = list(dict.fromkeys(name.split("/")[0] for name in found.values))
    rows = []
    for name in dict.fromkeys(name.partition("/")[2] for name in found.values if not DETAILS.search(name)):
        rows.append([name, *(_shown(f"{split}/{name}", found) for split in splits)])
    return splits, rows


def _shown(name: str, found: Evaluation) -> str:
    """0.531 ±.021: half of the interval's width."""
    if name not in found.values:
        return ""
    digits = 0 if name.partition("@")[0].endswith("median_rank") else 3
    low, high = found.intervals.get(name, (math.nan, math.nan))
    span = "" if math.isnan(high - low) else f" ±{(high - low) / 2:.{digits}f}".replace("±0.", "±.")
    return f"{found.values[name]:.{digits}f}{span}"


def results_table(found: Evaluation) -> Table:
    """For a terminal: without the geometry, which the page shows."""
    splits, rows = shown_results(found)
    table = Table(title="evaluation" + (" (±: half of the 95 % interval)" if found.intervals else ""))
    table.caption, table.caption_justify = Text("\n".join(found.notes)) if found.notes else None, "left"
    table.add_column(no_wrap=True)
    for number, split in enumerate(splits, 1):  # a narrow terminal cuts names, not numbers
        table.add_column(split, justify="right", no_wrap=True, min_width=max((len(row[number]) for row in rows), default=0))
    before = ""
    for name, *cells in rows:
        task, _, metric = name.rpartition("/")
        if task.startswith("geometry/"):
            continue
        if task != before:
            table.add_row(f"[bold]{task.replace('_to_', ' → ')}[/]")
        table.add_row(f"  {metric}", *cells)
        before = task
    return table
