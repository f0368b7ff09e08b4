"""Evaluate blends: the WiSE-FT curve over α with intervals, as JSON and as a figure; uniform and greedy soups."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from mmcontrast.blend.weights import blended, load_state, wise_ft
from mmcontrast.components import suggestion
from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.evaluation import Evaluation, open_splits
from mmcontrast.evaluation.cache import fingerprint
from mmcontrast.evaluation.compare import lower_is_better
from mmcontrast.evaluation.compare_figure import COLOURS, MARKERS
from mmcontrast.evaluation.options import EvaluationOptions
from mmcontrast.strict_json import dumps
from mmcontrast.suites import evaluate_embedder

ALPHAS = tuple(number / 10 for number in range(11))
FORMAT = "mmcontrast blend curve 1"
HEADLINES = ("*/top1", "*/retrieval/*/recall_at_1")  # drawn where no metric is named
PANELS = 6  # of a figure, at most
States = Sequence[Mapping[str, Tensor]]


def evaluator(
    embedder: Embedder, options: EvaluationOptions, cached: bool = True
) -> Callable[[Mapping[str, Tensor]], Evaluation]:
    """Return a function that evaluates a state in an open model, on data that are opened once.

    Raises:
        UserError: for an empty evaluation, or one of fields that the model does not have.
    """
    options, datasets = open_splits(options, embedder.model, embedder.dataset)
    if not options.splits:
        raise UserError("nothing to evaluate, as no splits are named: give a suite with --suite")

    def evaluate_state(state: Mapping[str, Tensor]) -> Evaluation:
        load_state(embedder.model, state)
        return evaluate_embedder(embedder, datasets, options, fingerprint(embedder.model) if cached else None)

    return evaluate_state


@dataclass(frozen=True)
class Curve:
    """Results on the line between two models.

    Attributes:
        models: their names.
        alphas: positions on the line: 0 is the first model, 1 the second.
        results: by name, at each α: value, and low and high where there is an interval.
    """

    models: tuple[str, str]
    alphas: tuple[float, ...]
    results: dict[str, list[dict[str, float]]]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "models": list(self.models), "alphas": list(self.alphas), "results": self.results}


def measure_curve(
    models: tuple[str, str],
    states: States,
    evaluate_state: Callable[[Mapping[str, Tensor]], Evaluation],
    alphas: Sequence[float] = ALPHAS,
) -> Curve:
    """Evaluate the blends of two states."""
    evaluations = [evaluate_state(wise_ft(states[0], states[1], alpha)) for alpha in alphas]
    results: dict[str, list[dict[str, float]]] = {}
    for evaluation in evaluations:
        for name, value in evaluation.values.items():
            low, high = evaluation.intervals.get(name, (None, None))
            interval = {} if low is None or high is None else {"low": low, "high": high}
            results.setdefault(name, []).append({"value": value, **interval})
    return Curve(models, tuple(alphas), {name: row for name, row in results.items() if len(row) == len(alphas)})


def drawn_metrics(curve: Curve, patterns: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the metrics that a figure shows, without their split, each with the splits that have it.

    Args:
        patterns: of results' names, as "val/*/top1" or "recall_at_1"; default: top-1 accuracy and recall at 1.

    Raises:
        UserError: if nothing fits.
    """
    name_patterns = [f"*/{pattern}" for pattern in patterns] or HEADLINES
    splits_by_metric: dict[str, list[str]] = {}
    for name in curve.results:
        split, _, metric = name.partition("/")
        if any(fnmatchcase(f"/{name}", pattern) for pattern in name_patterns):
            splits_by_metric.setdefault(metric, []).append(split)
    if not splits_by_metric and patterns:
        raise UserError(f"--metric {patterns[0]}: no such result; {suggestion(patterns[0], curve.results)}")
    return dict(list(splits_by_metric.items())[:PANELS])


def curve_figure(curve: Curve, patterns: Sequence[str] = ()) -> Any:
    """Return a matplotlib figure: above, each metric against α, one line a split, with its interval; below, if there are two
    splits, one against the other, which shows the gain on the new beside the loss on the old."""
    from matplotlib.figure import Figure

    metrics = drawn_metrics(curve, patterns)
    if not metrics:
        raise UserError("the evaluation has neither top-1 accuracy nor recall at 1: name what to draw with --metric")
    several_splits = any(len(splits) > 1 for splits in metrics.values())
    figure = Figure(figsize=(3.6 * len(metrics), 3.2 * (1 + several_splits)), layout="constrained")
    axes = figure.subplots(1 + several_splits, len(metrics), squeeze=False)
    for column, (metric, splits) in enumerate(metrics.items()):
        for number, split in enumerate(splits):
            results = curve.results[f"{split}/{metric}"]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
            axes[0, column].plot(curve.alphas, [result["value"] for result in results], label=split, **style)
            if all("low" in result for result in results):
                bounds = [result["low"] for result in results], [result["high"] for result in results]
                axes[0, column].fill_between(curve.alphas, *bounds, color=style["color"], alpha=0.15, linewidth=0)
        axes[0, column].set_title(metric.replace("_to_", " → ").replace("_", " "), fontsize=9)
        axes[0, column].set_xlabel("α", fontsize=9)
        axes[0, column].legend(fontsize=8, frameon=False)
        if several_splits and len(splits) > 1:
            _draw_against(axes[1, column], curve, metric, splits[0], splits[1])
        elif several_splits:
            axes[1, column].set_axis_off()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"(1 − α) {curve.models[0]} + α {curve.models[1]}", fontsize=10)
    return figure


def _draw_against(axis: Any, curve: Curve, metric: str, first: str, second: str) -> None:
    x, y = ([result["value"] for result in curve.results[f"{split}/{metric}"]] for split in (first, second))
    axis.plot(x, y, color=COLOURS[0], marker=MARKERS[0], markersize=4)
    for index in (0, len(x) // 2, -1):
        axis.annotate(
            f"α = {curve.alphas[index]:g}", (x[index], y[index]), textcoords="offset points", xytext=(4, 4), fontsize=8
        )
    axis.set_xlabel(first, fontsize=9)
    axis.set_ylabel(second, fontsize=9)


def write_curve(curve: Curve, folder: Path, patterns: Sequence[str] = ()) -> list[Path]:
    """Write curve.json, curve.svg and curve.png into a folder, and return them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"curve.{ending}" for ending in ("json", "svg", "png")]
        figure = curve_figure(curve, patterns)
        files[0].write_text(dumps(curve.to_json(), indent=1), encoding="utf-8")
        for file in files[1:]:
            figure.savefig(file, dpi=150)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error}") from error
    return files


@dataclass(frozen=True)
class Soup:
    """An average of models, and how it was chosen.

    Attributes:
        state: its weights.
        members: the models in it, by their number.
        alone: of a greedy one, the metric of each model alone.
        value: of a greedy one, the metric of the soup.
    """

    state: dict[str, Tensor]
    members: list[int]
    alone: list[float] | None = None
    value: float | None = None


def uniform_soup(states: States) -> Soup:
    """Return the average of all states (model soups, arXiv:2203.05482)."""
    return Soup(blended(states, [1 / len(states)] * len(states)), list(range(len(states))))


def greedy_soup(states: States, metric: str, evaluate_state: Callable[[Mapping[str, Tensor]], Evaluation]) -> Soup:
    """Return the average of those that help: the best alone, then each of the others, best first, if the average with it is not
    worse (model soups, arXiv:2203.05482, recipe 1). On the metric it is never below the best alone.

    Args:
        metric: a result's name; of held-out data, not of those that the soup is reported on.

    Raises:
        UserError: for an unknown result.
    """

    def value_of(state: Mapping[str, Tensor]) -> float:
        values = evaluate_state(state).values
        if metric not in values:
            raise UserError(f"--metric {metric}: no such result; {suggestion(metric, values)}")
        return values[metric]

    sign = -1 if lower_is_better(metric) else 1
    alone = [value_of(state) for state in states]
    order = sorted(range(len(states)), key=lambda number: -sign * alone[number])
    members, best = [order[0]], alone[order[0]]
    for number in order[1:]:
        trial = sorted([*members, number])
        value = value_of(_average(states, trial))
        if sign * value >= sign * best:
            members, best = trial, value
    return Soup(_average(states, members), members, alone, best)


def _average(states: States, members: Sequence[int]) -> dict[str, Tensor]:
    return blended([states[number] for number in members], [1 / len(members)] * len(members))
