"""Compare runs: their results.json as one table or as JSON, with warnings where they are not comparable."""

import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError

FORMAT = "mmcontrast results 1"
LOWER_IS_BETTER = {"rank", "alignment", "uniformity", "gap", "skewness", "hubness", "antihubs", "variance", "loss"}
HIGHER_ALL_THE_SAME = {"effective"}  # both: words in a result's name
BETTER, WORSE = "▲", "▼"


@dataclass(frozen=True)
class Result:
    """A value, its interval if it is known, and its number of samples."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def of(cls, entry: Any) -> "Result":
        """Parse an entry of a file: a number, or a mapping with an interval; null becomes NaN."""
        entry = entry if isinstance(entry, dict) else {"value": entry}
        value, interval = entry["value"], (entry.get("low"), entry.get("high"))
        low, high = (None, None) if None in interval or any(map(math.isnan, interval)) else interval
        return cls(math.nan if value is None else float(value), low, high, entry.get("n"))

    def shown(self, digits: int) -> str:
        return f"{self.value:.{digits}f}" + ("" if self.low is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]")

    def apart_from(self, other: "Result") -> bool:
        """Return whether each value lies outside the other's interval; False if an interval is unknown."""
        return self._misses(other.value) and other._misses(self.value)

    def _misses(self, value: float) -> bool:
        if self.low is None or self.high is None or math.isnan(value):
            return False
        return not self.low <= value <= self.high


@dataclass(frozen=True)
class RunResults:
    """One run's results.json.

    Attributes:
        name: of the run, unique among those that are compared.
        results: by name, "val/retrieval/image_to_text/recall_at_1".
        digests: of each split's data, if the file has them.
        settings: `settings_of` the evaluation and the precision, as JSON, if the file has them.
    """

    name: str
    path: Path
    results: dict[str, Result]
    digests: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


HEADLINES = ("recall_at_1", "mean_recall_at_1", "top1", "mean_rank_variance")
SETTINGS = ("scoring", "whiten")  # options that change results of the same names, as those of these tasks do
TASKS, NO_SETTINGS = ("zero_shot", "retrieval", "languages", "probes"), ("splits", "train")
PROBE = "probe "  # begins the name of a probe's training data, among the digests
SHOWN = 60  # characters of a setting
SHORT = 24  # results that are shown in full


@dataclass(frozen=True)
class Comparison:
    """Runs to compare, and the names of the results to show, in order."""

    runs: list[RunResults]
    names: list[str]

    @property
    def splits(self) -> dict[str, list[str]]:
        """Return the names by split."""
        names_by_split: dict[str, list[str]] = {}
        for name in self.names:
            names_by_split.setdefault(name.partition("/")[0], []).append(name)
        return names_by_split

    def headline(self) -> "Comparison":
        """Return the comparison of a long list's main results only: recall at 1, and accuracies."""
        chosen = [name for name in self.names if name.rpartition("/")[2] in HEADLINES]
        return self if len(self.names) <= SHORT or not chosen else replace(self, names=chosen)

    def best(self, name: str) -> float | None:
        """Return the best value; None if there are fewer than two."""
        values = [run.results[name].value for run in self.runs if name in run.results]
        values = [value for value in values if not math.isnan(value)]
        return (min if lower_is_better(name) else max)(values) if len(values) > 1 else None

    def mark(self, name: str, run: RunResults) -> str:
        """Return ▲ or ▼ for a result that is better or worse than the first run's, and `apart_from` it; else ""."""
        first, result = self.runs[0].results.get(name), run.results.get(name)
        if not first or not result or run is self.runs[0] or not result.apart_from(first):
            return ""
        return BETTER if (result.value < first.value) == lower_is_better(name) else WORSE

    def warnings(self) -> list[str]:
        """Return a sentence for each setting, and for each split, with which the runs were evaluated differently."""
        warnings = []
        for setting in sorted({name for run in self.runs for name in run.settings}):
            values = {run.name: run.settings[setting] for run in self.runs if setting in run.settings}
            if len(set(values.values())) > 1:
                shown = ", ".join(f"{run} {value}" for run, value in _differing(values).items())
                warnings.append(f"not evaluated alike: {setting} is {shown}")
        probes = {name for run in self.runs for name in run.digests if name.startswith(PROBE)}
        shown_probes = (name for name in sorted(probes) if any(f"/probe/{name.removeprefix(PROBE)}/" in n for n in self.names))
        for split in (*self.splits, *shown_probes):
            digests = {run.name: run.digests[split] for run in self.runs if split in run.digests}
            if len(set(digests.values())) > 1:
                shown = ", ".join(f"{run} {digest[:12]}" for run, digest in digests.items())
                warnings.append(f"{split}: not the same data: {shown}")
                continue
            for name in (name for name in _union(self.runs) if name.startswith(f"{split}/") and is_count(name)):
                counts = {run.name: run.results[name].value for run in self.runs if name in run.results}
                if len(set(counts.values())) > 1:
                    shown = ", ".join(f"{run} {value:.0f}" for run, value in counts.items())
                    warnings.append(f"{split}: not the same data or options: {name.partition('/')[2]} is {shown}")
                    break
        return warnings

    def to_json(self) -> dict[str, Any]:
        """Return the runs, the warnings, and each result's values by run with the marks."""
        results = {
            name: {
                run.name: asdict(run.results[name]) | {"mark": self.mark(name, run)} for run in self.runs if name in run.results
            }
            for name in self.names
        }
        runs = [{"name": run.name, "path": str(run.path), "digests": run.digests} for run in self.runs]
        return {"runs": runs, "warnings": self.warnings(), "results": results}


def compare(paths: Sequence[Path], match: str | None = None) -> Comparison:
    """Read the results of runs to compare.

    Args:
        paths: folders of runs, or files like their results.json.
        match: whole parts of results' names, with * as a wildcard: "recall_at_1", "val/*/top1". Default: all. Counts are shown
            only if nothing else matches.

    Raises:
        UserError: for a path without results, or a pattern that matches none.
    """
    runs = [read(path, name) for path, name in zip(paths, unique_names(paths), strict=True)]
    everything = _union(runs)
    names = [name for name in everything if fnmatchcase(f"/{name}/", f"*/{match or '*'}/*")]
    if match and not names:
        parts = {part for name in everything for part in name.split("/")}
        raise UserError(f"--match {match!r} fits no result's name; {suggestion(match, parts)}")
    return Comparison(runs, [name for name in names if not is_count(name)] or names)


def read(path: Path, name: str) -> RunResults:
    """Read one run's results.

    Raises:
        UserError: if there is no file of results.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: no results ({error.strerror}): give the folder of a run that was evaluated") from error
    except ValueError as error:
        raise UserError(f"{file} is no results.json: {error}") from error
    try:
        if "format" not in content:  # results alone, without intervals
            return RunResults(name, path, {key: Result.of(value) for key, value in content.items()})
        if content["format"] != FORMAT:
            raise UserError(f"{file}: its format is {content['format']!r}, this version reads {FORMAT!r}")
        results = {key: Result.of(entry) for key, entry in content["results"].items()}
        data = content.get("data", {})
        digests = {split: str(entry["digest"]) for split, entry in data.items() if entry.get("digest")}
        options = settings_of(content.get("options", {}))
        options |= {f"keys of {split}": entry["keys"] for split, entry in data.items() if entry.get("keys")}
        options |= {name: value for name, value in content.get("model", {}).items() if name == "precision"}
        settings = {name: json.dumps(value, sort_keys=True) for name, value in options.items()}
    except UserError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{file} is no results.json: {type(error).__name__} {error}") from error
    return RunResults(name, path, results, digests, settings)


def _differing(values: Mapping[str, str]) -> dict[str, str]:
    """Return a setting of each run, JSON, cut to what may be shown; of several options those alone that differ."""
    read = {run: json.loads(value) for run, value in values.items()}
    if all(isinstance(value, dict) for value in read.values()):
        names = {name for value in read.values() for name in value}
        names = {name for name in names if len({json.dumps(value.get(name)) for value in read.values()}) > 1}
        read = {run: {name: value[name] for name in sorted(names & value.keys())} for run, value in read.items()}
    texts = {run: json.dumps(value, ensure_ascii=False) for run, value in read.items()}
    return {run: text if len(text) <= SHOWN else f"{text[:SHOWN]} …" for run, text in texts.items()}


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that change results of the same names: `SETTINGS`, those of each task, each split's captions."""
    settings = {name: value for name, value in options.items() if name in SETTINGS}
    for kind in TASKS:
        for name, task in options.get(kind, {}).items():
            settings[f"{kind}.{name}"] = {option: value for option, value in task.items() if option not in NO_SETTINGS}
    captions = options.get("captions")
    by_split = captions if isinstance(captions, dict) else {}
    return settings | {f"captions.{split}": fields for split, fields in by_split.items()}


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell them apart; a repeated path is numbered."""
    folders = []
    for path in (path.absolute() for path in paths):
        if path.name == "results.json":
            folders.append(path.parent)
        else:
            folders.append(path.with_suffix("") if path.suffix == ".json" else path)
    num_parts = 1
    while len({folder.parts[-num_parts:] for folder in folders}) < len(set(folders)):
        num_parts += 1
    names = ["/".join(folder.parts[-num_parts:]) for folder in folders]
    earlier = [names[:k].count(name) for k, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, earlier, strict=True)]


def is_count(name: str) -> bool:
    return name.rpartition("/")[2].startswith("num_")


def lower_is_better(name: str) -> bool:
    words = set(re.split("[_@]", name.rpartition("/")[2]))
    return bool(words & LOWER_IS_BETTER) and not words & HIGHER_ALL_THE_SAME


def _union(runs: Sequence[RunResults]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.results))


def _cells(comparison: Comparison, name: str) -> Iterator[tuple[str, bool, str]]:
    """Yield (text, is it the best, mark) of every run; empty if the run lacks the result."""
    for run in comparison.runs:
        result = run.results.get(name)
        text = "" if result is None else result.shown(1 if "rank" in name.rpartition("/")[2] else 3)
        yield text, result is not None and result.value == comparison.best(name), comparison.mark(name, run)


def _legend(comparison: Comparison) -> str:
    if not any(comparison.mark(name, run) for name in comparison.names for run in comparison.runs):
        return ""
    return f"{BETTER} {WORSE} better, worse than {comparison.runs[0].name}: each value is outside the other's interval"


def comparison_table(comparison: Comparison) -> Table:
    """Return a table for the terminal: a row for each result, by split, a column for each run, the best in bold."""
    table = Table(caption=_legend(comparison) or None, caption_justify="left")
    table.add_column("")
    for run in comparison.runs:
        table.add_column(Text(run.name), justify="right")
    for split, names in comparison.splits.items():
        table.add_section()
        table.add_row(Text(split, style="bold"))
        for name in names:
            cells = [
                Text.assemble(
                    (text, "bold" if best else ""), (f" {mark}", "green" if mark == BETTER else "red") if mark else ""
                )
                for text, best, mark in _cells(comparison, name)
            ]
            table.add_row(Text(f"  {name.partition('/')[2]}"), *cells)
    return table


def comparison_html(comparison: Comparison) -> str:
    """Return the same table as HTML."""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in comparison.runs)
    rows = []
    for split, names in comparison.splits.items():
        rows.append(f"<tr><th>{html.escape(split)}</th>{head}</tr>")
        for name in names:
            cells = [f"<td>{f'<b>{text}</b>' if best else text} {mark}</td>" for text, best, mark in _cells(comparison, name)]
            rows.append(f"<tr><td>{html.escape(name.partition('/')[2])}</td>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table><p>{html.escape(_legend(comparison))}</p>"
