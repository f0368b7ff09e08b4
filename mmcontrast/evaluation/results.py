"""Results of an evaluation: values with their intervals and classification reports, as JSON and as a table."""

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
DETAILS = re.compile(r"/(num_|all_recall_at_|antihubs)|/retrieval/[^/]+_to_[^/]+/(ndcg_at_|map(@|$))")  # in results.json only
Results = dict[str, float]  # "val/retrieval/image_to_text/recall_at_1": 0.5


@dataclass
class Evaluation:
    """The results of an evaluation.

    Attributes:
        values: by name.
        intervals: by name, 95 % percentile intervals of the bootstrap over samples, of the values that have one.
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

    def add_means(self, prefix: str, values: Mapping[str, Tensor], clusters: Tensor | None = None) -> None:
        """Add the means over samples of values [N] each; of `rank`, the median.

        Args:
            clusters: int64 [N], samples that are not independent of each other.
        """
        averaged = {name: samples for name, samples in values.items() if name != "rank"}
        self.values |= {f"{prefix}/{name}": samples.double().mean().item() for name, samples in averaged.items()}
        if self.resamples and averaged:
            interval = mean_interval(torch.stack(list(averaged.values()), 1), self.resamples, clusters=clusters)
            self._add_intervals([f"{prefix}/{name}" for name in averaged], *interval)
        if "rank" in values:
            ranks = values["rank"].double()
            self.values[f"{prefix}/median_rank"] = ranks.quantile(0.5).item() if len(ranks) else float("nan")
            if self.resamples:
                interval = quantile_interval(ranks[:, None], 0.5, self.resamples, clusters=clusters)
                self._add_intervals([f"{prefix}/median_rank"], *interval)

    def add_estimates(self, prefix: str, estimates: Mapping[str, Estimate], clusters: Tensor | None = None) -> None:
        """Add estimates over the same samples, and their intervals."""
        names = [f"{prefix}/{name}" for name in estimates]
        self.values |= {name: estimate.value for name, estimate in zip(names, estimates.values(), strict=True)}
        if self.resamples and estimates:
            bounds = intervals(list(estimates.values()), clusters=clusters, resamples=self.resamples)
            self._add_intervals(names, *bounds)

    def add_report(self, prefix: str, report: Report, classes: Sequence[str], clusters: Tensor | None = None) -> None:
        """Add a classification report and its values; `clusters`: as of `add_means`."""
        self.add_estimates(prefix, report.estimates, clusters)
        self.values[f"{prefix}/num_samples"] = int(report.support.sum())
        self.reports[prefix] = report, list(classes)

    def by_width(
        self, table: EmbeddingTable, widths: Iterable[int]
    ) -> Iterator[tuple[int | None, EmbeddingTable, "Evaluation"]]:
        """Yield (None, table, this), and of each width (width, the first numbers of all embeddings, where their results go):
        they become results of this, "…/recall_at_1@64"."""
        yield None, table, self
        for width in widths:
            narrow = Evaluation(self.resamples)
            yield width, table.prefix(width), narrow
            self.values |= {f"{name}@{width}": value for name, value in narrow.values.items()}
            self.intervals |= {f"{name}@{width}": interval for name, interval in narrow.intervals.items()}

    def _add_intervals(self, names: Sequence[str], low: Tensor, high: Tensor) -> None:
        self.intervals |= dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True))

    def to_json(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Return the contents of results.json; `description`: the model, the data and the options."""
        results = {}
        for name, value in self.values.items():
            results[name] = {"value": value}
            if name in self.intervals:
                results[name]["low"], results[name]["high"] = self.intervals[name]
        return {
            "format": FORMAT,
            **description,
            "versions": {package: installed(package) for package in PACKAGES} | {"python": sys.version.split()[0]},
            "command": " ".join(["mmcontrast", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "results": results,
            "notes": self.notes,
            "reports": {prefix: _report_json(*report) for prefix, report in self.reports.items()},
        }


def installed(package: str) -> str | None:
    """Return a package's version; None if it is imported from a checkout without being installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _report_json(report: Report, classes: Sequence[str]) -> dict[str, Any]:
    """Return a report as JSON; `confusion`: [true class, predicted class, samples] of the cells that are not empty."""
    cells = report.confusion.nonzero()
    columns = {name: getattr(report, name).tolist() for name in ("precision", "recall", "f1", "support")}
    counts = report.confusion[cells[:, 0], cells[:, 1]]
    return {"classes": list(classes), **columns, "confusion": torch.cat([cells, counts[:, None]], 1).tolist()}


def shown_results(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Return the splits, and rows of a result's name and its value in each split, without the details."""
    splits = list(dict.fromkeys(name.split("/")[0] for name in evaluation.values))
    rows = []
    for name in dict.fromkeys(name.partition("/")[2] for name in evaluation.values if not DETAILS.search(name)):
        rows.append([name, *(_shown(f"{split}/{name}", evaluation) for split in splits)])
    return splits, rows


def _shown(name: str, evaluation: Evaluation) -> str:
    """Return a value and half of its interval's width: "0.531 ±.021"."""
    if name not in evaluation.values:
        return ""
    digits = 0 if name.partition("@")[0].endswith("median_rank") else 3
    low, high = evaluation.intervals.get(name, (math.nan, math.nan))
    margin = "" if math.isnan(high - low) else f" ±{(high - low) / 2:.{digits}f}".replace("±0.", "±.")
    return f"{evaluation.values[name]:.{digits}f}{margin}"


def results_table(evaluation: Evaluation) -> Table:
    """Return a table for the terminal, without the geometry, which the page shows."""
    splits, rows = shown_results(evaluation)
    table = Table(title="evaluation" + (" (±: half of the 95 % interval)" if evaluation.intervals else ""))
    table.caption, table.caption_justify = Text("\n".join(evaluation.notes)) if evaluation.notes else None, "left"
    table.add_column(no_wrap=True)
    for number, split in enumerate(splits, 1):  # a narrow terminal cuts names, not numbers
        table.add_column(split, justify="right", no_wrap=True, min_width=max((len(row[number]) for row in rows), default=0))
    previous_task = ""
    for name, *cells in rows:
        task, _, metric = name.rpartition("/")
        if task.startswith("geometry/"):
            continue
        if task != previous_task:
            table.add_row(f"[bold]{task.replace('_to_', ' → ')}[/]")
        table.add_row(f"  {metric}", *cells)
        previous_task = task
    return table
