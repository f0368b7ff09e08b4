"""`mmcontrast finetune MODEL DATA`: makes a complete config for an existing model and one's own data; `train` runs it.

The choices are listed with their reasons, and each is an option of the config, which an override sets.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from rich.table import Table

from mmcontrast.config import RunConfig, config_of
from mmcontrast.data import ShardDataset, ShardOptions, open_dataset, open_shards
from mmcontrast.data.class_texts import CLASS_NAME, check_template
from mmcontrast.data.loading import available_memory
from mmcontrast.data.shard import LABELS, ShardIndex
from mmcontrast.errors import UserError
from mmcontrast.evaluation.labels import labels_ahead
from mmcontrast.evaluation.prompts import TEMPLATES, named_templates
from mmcontrast.finetune_request import Request, name_of, start_of
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, Modality, TextModality
from mmcontrast.modalities.parts import JPEG_START, PNG_START
from mmcontrast.models import ContrastiveModel
from mmcontrast.plan import CannotBePlanned, plan_run
from mmcontrast.runs import model_of
from mmcontrast.training.distributed import join_processes

FULL_LR, LORA_LR = 1e-5, 2e-4  # as WiSE-FT (arXiv:2109.01903) and FLYP (2212.00638) do; as CLIP-LoRA does (2405.18541)
MOST_WARMUP, WARMUP_SHARE = 500, 0.1
LARGEST_BATCH, PARTS = 512, 4  # a step takes at most so many samples, and a quarter of the data
HELD_OUT = 0.1
TEMPLATE = "a photo of a {}."
MOST_LABELS = 200_000  # samples that are read for the names of their classes
LEAST = 2  # fields are contrasted
SAMPLED = 16  # rows whose values show what a column holds
PICTURES = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)
MAGIC: dict[tuple[bytes, ...], type[Modality]] = {
    (JPEG_START, PNG_START): ImageModality,
    (b"fLaC", b"OggS", b"ID3"): AudioModality,
}
SOUNDS = re.compile(r"\.(wav|flac|mp3|ogg|opus|m4a)$", re.IGNORECASE)


@dataclass
class Choices:
    """The choices for a run, in their order: (option, value, why)."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, option: str, value: Any, why: str) -> None:
        self.rows.append((option, f"{value:g}" if isinstance(value, float) else str(value), why))

    def with_overrides(self, overrides: Sequence[str]) -> "Choices":
        """Return the choices with the user's values in the place of those that are overridden."""
        given = {option: value for option, _, value in (override.partition("=") for override in overrides)}
        rows = [(row[0], given[row[0]], "as asked") if row[0] in given else row for row in self.rows]
        return Choices(rows)

    def table(self) -> Table:
        """Return the choices as a table for the console."""
        table = Table("option", "value", "why", title="chosen; override any of them as OPTION=VALUE", title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table


def make_config(request: Request, overrides: Sequence[str] = ()) -> tuple[RunConfig, Choices]:
    """Make the config of a fine-tuning run, and return it with the choices that were made.

    Raises:
        UserError: for a model or data that cannot be opened, columns that cannot be told apart, or options that contradict each
            other.
    """
    choices = Choices()
    start = start_of(request)
    name = request.name or name_of(request)
    draft: dict[str, Any] = {"run": {"name": name}, "model": {"start": start}, "data": {"train": request.data}}
    draft |= {"train": {"epochs": request.epochs, "batch_size": 2}}
    model = model_of(config_of(draft), tokenizers=False, weights=False)
    templates = templates_of(request, model)
    keys, absent = keys_of(request, model, choices, templates)
    data: dict[str, Any] = {"shards": request.data, "keys": keys, "files": request.files, "templates": templates}
    val_data = data | {"shards": request.val}
    data["select"] = request.select
    samples = len(open_split(data, model))
    if absent:
        kept_fields = [name for name in model.modalities if name not in absent]
        draft["model"]["start"] = {**({"model": start} if isinstance(start, str) else start), "fields": kept_fields}
        choices.add("model.start.fields", ", ".join(kept_fields), f"the data has no {', '.join(absent)}")
    has_options = request.files or templates or request.select
    draft["data"] = {"train": {"data": {k: v for k, v in data.items() if v}} if has_options else request.data}
    draft["fields"] = {field: {"keys": names} for field, names in keys.items()}
    held_out = 0.0 if request.val else HELD_OUT
    if request.val:
        draft["evaluation"] = {"splits": {"val": {k: v for k, v in val_data.items() if v}}}
    else:
        draft["data"]["held_out"] = held_out
        choices.add("data.held_out", held_out, "no --val: this share is evaluated, and not trained on")
    if templates:
        splits = [data, val_data] if request.val else [data]
        task = zero_shot_of(request, model, templates, splits)
        choices.add("evaluation.zero_shot", f"{len(task['classes'])} classes", "accuracy by prompts, before and after")
        best = f"{'val' if request.val else 'data'}/zero_shot/classes/top1"
        draft["evaluation"] = draft.get("evaluation", {}) | {"zero_shot": {"classes": task}, "best": best}
    held_out_of = [override for override in overrides if override.startswith("data.held_out=")]
    training_samples = samples * (1 - (config_of(draft, held_out_of).data.held_out or 0.0))
    batch = min(LARGEST_BATCH, 2 ** int(math.log2(max(2.0, training_samples / PARTS))))
    choices.add("train.batch_size", batch, f"of {training_samples:.0f} samples, at most a quarter, and {LARGEST_BATCH}")
    draft["train"]["batch_size"] = batch
    train_options = config_of(draft, overrides).train
    steps_per_epoch = max(1, int(training_samples // train_options.batch_size))
    steps = train_options.steps or (train_options.epochs or request.epochs) * steps_per_epoch
    if not train_options.steps:
        choices.add("train.epochs", request.epochs, f"about {steps:.0f} steps")
    lr = LORA_LR if request.lora else FULL_LR
    choices.add("train.lr", lr, "low-rank updates learn" if request.lora else "the weights themselves learn")
    warmup = min(MOST_WARMUP, int(WARMUP_SHARE * steps))
    choices.add("train.warmup_steps", warmup, f"a tenth of the steps, at most {MOST_WARMUP}")
    has_bias = model.logit_bias is not None
    draft["objective"] = "siglip" if has_bias else "infonce"
    choices.add("objective", draft["objective"], "the model has a logit bias" if has_bias else "the model has no logit bias")
    precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    choices.add("train.precision", precision, "on a GPU that has it" if precision == "bf16" else "no GPU with bf16")
    workers = max(0, min(4, (os.cpu_count() or 1) - 1))
    draft["data"]["num_workers"] = workers
    frozen = freeze_patterns(request, model)
    if request.probe_epochs and not request.beside:
        raise UserError("--probe-epochs: the model has no new projection that could learn alone: leave it out")
    if request.probe_epochs:
        frozen |= {"towers.*": max(1, round(request.probe_epochs * steps_per_epoch))}
        choices.add("train.freeze", frozen, "the projections learn alone until then")
    draft["train"] |= {"lr": lr, "warmup_steps": warmup, "precision": precision, "freeze": frozen}
    draft["train"] |= {"evaluate_first": True, "weight_decay": 0.1}
    if request.lora:
        draft["model"]["lora"] = {"rank": request.lora}
        choices.add("model.lora", f"rank {request.lora}", "all linear layers of blocks and attention pools; alpha is the rank")
    config = config_of(draft, overrides)
    try:
        run_plan = plan_run(config, join_processes().num_processes, memory())
    except CannotBePlanned as error:
        choices.add("train.micro_batch_size", "none", f"not known to fit: {error}")
        return config, choices.with_overrides(overrides)
    if not run_plan.fits and run_plan.largest:
        draft["train"]["micro_batch_size"] = run_plan.largest
        choices.add("train.micro_batch_size", run_plan.largest, "what fits into memory: the same loss, a second forward")
        config = config_of(draft, overrides)
    return config, choices.with_overrides(overrides)


def make_config_once(request: Request, overrides: Sequence[str] = ()) -> tuple[RunConfig, Choices]:
    """Make the config on the first rank, for all: what fits into memory may differ between them.

    Raises:
        UserError: as `make_config`.
    """
    state = join_processes()
    result: list[Any] = [None]
    if state.is_main_process:
        try:
            result = [make_config(request, overrides)]
        except UserError as error:
            result = [error]
    if state.num_processes > 1:
        broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def freeze_patterns(request: Request, model: ContrastiveModel) -> dict[str, int | None]:
    """Return the patterns of `train.freeze` that lock the towers of the request.

    Raises:
        UserError: for a field that does not exist; if no weight would be trained.
    """
    for name in request.lock:
        if name not in model.tower_of:
            raise UserError(f"--lock {name}: the model has no such field; it has {', '.join(model.tower_of)}")
    if set(request.lock) >= set(model.tower_of) and not request.beside:
        raise UserError("--lock of every field leaves nothing to learn")
    return {f"towers.{model.tower_of[name]}.*": None for name in request.lock}


def templates_of(request: Request, model: ContrastiveModel) -> dict[str, list[str]]:
    """Return the templates of the field of texts, with which prompts are made of names of classes; none without --classes.

    Raises:
        UserError: for a model without texts, or with several; for templates that cannot be filled in, or have no placeholder.
    """
    if not request.classes:
        if request.templates:
            raise UserError(
                "--templates: name the column that they are filled in with, as --classes label, or --classes folder"
            )
        return {}
    fields = [name for name in model.modalities if isinstance(model.modality(name), TextModality)]
    if len(fields) != 1:
        raise UserError(
            f"--classes: the model has {len(fields)} fields of texts ({', '.join(fields) or 'none'}), where one is meant"
        )
    if fields[0] in request.keys:
        raise UserError(
            f"--classes {request.classes} and --keys {fields[0]}=…: both say what its texts are: leave out one of them"
        )
    templates: list[str] = []
    for name in request.templates or [TEMPLATE]:
        templates += named_templates(name) if name in TEMPLATES else [name]
    for template in templates:
        try:
            check_template(template)
        except ValueError as error:
            raise UserError(f"--templates: {error}; or the name of a list, {' or '.join(TEMPLATES)}") from error
    return {fields[0]: templates}


def zero_shot_of(
    request: Request, model: ContrastiveModel, templates: Mapping[str, list[str]], splits: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the zero-shot task over all classes that the data has.

    Raises:
        UserError: for numbers in the place of names; for fewer than two classes; for shards that are not read ahead.
    """
    names: set[str] = set()
    for data in splits:
        samples, _ = labels_ahead(open_split(data, model), MOST_LABELS)
        names |= {metadata[CLASS_NAME] for metadata in samples if CLASS_NAME in metadata}
    if names and all(name.lstrip("+-").isdecimal() for name in names):
        raise UserError(
            f"--classes {request.classes}: {request.data} has numbers there ({', '.join(sorted(names)[:3])}, …), of which a"
            " text tower knows nothing: write the names of the classes in a column"
        )
    if len(names) < LEAST:
        problem = f"one class, {min(names)!r}" if names else "no name of a class that is read ahead"
        raise UserError(f"--classes {request.classes}: {request.data} has {problem}; there must be two or more, on a disk")
    (text,) = templates
    field = next((name for name in model.modalities if name != text), text)
    task = {"label": CLASS_NAME, "field": field, "prompt_field": text, "templates": templates[text]}
    return task | {"classes": {name: [name] for name in sorted(names)}}


def keys_of(
    request: Request, model: ContrastiveModel, choices: Choices, templates: Mapping[str, Any]
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return the columns or extensions of fields that do not have the usual names of their modality; and the fields that the
    data lacks, of a model that has two others.

    Raises:
        UserError: if a field could be several columns, or none.
    """
    fields = {name: model.modality(name) for name in model.modalities}
    for name in request.keys:
        if name not in fields:
            raise UserError(f"--keys {name}=…: the model has no such field; it has {', '.join(fields)}")
    keys = {name: list(columns) for name, columns in request.keys.items()}
    keys |= {name: [request.classes] for name in templates}
    shards = open_shards(request.data, files=request.files)
    extensions = {extension for shard in shards for extension in shard.extensions}
    open_fields = {
        name: modality for name, modality in fields.items() if name not in keys and not extensions & set(modality.extensions)
    }
    used = {column for columns in keys.values() for column in columns}
    for name in fields.keys() - open_fields.keys():
        used |= set(fields[name].extensions)
    unused = [column for column in shards[0].extensions if column not in {*used, *LABELS}] if open_fields else []
    kinds = {column: kind_of(shards[0], column) for column in unused}
    absent: list[str] = []
    for name, modality in open_fields.items():
        fitting = [column for column, kind in kinds.items() if kind and isinstance(modality, kind)]
        if not fitting and len(fields) - len(absent) > LEAST and name not in request.lock:
            absent.append(name)
            continue
        if len(fitting) != 1:
            candidates = f"any of {', '.join(fitting)}" if fitting else f"none of {', '.join(sorted(extensions))}"
            raise UserError(f"{request.data}: the field {name!r} could be {candidates}: say which, as --keys {name}=COLUMN")
        keys[name] = fitting
        choices.add(f"fields.{name}.keys", fitting[0], "the only column that looks like it")
    return keys, absent


def kind_of(shard: ShardIndex, column: str) -> type[Modality] | None:
    """Return the modality that a column's first values look like: paths of pictures or of sounds, or texts; None: none."""
    rows = np.flatnonzero(shard.has(column))[:SAMPLED]
    try:
        values = [shard.read(int(row), [column]).get(column, b"") for row in rows]
    except DecodeError:  # a structure
        return None
    for starts, kind in MAGIC.items():
        if values and all(value.startswith(starts) for value in values):
            return kind
    try:
        texts = [value.decode() for value in values]
    except UnicodeDecodeError:
        return None
    if not texts or "\0" in "".join(texts):
        return None
    for pattern, kind in ((PICTURES, ImageModality), (SOUNDS, AudioModality)):
        if all(pattern.search(text) for text in texts):
            return kind
    return TextModality if any(" " in text.strip() for text in texts) else None


def open_split(data: Mapping[str, Any], model: ContrastiveModel) -> ShardDataset:
    """Open data for the fields of a model that it has.

    Raises:
        UserError: for data that cannot be opened.
    """
    modalities = {name: model.modality(name) for name in model.modalities}
    return open_dataset(ShardOptions.of({k: v for k, v in data.items() if v}), modalities, {}, training=True, partial=True)


def memory() -> int | None:
    """Return the bytes that a step may take without a GPU, the available memory by Linux; None where that is not known."""
    return None if torch.cuda.is_available() else available_memory()
