"""Run evaluation suites: of a run's config, a YAML file, or a folder in CLIP_benchmark's layout."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from mmcontrast.components import suggestion
from mmcontrast.config import load_config, load_suite
from mmcontrast.data import ShardDataset
from mmcontrast.embedder import Embedder, identity, load
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, Evaluation, EvaluationOptions, evaluate, open_splits
from mmcontrast.evaluation.banks import check_made_by
from mmcontrast.evaluation.cache import fingerprint, keep, table_folder
from mmcontrast.evaluation.clip_benchmark_layout import in_layout
from mmcontrast.evaluation.embed import MANIFEST
from mmcontrast.evaluation.evaluate import Embed, add_geometry, embed_split
from mmcontrast.evaluation.options import BridgeOptions
from mmcontrast.evaluation.report import REPORT, RESULTS, write_results, write_table_report
from mmcontrast.evaluation.retrieval_tasks import RetrievalTasks
from mmcontrast.run_folder import CONFIG, run_of
from mmcontrast.training.distributed import join_processes, rank_of_launcher
from mmcontrast.training.log import make_progress
from mmcontrast.whole_files import write_json, write_text

SOURCE = "suite"  # a file beside results: the path of their suite


@dataclass(frozen=True)
class Suite:
    """An evaluation and the folder of its results.

    Attributes:
        name: of the file or the folder; empty: a run's own evaluation.
        options: of the evaluation.
        out: the folder of its results.
        source: its path; empty: a run's own evaluation.
    """

    name: str
    options: EvaluationOptions
    out: Path
    source: str = ""


def open_suite(
    model: str,
    source: str | None,
    overrides: Sequence[str],
    out: Path | None,
    checkpoint: str = "last",
    pretrained: str | None = None,
) -> Suite:
    """Read a suite and choose the folder of its results.

    Args:
        model, checkpoint, pretrained: as `load`.
        source: a YAML file, or a folder in CLIP_benchmark's layout; None: the run's own evaluation.
        out: default: the run's folder for its own evaluation of its last checkpoint, RUN/evaluations/SUITE for another suite,
            evaluations/MODEL/SUITE for a model that is no run. With overrides the name of the suite, or "own", gets a digest of
            them, and with results of another suite of the same name there one of its path, so that nothing is replaced by other
            options' results.

    Raises:
        UserError: for an invalid suite; without one, if the model is no run.
    """
    run, step = run_of(model, checkpoint)
    changed = hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:6] if overrides else ""
    if source is None:
        if run is None:
            raise UserError(f"{model} is no run with an evaluation of its own: name a suite, like eval/glyphs/suite.yaml")
        name = f"own-{changed}" if changed else ""
        name += "" if step == "last" else f"{name and '-'}checkpoint-{step}"
        default_out = run / "evaluations" / name if name else run
        return Suite("", load_suite(load_config(run / CONFIG).evaluation, overrides), out or default_out)
    folder, _, split = source.partition(":")
    if in_layout(Path(folder)):
        name = Path(folder).absolute().name
        options = load_suite(EvaluationOptions(splits={name: source}), overrides)
        name += f"-{split}" if split else ""
    else:
        name, options = Path(source).stem, load_suite(source, overrides)
    name += f"-{changed}" if changed else ""
    model_name = "--".join([model, *([pretrained] if pretrained else [])]).strip("/").replace("/", "--")
    evaluations = Path("evaluations") / model_name if run is None else run / "evaluations"
    name += f"-checkpoint-{step}" if run is not None and step != "last" else ""
    path = os.fsencode(os.path.abspath(source)).decode("utf-8", "backslashreplace")
    if (file := evaluations / name / SOURCE).is_file() and file.read_text(encoding="utf-8") != path:
        name += f"-{hashlib.sha256(path.encode()).hexdigest()[:6]}"
    return Suite(name, options, out or evaluations / name, path)


def run_suite(
    model: str,
    suite: Suite,
    *,
    checkpoint: str = "last",
    pretrained: str | None = None,
    device: str | None = None,
    precision: str = "fp32",
    cached: bool = True,
    trust_code: bool = False,
) -> Evaluation:
    """Evaluate a model, write results.json and report.html, and return the results. Ranks of torchrun share the work; the first
    returns the results.

    Args:
        checkpoint, pretrained, device, precision, trust_code: as `load`.
        cached: read cached embeddings of the same model and data, and keep new ones.

    Raises:
        UserError: as `load`; for fields or splits of the options that the model or the data do not have.
    """
    state = join_processes()
    group = dist.group.WORLD if state.num_processes > 1 else None
    device_name = device or str(state.device)
    embedder = load(
        model, checkpoint=checkpoint, pretrained=pretrained, device=device_name, precision=precision, trust_code=trust_code
    )
    options, datasets = open_splits(suite.options, embedder.model, embedder.dataset)
    if isinstance(options.scoring, BridgeOptions):
        check_made_by(options.scoring.bank, identity(model, checkpoint, pretrained))
    if not options.splits:
        raise UserError(f"{suite.name or model}: nothing to evaluate, as no splits are named")
    _make_folder(suite.out)  # before the work
    weights = fingerprint(embedder.model)
    evaluation = evaluate_embedder(embedder, datasets, options, weights if cached else None, group)
    if state.is_main_process:
        description = {"model": identity(model, checkpoint, pretrained) | {"fingerprint": weights, "precision": precision}}
        if suite.source:
            write_text(suite.out / SOURCE, suite.source)
        write_results(suite.out, suite.name or Path(model).name, evaluation, embedder.model, datasets, options, description)
    return evaluation


def evaluate_embedder(
    embedder: Embedder,
    datasets: Mapping[str, ShardDataset],
    options: EvaluationOptions,
    weights: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Evaluation:
    """Evaluate a model that is open.

    Args:
        datasets, options: as returned by `open_splits`.
        weights: its fingerprint: read cached embeddings of the same weights and data, and keep new ones; None: do not.
        group: ranks that share the work.
    """
    with make_progress(not group or dist.get_rank(group) == 0) as progress:
        embed = partial(embed_split, embedder.model, options, embedder.device, progress, group)
        if weights is not None:
            embed = partial(_embed_once, embed, f"{weights} {embedder.precision}", group)
        return evaluate(embedder.model, datasets, options, embedder.device, progress, group, embed, embedder.autocast)


def _embed_once(embed: Embed, model: str, group: dist.ProcessGroup | None, split: str, dataset: ShardDataset) -> EmbeddingTable:
    """Read a split's table from the cache, or embed the split and keep the table; the first rank decides for all."""
    first = not group or dist.get_rank(group) == 0
    folder = table_folder(model, dataset)
    cached = [(folder / MANIFEST).exists()]
    if group:
        dist.broadcast_object_list(cached, group=group, group_src=0)
    if cached[0]:
        return EmbeddingTable.read(folder) if first else EmbeddingTable({}, {}, torch.empty(0), torch.empty(0), [])
    table = embed(split, dataset)
    if first:
        keep(table, folder, {"split": split})
    return table


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: no folder for results ({error.strerror})") from error


def is_table(folder: str) -> bool:
    """Return whether a folder is a complete embedding table."""
    return all((Path(folder) / name).is_file() for name in (MANIFEST, "part-00000.safetensors"))


def evaluate_table(
    folder: Path, suite: str | None = None, overrides: Sequence[str] = (), out: Path | None = None, device: str | None = None
) -> tuple[Evaluation, Path]:
    """Evaluate an embedding table: retrieval, and the geometry. Write results.json and report.html, and return the results and
    their folder. Of several ranks the first alone does so.

    Args:
        suite: a YAML file; default: every pair of fields.
        out: default: TABLE/evaluation.

    Raises:
        UserError: for a folder that holds no complete table, options that need a model or samples, or fields that it lacks.
    """
    options = load_suite(suite or EvaluationOptions(), overrides)
    for option in ("splits", "zero_shot", "probes", "captions", "report_split"):
        if getattr(options, option):
            raise UserError(
                f"{option}: {folder} is a table, of which retrieval and geometry are evaluated; name a model for it"
            )
    if isinstance(options.scoring, BridgeOptions):
        raise UserError(f"scoring: {folder} is a table: `mmcontrast index {folder} OUT --bridge …` bridges it, or name a model")
    table, manifest, name = EmbeddingTable.read(folder), json.loads((folder / MANIFEST).read_text()), folder.resolve().name
    if table.curvature is not None and (options.whiten or options.scoring or options.widths):
        raise UserError(f"whiten, scoring and widths are of cosines, and {folder} is of a hyperbolic model: leave them out")
    sides = [side for task in options.retrieval.values() for side in (task.query, task.candidate)]
    sides += [side for task in options.languages.values() for side in (task.fields, task.candidate)]
    for field in (field for side in sides for field in ([side] if isinstance(side, str) else side)):
        if field not in table.fields:
            raise UserError(f"{folder} has no field {field!r}; {suggestion(field, table.fields)}")
    for name_of_task, task in options.retrieval.items():
        if task.splits:
            raise UserError(f"retrieval.{name_of_task}.splits: {folder} is a table, which has no splits: leave it out")
    out = out or folder / "evaluation"
    if rank_of_launcher()[0]:
        return Evaluation(), out
    _make_folder(out)
    evaluation = Evaluation(options.resamples, tables={name: table})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with make_progress() as progress:
        widths = [width for width in options.widths or () if width < manifest["dim"]]
        for _, rows, target in evaluation.by_width(table, widths):
            RetrievalTasks(name, rows, {}, options, device, progress, None, target, manifest.get("texts", ())).run()
    if options.geometry:
        add_geometry(evaluation, f"{name}/geometry", table)
    if not evaluation.values:
        raise UserError(f"{folder}: nothing to evaluate, as neither a pair of fields nor a task has results")
    about = {"model": {option: manifest.get(option) for option in ("model", "checkpoint", "pretrained", "precision")}}
    data = {name: {"table": str(folder), "samples": len(table)}}
    write_json(out / RESULTS, evaluation.to_json({**about, "data": data, "options": options.model_dump(mode="json")}))
    write_table_report(out / REPORT, name, evaluation)
    return evaluation, out
