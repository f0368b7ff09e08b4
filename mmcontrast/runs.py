"""Make the parts of a run from its config, checked against each other, and open trained runs."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcontrast.config import RunConfig, load_config
from mmcontrast.data import ShardDataset, ShardOptions
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EvaluationOptions, open_splits
from mmcontrast.evaluation.options import BridgeOptions
from mmcontrast.libraries import weights_follow
from mmcontrast.modalities import Modality
from mmcontrast.modalities.library import LibraryTexts
from mmcontrast.models import (
    ContrastiveModel,
    FieldOptions,
    ScoreOptions,
    StartOptions,
    make_modalities,
    make_model,
    merge_lora,
)
from mmcontrast.models import open_start as open_library_start
from mmcontrast.models.names import EXPORT_FIRST
from mmcontrast.run_checks import (
    check_bridge,
    check_components,
    check_components_ahead,
    check_widths,
    contrasted_fields,
    negative_fields,
    score_of,
    scored_fields,
    tell_of_normalisation,
)
from mmcontrast.run_folder import CONFIG, run_of
from mmcontrast.training import checkpoint
from mmcontrast.training.context import RunContext
from mmcontrast.training.data import make_dataset, make_training_data
from mmcontrast.training.distributed import all_ranks
from mmcontrast.training.epochs import in_steps
from mmcontrast.training.mining import check_mining, check_rounds
from mmcontrast.training.state import check_start, load_weights, weights_path
from mmcontrast.training.teachers import open_teachers
from mmcontrast.trust import import_paths


def make_run_context(config: RunConfig, resume: bool = False) -> RunContext:
    """Make everything that training needs, checked against each other; nothing is written.

    Args:
        resume: the run continues from its own checkpoint: `train.init_from` is not read.

    Raises:
        UserError: for anything that does not fit; it names the option.
    """
    check_components_ahead(config)  # before anything large is made
    with weights_follow() if config.train.init_from else nullcontext():
        model = model_of(config)
    if config.train.init_from and not resume:
        begin_from(model, config.train.init_from)
    config = completed(config, model)
    objective, pairing = check_components(config)
    check_widths(config, model, objective)
    tell_of_normalisation(config, model)
    check_bridge(config, model)
    for option in ("patience", "evaluate_first"):
        if getattr(config.train, option) and not config.evaluation.splits:
            raise UserError(f"train.{option}: nothing is evaluated: name evaluation.splits")
    check_mining(config.train, config.data, contrasted_fields(config), model)
    evaluation, eval_datasets = open_data(config, model)
    teachers = open_teachers(config.train.teachers, scored_fields(config, pairing), model, open_start)
    views = [teacher.view for teacher in teachers]
    dataset, order = make_training_data(config.data, config.fields, model, config.train.batch_size, config.train.seed, views)
    check_rounds(config.train, config.data, order)
    return RunContext(
        name=config.run.name,
        folder=config.folder,
        config=config.to_yaml(),
        model=model,
        objective=objective,
        pairing=pairing,
        dataset=dataset,
        order=order,
        data=config.data,
        eval_datasets=eval_datasets,
        evaluation=evaluation,
        options=in_steps(config.train, order),
        negative_of=negative_fields(config),
        teachers=teachers,
        own_negatives=frozenset(name for name, field in config.fields.items() if field.own) | config.data.mined.keys(),
        score=score_of(config),
    )


def model_of(config: RunConfig, *, tokenizers: bool = True, weights: bool = True, trust_code: bool = False) -> ContrastiveModel:
    """Make the model of a config.

    Args:
        tokenizers: check that the tokenizers fit the towers.
        weights: False: do not read the weights of `model.start`.
        trust_code: of a start that is a run: import the code that its config names by import path.

    Raises:
        UserError: for anything that does not fit.
    """
    opener = partial(open_start, trust_code=trust_code)
    return make_model(config.fields, config.towers, config.model, config.train.seed, tokenizers, weights, opener, config.score)


def without_pretrained(config: RunConfig) -> RunConfig:
    """Return a config whose towers have random weights."""
    towers = {
        name: tower if isinstance(tower, str) else {option: value for option, value in tower.items() if option != "pretrained"}
        for name, tower in config.towers.items()
    }
    return config.model_copy(update={"towers": towers})


def begin_from(model: ContrastiveModel, source: str) -> None:
    """Load the weights of another model of the same architecture: a run or a checkpoint, a .safetensors file, or any model
    that `open_start` opens.

    Raises:
        UserError: if there is no such model; if names or shapes of weights differ.
    """
    path = Path(source)
    if (
        path.suffix == ".safetensors"
        or path.is_file()
        or (path / "checkpoints").is_dir()
        or (path / checkpoint.MANIFEST).exists()
    ):
        weights: Mapping[str, Tensor] = checkpoint.load_weights(weights_path(source, all_ranks()))
    else:
        weights = open_start(StartOptions(model=source)).state_dict()
    try:
        load_weights(model, weights, source)
    except UserError as error:
        raise UserError(f"train.init_from: {error}: to begin with it as it is, name it in model.start") from error


def modalities_of(config: RunConfig) -> dict[str, Modality]:
    """Return the modality of each field, without reading the weights of a start.

    Raises:
        UserError: for wrong options of a modality; for a start that cannot be opened.
    """
    if not config.model.starts:
        return make_modalities(config.fields, config.towers)
    model = model_of(config, tokenizers=False, weights=False)
    for modality in model.modalities.values():
        if isinstance(modality, LibraryTexts):
            modality.open()
    return {field: model.modality(field) for field in model.modalities}


def open_start(start: StartOptions, weights: bool = True, trust_code: bool = False) -> ContrastiveModel:
    """Open what `model.start` names: the model of a run, or of another library.

    Raises:
        UserError: if there is no such model.
    """
    folder, which = run_of(start.model, start.checkpoint)
    if folder is None:
        return open_library_start(start, weights, trust_code)
    if start.pretrained or start.pooling:
        raise UserError(f"model.start: {start.model} is a run: it takes neither pretrained nor pooling")
    for option in start.sizes.given:
        start.sizes.refuse(f"model.start: {start.model}", option, f"a run has the sizes of its own config: {EXPORT_FIRST}")
    if not weights:
        return model_of(load_config(folder / CONFIG), weights=False, trust_code=trust_code)
    return open_run(folder, which, "cpu", trust_code).model


def completed(config: RunConfig, model: ContrastiveModel) -> RunConfig:
    """Return a config with the fields, the dimension, the logit scale and bias, and the score of its start."""
    if not config.model.starts:
        return config
    bias = None if model.logit_bias is None else model.logit_bias.item()
    options = {"embed_dim": model.embed_dim, "max_logit_scale": model.max_logit_scale, "logit_bias": bias}
    options["scale_per_pair"] = bool(model.pairs)
    return _with_start(config, {field: model.tower_of[field] for field in model.modalities}, options, model.score)


def completed_as(config: RunConfig, run: RunConfig) -> RunConfig:
    """Return a config as `completed` has it, with what a run that was started with it has of its start: no model is opened."""
    if not config.model.starts:
        return config
    options = {
        option: getattr(run.model, option) for option in ("embed_dim", "max_logit_scale", "logit_bias", "scale_per_pair")
    }
    return _with_start(config, {name: field.tower for name, field in run.fields.items()}, options, config.score or run.score)


def _with_start(
    config: RunConfig, tower_of: Mapping[str, str | None], options: Mapping[str, Any], score: ScoreOptions | None
) -> RunConfig:
    """Return a config with the fields of its start, by their towers, and with options of its model."""
    of_start = {
        field: (config.fields.get(field) or FieldOptions()).model_copy(update={"tower": tower})
        for field, tower in tower_of.items()
    }
    fields = of_start | {field: options for field, options in config.fields.items() if field not in of_start}
    return config.model_copy(update={"fields": fields, "model": config.model.model_copy(update=options), "score": score})


def open_data(config: RunConfig, model: ContrastiveModel) -> tuple[EvaluationOptions, dict[str, ShardDataset]]:
    """Return the complete options of the evaluation, and its data.

    Raises:
        UserError: for mistakes that would otherwise show only after training.
    """
    fields = contrasted_fields(config)

    def open_split(shards: ShardOptions) -> ShardDataset:
        of_source = isinstance(config.data.train, dict) and shards.held_out is not None  # it may lack a field
        return make_dataset(shards, fields, model, partial=of_source)

    evaluation = config.evaluation
    if evaluation.widths is None and config.train.matryoshka:
        evaluation = evaluation.model_copy(update={"widths": list(config.train.matryoshka)})
    if isinstance(bridge := evaluation.scoring, BridgeOptions) and Path(bridge.bank).is_dir():
        raise UserError(
            f"evaluation.scoring: {bridge.bank} has embeddings of other weights than those that learn here: name a text file"
        )
    return open_splits(evaluation, model, open_split)


@dataclass
class TrainedRun:
    """A run's config and its model with trained weights, in evaluation mode."""

    folder: Path
    config: RunConfig
    model: ContrastiveModel
    device: torch.device


def config_of_checkpoint(folder: Path, saved: Path) -> RunConfig:
    """Return a run's config with the model of a checkpoint: options may have changed when the run was resumed. The place of a
    start, which may have moved, is the run's."""
    config = load_config(folder / CONFIG)
    if not (saved / checkpoint.CONFIG).exists():
        return config
    then = load_config(saved / checkpoint.CONFIG)
    model = then.model.model_copy(update={"start": config.model.start})
    return config.model_copy(update={"fields": then.fields, "towers": then.towers, "model": model, "score": then.score})


def open_run(folder: Path, which: str = "last", device: str | None = None, trust_code: bool = False) -> TrainedRun:
    """Rebuild a model from its run's folder, with the averaged weights if the run has them.

    Args:
        which: the checkpoint: "last", "best" or a step's number.
        device: default: a GPU if there is one.
        trust_code: import the towers and modalities that its config names by import path.

    Raises:
        UserError: if the folder holds no run, or the run has no such checkpoint; for code that is not trusted.
    """
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is not a run's folder (no {CONFIG})")
    saved = checkpoint.find(folder / "checkpoints", which)
    config = config_of_checkpoint(folder, saved)
    with import_paths(folder, trust_code), weights_follow():
        model = model_of(config, trust_code=trust_code)
    checkpoint.check(saved)
    check_start(model, saved)
    load_weights(model, checkpoint.load_weights(saved, averaged=True), str(saved))
    merge_lora(model)
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return TrainedRun(folder, config, model.eval().to(target), target)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {' '.join(str(error).split())[:200]}") from error
