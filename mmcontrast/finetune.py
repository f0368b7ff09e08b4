"""`mmcontrast finetune MODEL DATA`: a complete config for a model that is there and data of one's own; `train` runs it.

What is chosen and why is listed beside it, and each choice is an option of the config, which an override sets.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from rich.table import Table

from mmcontrast.config import RunConfig, config_of, load_config
from mmcontrast.data import ShardDataset, ShardOptions, open_dataset, open_shards
from mmcontrast.data.class_texts import CLASS_NAME, check_template
from mmcontrast.data.shard import LABELS, ShardIndex
from mmcontrast.errors import UserError
from mmcontrast.evaluation.labels import labels_ahead
from mmcontrast.evaluation.prompts import TEMPLATES, named_templates
from mmcontrast.modalities import AudioModality, ImageModality, Modality, TextModality
from mmcontrast.modalities.parts import JPEG_START, PNG_START
from mmcontrast.models import ContrastiveModel
from mmcontrast.plan import CannotBePlanned, plan_run
from mmcontrast.runs import CONFIG, model_of
from mmcontrast.training.distributed import join_processes

FULL_LR, LORA_LR = 1e-5, 2e-4  # as WiSE-FT (arXiv:2109.01903) and FLYP (2212.00638) do; as CLIP-LoRA does (2405.18541)
MOST_WARMUP, WARMUP_SHARE = 500, 0.1
LARGEST_BATCH, PARTS = 512, 4  # a step takes at most so many samples, and a quarter of the data
EPOCHS, HELD_OUT = 10, 0.1
TEMPLATE = "a photo of a {}."
MOST_LABELS = 200_000  # samples that are read for the names of their classes
LEAST = 2  # fields are contrasted
SAMPLED = 16  # rows whose columns are looked into
PICTURES = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)
MAGIC: dict[tuple[bytes, ...], type[Modality]] = {
    (JPEG_START, PNG_START): ImageModality,
    (b"fLaC", b"OggS", b"ID3"): AudioModality,
}
SOUNDS = re.compile(r"\.(wav|flac|mp3|ogg|opus|m4a)$", re.IGNORECASE)


@dataclass
class Choices:
    """What was chosen for a run, in the order of its making: (option, value, why)."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, option: str, value: Any, why: str) -> None:
        self.rows.append((option, f"{value:g}" if isinstance(value, float) else str(value), why))

    def but(self, overrides: Sequence[str]) -> "Choices":
        """Return them with what a user has asked for in the place of what was chosen."""
        asked = {option: value for option, _, value in (override.partition("=") for override in overrides)}
        return Choices([(o, asked[o], "as asked") if o in asked else (o, value, why) for o, value, why in self.rows])

    def table(self) -> Table:
        table = Table("option", "value", "why", title="chosen; override any of them as OPTION=VALUE", title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        model: a name that `mmcontrast.load` takes; with `architecture`, the file of its weights.
        data, val: shards, a folder, or a table, with `keys` and `files` as `ShardOptions`.
        beside: a second half, as a text tower beside timm's pictures.
        lora: the rank of low-rank updates.
        lock: fields whose towers do not learn.
        classes: the column or extension that names classes, in the place of texts; "folder": the folder that it lies in.
        templates: what prompts are made of them: texts with {}, or the name of a list of open_clip's.
        image_size, context_length, new_tokens: of `model.start`, where they are to be others than its own.
        probe_epochs: in which the projections learn alone, before the towers do (LP-FT, arXiv:2202.10054).
    """

    model: str
    data: str
    val: str | None = None
    name: str | None = None
    architecture: str | None = None
    pretrained: str | None = None
    beside: str | None = None
    lora: int | None = None
    lock: Sequence[str] = ()
    epochs: float = EPOCHS
    probe_epochs: float = 0
    keys: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    files: str | None = None
    image_size: int | None = None
    context_length: int | None = None
    classes: str | None = None
    templates: Sequence[str] = ()
    new_tokens: Sequence[str] = ()


def make_config(request: Request, overrides: Sequence[str] = ()) -> tuple[RunConfig, Choices]:
    """Make the config of a fine-tuning run, with what was chosen for it.

    Raises:
        UserError: for a model or data that cannot be opened, columns that cannot be told apart, or what does not go together.
    """
    chosen = Choices()
    start = start_of(request)
    name = request.name or name_of(request)
    draft: dict[str, Any] = {"run": {"name": name}, "model": {"start": start}, "data": {"train": request.data}}
    draft |= {"train": {"epochs": request.epochs, "batch_size": 2}}
    model = model_of(config_of(draft), tokenizers=False, weights=False)
    templates = templates_of(request, model)
    keys, absent = keys_of(request, model, chosen, templates)
    data: dict[str, Any] = {"shards": request.data, "keys": keys, "files": request.files, "templates": templates}
    samples = len(open_split(data, model))
    if absent:
        taken = [name for name in model.modalities if name not in absent]
        draft["model"]["start"] = {**({"model": start} if isinstance(start, str) else start), "fields": taken}
        chosen.add("model.start.fields", ", ".join(taken), f"the data has no {', '.join(absent)}")
    of_its_own = request.files or templates
    draft["data"] = {"train": {"data": {k: v for k, v in data.items() if v}} if of_its_own else request.data}
    draft["fields"] = {of: {"keys": names} for of, names in keys.items()}
    held = 0.0 if request.val else HELD_OUT
    if request.val:
        draft["evaluation"] = {"splits": {"val": {k: v for k, v in (data | {"shards": request.val}).items() if v}}}
    else:
        draft["data"]["held_out"] = held
        chosen.add("data.held_out", held, "no --val: this share is evaluated, and not trained on")
    if templates:
        splits = [data, data | {"shards": request.val}] if request.val else [data]
        task = zero_shot_of(request, model, templates, splits)
        chosen.add("evaluation.zero_shot", f"{len(task['classes'])} classes", "accuracy by prompts, before and after")
        best = f"{'val' if request.val else 'data'}/zero_shot/classes/top1"
        draft["evaluation"] = draft.get("evaluation", {}) | {"zero_shot": {"classes": task}, "best": best}
    learnt = samples * (1 - held)
    batch = min(LARGEST_BATCH, 2 ** int(math.log2(max(2.0, learnt / PARTS))))
    chosen.add("train.batch_size", batch, f"of {learnt:.0f} samples, at most a quarter, and {LARGEST_BATCH}")
    draft["train"]["batch_size"] = batch
    asked = config_of(draft, overrides).train
    an_epoch = max(1, int(learnt // asked.batch_size))
    steps = asked.steps or (asked.epochs or request.epochs) * an_epoch
    chosen.add("train.epochs", request.epochs, f"about {steps:.0f} steps")
    lr = LORA_LR if request.lora else FULL_LR
    chosen.add("train.lr", lr, "low-rank updates learn" if request.lora else "the weights themselves learn")
    warmup = min(MOST_WARMUP, int(WARMUP_SHARE * steps))
    chosen.add("train.warmup_steps", warmup, f"a tenth of the steps, at most {MOST_WARMUP}")
    biased = model.logit_bias is not None
    draft["objective"] = "siglip" if biased else "infonce"
    chosen.add("objective", draft["objective"], "the model has a logit bias" if biased else "the model has no logit bias")
    precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    chosen.add("train.precision", precision, "on a GPU that has it" if precision == "bf16" else "no GPU with bf16")
    workers = max(0, min(4, (os.cpu_count() or 1) - 1))
    draft["data"]["num_workers"] = workers
    frozen = locked(request, model)
    if request.probe_epochs and not request.beside:
        raise UserError("--probe-epochs: the model has no new projection that could learn alone: leave it out")
    if request.probe_epochs:
        frozen |= {"towers.*": max(1, round(request.probe_epochs * an_epoch))}
        chosen.add("train.freeze", frozen, "the projections learn alone until then")
    draft["train"] |= {"lr": lr, "warmup_steps": warmup, "precision": precision, "freeze": frozen}
    draft["train"] |= {"evaluate_first": True, "weight_decay": 0.1}
    if request.lora:
        draft["model"]["lora"] = {"rank": request.lora}
        chosen.add("model.lora", f"rank {request.lora}", "all linear layers of blocks and attention pools; alpha is the rank")
    config = config_of(draft, overrides)
    try:
        found = plan_run(config, available=memory())
    except CannotBePlanned as error:
        chosen.add("train.micro_batch_size", "none", f"not known to fit: {error}")
        return config, chosen.but(overrides)
    if not found.fits and found.largest:
        draft["train"]["micro_batch_size"] = found.largest
        chosen.add("train.micro_batch_size", found.largest, "what fits into memory: the same loss, a second forward")
        config = config_of(draft, overrides)
    return config, chosen.but(overrides)


def made_once(request: Request, overrides: Sequence[str] = ()) -> tuple[RunConfig, Choices]:
    """Make the config on the first rank, for all: what fits into memory may differ between them.

    Raises:
        UserError: as `make_config`.
    """
    state = join_processes()
    made: list[Any] = [None]
    if state.is_main_process:
        try:
            made = [make_config(request, overrides)]
        except UserError as error:
            made = [error]
    if state.num_processes > 1:
        broadcast_object_list(made)
    if isinstance(made[0], UserError):
        raise made[0]
    return made[0]


def resumed(request: Request, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config that a run was started with.

    Raises:
        UserError: if there is no such run.
    """
    draft = {"run": {"name": request.name or name_of(request)}, "model": {"start": start_of(request)}}
    draft |= {"data": {"train": request.data}, "train": {"epochs": request.epochs, "batch_size": 1}}
    folder = config_of(draft, [override for override in overrides if override.startswith("run.")]).folder
    if not (folder / CONFIG).is_file():
        raise UserError(f"no run at {folder} to resume: start it without --resume, or name it as --name")
    return load_config(folder / CONFIG, overrides)


def start_of(request: Request) -> Any:
    """Return what `model.start` says.

    Raises:
        UserError: for a file of weights without its architecture.
    """
    if request.architecture:
        if not Path(request.model).is_file():
            raise UserError(f"--architecture {request.architecture}: {request.model} must be the file of its weights")
        first: Any = {"model": request.architecture, "pretrained": str(Path(request.model).absolute())}
    elif Path(request.model).is_file():
        raise UserError(f"{request.model} is a file of weights: name their architecture, as --architecture ViT-B-32")
    else:
        here = Path(request.model).exists()
        first = str(Path(request.model).absolute()) if here else request.model
        first = {"model": first, "pretrained": request.pretrained} if request.pretrained else first
    sizes: dict[str, Any] = {"image_size": request.image_size, "context_length": request.context_length}
    sizes["new_tokens"] = list(request.new_tokens)
    if given := {option: value for option, value in sizes.items() if value}:
        first = ({"model": first} if isinstance(first, str) else first) | given
    return [first, request.beside] if request.beside else first


def name_of(request: Request) -> str:
    """Return a run's name: the model's and the data's."""
    parts = [Path(request.architecture or request.model).name, Path(request.data).name.partition(".")[0]]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-") or "tuned"


def locked(request: Request, model: ContrastiveModel) -> dict[str, int | None]:
    """
    Raises:
        UserError: for a field that there is not; where nothing would learn.
    """
    for name in request.lock:
        if name not in model.tower_of:
            raise UserError(f"--lock {name}: the model has no such field; it has {', '.join(model.tower_of)}")
    if set(request.lock) >= set(model.tower_of) and not request.beside:
        raise UserError("--lock of every field leaves nothing to learn")
    return {f"towers.{model.tower_of[name]}.*": None for name in request.lock}


def templates_of(request: Request, model: ContrastiveModel) -> dict[str, list[str]]:
    """Return, of the field of texts, what prompts are made of names of classes; nothing where the data has no --classes.

    Raises:
        UserError: for a model without texts, or with several; for templates that cannot be filled in, or are none.
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
    templates = [
        one for given in request.templates or [TEMPLATE] for one in (named_templates(given) if given in TEMPLATES else [given])
    ]
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
        names |= {about[CLASS_NAME] for about in samples if CLASS_NAME in about}
    if names and all(name.lstrip("+-").isdecimal() for name in names):
        raise UserError(
            f"--classes {request.classes}: {request.data} has numbers there ({', '.join(sorted(names)[:3])}, …), of which a"
            " text tower knows nothing: write the names of the classes in a column"
        )
    if len(names) < LEAST:
        there = f"one class, {min(names)!r}" if names else "no name of a class that is read ahead"
        raise UserError(f"--classes {request.classes}: {request.data} has {there}; there must be two or more, on a disk")
    (text,) = templates
    field = next((name for name in model.modalities if name != text), text)
    task = {"label": CLASS_NAME, "field": field, "prompt_field": text, "templates": templates[text]}
    return task | {"classes": {name: [name] for name in sorted(names)}}


def keys_of(
    request: Request, model: ContrastiveModel, chosen: Choices, templates: Mapping[str, Any]
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return the columns or extensions of fields where these have not the names that a modality looks for; and the fields that
    the data has not, of a model that has two others.

    Raises:
        UserError: where the one that is meant cannot be told.
    """
    fields = {name: model.modality(name) for name in model.modalities}
    for name in request.keys:
        if name not in fields:
            raise UserError(f"--keys {name}=…: the model has no such field; it has {', '.join(fields)}")
    keys = {name: list(columns) for name, columns in request.keys.items()}
    keys |= {name: [request.classes] for name in templates}
    shards = open_shards(request.data, files=request.files)
    there = {extension for shard in shards for extension in shard.extensions}
    open_fields = {n: m for n, m in fields.items() if n not in keys and not there & set(m.extensions)}
    used = {column for columns in keys.values() for column in columns}
    used |= {e for n, m in fields.items() if n not in open_fields for e in m.extensions}
    kinds = {column: kind_of(shards[0], column) for column in shards[0].extensions if column not in {*used, *LABELS}}
    absent: list[str] = []
    for name, modality in open_fields.items():
        fitting = [column for column, kind in kinds.items() if kind and isinstance(modality, kind)]
        if not fitting and len(fields) - len(absent) > LEAST and name not in request.lock:
            absent.append(name)
            continue
        if len(fitting) != 1:
            said = f"any of {', '.join(fitting)}" if fitting else f"none of {', '.join(sorted(there))}"
            raise UserError(f"{request.data}: the field {name!r} could be {said}: say which, as --keys {name}=COLUMN")
        keys[name] = fitting
        chosen.add(f"fields.{name}.keys", fitting[0], "the only column that looks like it")
    return keys, absent


def kind_of(shard: ShardIndex, column: str) -> type[Modality] | None:
    """Return the modality that a column's first values look like: paths of pictures or of sounds, or texts; None: none."""
    rows = np.flatnonzero(shard.has(column))[:SAMPLED]
    values = [shard.read(int(row), [column]).get(column, b"") for row in rows]
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
    """
    Raises:
        UserError: for data that cannot be opened.
    """
    modalities = {name: model.modality(name) for name in model.modalities}
    return open_dataset(ShardOptions.of({k: v for k, v in data.items() if v}), modalities, {}, training=True, partial=True)


def memory() -> int | None:
    """Return the bytes that a step may take without a GPU: what Linux says is available; None where nothing says it."""
    if torch.cuda.is_available():
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
