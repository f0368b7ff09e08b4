"""Blend models: open and compare them, then evaluate their averages or write one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcontrast.blend.curve import (
    Soup,
    drawn_metrics,
    evaluator,
    greedy_soup,
    measure_curve,
    uniform_soup,
    write_curve,
)
from mmcontrast.blend.weights import check_alike, load_state, state_of, wise_ft
from mmcontrast.embedder import Embedder, load, run_of
from mmcontrast.evaluation import Evaluation
from mmcontrast.export import safetensors
from mmcontrast.export.folder import check_place, write_export
from mmcontrast.export.parts import plain_model
from mmcontrast.export.samples import made_samples
from mmcontrast.suites import open_suite


def blend_models(
    names: Sequence[str],
    out: Path | None,
    *,
    alpha: float | None = None,
    soup: str | None = None,
    suite: str | None = None,
    metrics: Sequence[str] = (),
    device: str | None = None,
    precision: str = "fp32",
    cached: bool = True,
    overwrite: bool = False,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Write the blend of two models, or a soup, as a folder of our own; with neither, evaluate the curve between two.

    Args:
        names: as `load` takes them; the first gives the blend its tokenizer and preprocessing.
        out: of a blend: a new folder; of a curve: the folder of its files, by default blends/FIRST--LAST.
        soup: "uniform", or "greedy" by the one of `metrics`.
        suite: a YAML file; default: the evaluation of the last of the models that is a run.
        metrics: of a curve, patterns of what is drawn.

    Raises:
        UserError: for models that are not of one architecture; as `load`, `open_suite` and `export_model`.
    """
    writes = alpha is not None or soup is not None
    evaluates = not writes or soup == "greedy"
    if writes:
        assert out is not None
        check_place(out, overwrite)
    run = next((name for name in reversed(names) if run_of(name, None)[0]), names[-1])
    options = open_suite(run, suite, (), None).options if evaluates else None
    embedder = _open_plain(names[0], device if evaluates else "cpu", precision, trust_code)
    states = [state_of(embedder.model)]
    for name in names[1:]:
        other = _open_plain(name, "cpu", precision, trust_code)
        check_alike(embedder, other)
        other_state = state_of(other.model)
        states.append({key: other_state.get(key, value) for key, value in states[0].items()})  # a run has lost CoCa's decoder
    evaluate_state = evaluator(embedder, options, cached) if options else None
    if not writes:
        assert evaluate_state
        return _evaluate_curve(names, states, evaluate_state, out, metrics)
    blend = _average_states(states, alpha, soup, metrics, evaluate_state)
    load_state(embedder.model, blend.state)
    embedder.model, embedder.device = embedder.model.to("cpu"), torch.device("cpu")
    shown_names = [Path(name).absolute().name if Path(name).exists() else name for name in names]
    recipe = f"a soup ({soup}) of {', '.join(shown_names[number] for number in blend.members)}"
    if alpha is not None:
        recipe = f"(1 − α) · {shown_names[0]} + α · {shown_names[1]}, α = {alpha:g}"
    embedder.name, embedder.precision = recipe, "fp32"
    fields = list(embedder.fields)
    assert out is not None
    write_export(
        embedder, out, "safetensors", safetensors, fields, made_samples(embedder.model, fields),
        notes=["weights averaged over the whole state (WiSE-FT, arXiv:2109.01903; model soups, arXiv:2203.05482)"],
    )  # fmt: skip
    return {"files": [out], "members": blend.members, "alone": blend.alone, "value": blend.value}


def _open_plain(name: str, device: str | None, precision: str, trust_code: bool) -> Embedder:
    embedder = load(name, device=device, precision=precision, trust_code=trust_code)
    embedder.model = plain_model(embedder.model)
    return embedder


def _average_states(
    states: Sequence[Mapping[str, Tensor]],
    alpha: float | None,
    soup: str | None,
    metrics: Sequence[str],
    evaluate_state: Callable[[Mapping[str, Tensor]], Evaluation] | None,
) -> Soup:
    if alpha is not None:
        return Soup(wise_ft(states[0], states[1], alpha), [0, 1])
    if soup == "uniform":
        return uniform_soup(states)
    assert evaluate_state
    return greedy_soup(states, metrics[0], evaluate_state)


def _evaluate_curve(
    names: Sequence[str],
    states: Sequence[Mapping[str, Tensor]],
    evaluate_state: Callable[[Mapping[str, Tensor]], Evaluation],
    out: Path | None,
    metrics: Sequence[str],
) -> dict[str, Any]:
    curve = measure_curve((names[0], names[1]), states, evaluate_state)
    default = Path("blends") / "--".join(name.strip("/").replace("/", "--") for name in names)
    files = write_curve(curve, out or default, metrics)
    drawn_names = [f"{split}/{metric}" for metric, splits in drawn_metrics(curve, metrics).items() for split in splits]
    return {"curve": curve, "metrics": drawn_names, "files": files}
