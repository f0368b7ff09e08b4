"""Read a run's configuration: YAML with dotted overrides, typed and frozen; unknown keys are refused with the nearest one."""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError, field_validator, model_validator

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EvaluationOptions
from mmcontrast.models.options import FieldOptions, ModelOptions, ScoreOptions
from mmcontrast.options import Component, Options
from mmcontrast.training.data_options import DataOptions
from mmcontrast.training.held_out import with_held_out
from mmcontrast.training.options import TrainOptions
from mmcontrast.yaml_files import dump_yaml, parse_yaml, read_yaml

T = TypeVar("T", bound=Options)
# parts of an error's location that name one of several allowed forms, not a key
FORM = re.compile(r"str|list\[.*\]|dict\[.*\]|literal\[.*\]|function-\w+\[.*\]|[A-Z]\w*Options")


class RunOptions(Options):
    """The folder of a run, `dir`/`name`.

    Attributes:
        name: the folder's name; default: the config file's.
        dir: the folder that it is in; "~" and "$SCRATCH" are those of the environment.
    """

    name: str
    dir: str = "runs"

    @field_validator("dir")
    @classmethod
    def _expand(cls, value: str) -> str:
        expanded = os.path.expandvars(os.path.expanduser(value))
        if "$" in expanded:
            raise ValueError("it names a variable that is not set")
        return expanded


class RunConfig(Options):
    """The configuration of a run, saved with it as config.yaml, which is enough to rebuild it.

    Attributes:
        run: the folder of the run.
        fields: the fields of a sample, by name: two or more.
        towers: the encoders of fields, by name: a type of the table of towers, or an import path, with its options.
        model: how towers become one model, or the pretrained model that it starts from.
        objective: the loss of an anchor and its candidates.
        pairing: which fields are contrasted with which.
        score: the score of two embeddings; default: that of `model.start`, or their cosine.
        data: the training data.
        train: the training loop.
        evaluation: what is evaluated, at the end of the run and during it.
    """

    run: RunOptions
    fields: dict[str, FieldOptions] = {}
    towers: dict[str, Component] = {}
    model: ModelOptions = ModelOptions()
    objective: Component = "infonce"
    pairing: Component = "all_pairs"
    score: ScoreOptions | None = None
    data: DataOptions
    train: TrainOptions
    evaluation: EvaluationOptions = EvaluationOptions()

    @model_validator(mode="after")
    def _check_fields(self) -> "RunConfig":
        if self.model.start:
            return self
        if len(self.fields) < 2:
            raise ValueError("fields: there must be two or more, or a model to begin with, model.start")
        for name, field in self.fields.items():
            for option in ("modality", "tower"):
                if getattr(field, option) is None:
                    raise ValueError(f"fields.{name}.{option} is missing: only a field of model.start can do without")
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete_held_out_splits(cls, tree: Any) -> Any:
        return with_held_out(tree) if isinstance(tree, dict) else tree

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.run.dir) / self.run.name

    def to_yaml(self) -> str:
        """Return the configuration as YAML."""
        return dump_yaml(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config, apply overrides like "train.steps=50", and validate it.

    Raises:
        UserError: for the first mistake, in one line with its dotted path.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping of options")
    return config_of(tree, overrides, path)


def config_of(tree: dict[str, Any], overrides: Sequence[str] = (), path: str | Path = "config") -> RunConfig:
    """Validate a config that is a tree of options, with overrides; the file's name is the run's, unless the config has one.

    Raises:
        UserError: for the first mistake, in one line with its dotted path.
    """
    tree = copy.deepcopy(tree)
    for override in overrides:
        _apply(tree, override, ("objective", "pairing"))
    _drop_replaced(tree, overrides)
    tree.setdefault("run", {})
    if isinstance(tree["run"], dict) and tree["run"].get("name") is None:
        tree["run"]["name"] = Path(path).stem
    _read_tasks(tree.get("evaluation"), path)
    return _validate(path, tree, RunConfig, overrides)


def load_suite(suite: str | Path | EvaluationOptions, overrides: Sequence[str] = ()) -> EvaluationOptions:
    """Read a suite, a YAML file of the options that a config has under `evaluation`, as in eval/; or change one.

    Raises:
        UserError: as `load_config`.
    """
    if isinstance(suite, EvaluationOptions):
        path, tree = "evaluation", suite.model_dump(mode="json")
    else:
        path, tree = str(suite), read_yaml(suite)
    if not isinstance(tree, dict):
        name = Path(path).name
        raise UserError(f"{path} holds no mapping of options: a suite is a YAML file, as `splits: {{val: {name}}}`")
    for override in overrides:
        _apply(tree, override)
    _read_tasks(tree, path)
    return _validate(path, tree, EvaluationOptions, overrides)


def _validate(path: str | Path, tree: dict[str, Any], options: type[T], overrides: Sequence[str] = ()) -> T:
    """Validate a tree. An override to null of an option that may not be null restores its default; of one that is a text, what
    YAML reads as a number or a date is the text that it was: run.name=12e4567."""
    given = {tuple(option.split(".")): value for option, _, value in (override.partition("=") for override in overrides)}
    while True:
        try:
            return options.model_validate(tree)
        except ValidationError as error:
            errors = [
                (tuple(part for part in map(str, e["loc"]) if not FORM.fullmatch(part)), e["type"]) for e in error.errors()
            ]
            meant = next((name for name, kind in errors if name in given and _meant(tree, name, given[name], kind)), None)
            if meant is None:
                raise UserError(f"{path}: {_first_error(error, options)}") from error
            del given[meant]


def _meant(tree: dict[str, Any], name: tuple[str, ...], value: str, kind: str) -> bool:
    """Put into a tree what a refused override means, and return whether it means anything else than what YAML reads."""
    for parent in name[:-1]:
        tree = tree[parent]
    parsed = parse_yaml(value)
    if parsed is None:
        del tree[name[-1]]
    elif kind == "string_type" and not isinstance(parsed, str | dict | list):
        tree[name[-1]] = value.strip()
    else:
        return False
    return True


def _read_tasks(evaluation: Any, path: str | Path) -> None:
    """Read zero-shot tasks that are paths of files, from the working directory, the config's folder or the one above it."""
    tasks = (evaluation or {}).get("zero_shot") or {} if isinstance(evaluation, dict) else {}
    for name, task in tasks.items() if isinstance(tasks, dict) else ():
        if isinstance(task, str):
            files = [Path(task), Path(path).parent / task, Path(path).parent.parent / task]
            tasks[name] = read_yaml(next((file for file in files if file.is_file()), task))


def _apply(tree: dict[str, Any], override: str, components: Sequence[str] = ()) -> None:
    """Apply an override to a tree of options."""
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise UserError(f"override {override!r} is not of the form key.key=value, like train.steps=50")
    *parents, last = path.split(".")
    if parents and parents[0] in components:  # options of the default component: pairing.weights={image-text: 2}
        tree.setdefault(parents[0], RunConfig.model_fields[parents[0]].default)
    for parent in parents:
        if isinstance(tree.get(parent), str):  # a component given by its name: objective=infonce
            tree[parent] = {"type": tree[parent]}
        elif tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {parent!r} holds no options")
    try:
        tree[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML") from error


def _drop_replaced(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Let an override of one of `train.steps` and `train.epochs` take the place of the other where the file has it."""
    values = {path: value for path, _, value in (override.partition("=") for override in overrides)}
    for option, other in (("steps", "epochs"), ("epochs", "steps")):
        is_set = f"train.{option}" in values and parse_yaml(values[f"train.{option}"]) is not None
        if is_set and f"train.{other}" not in values and isinstance(tree.get("train"), dict):
            tree["train"].pop(other, None)


def _first_error(error: ValidationError, root: type[BaseModel]) -> str:
    """Return pydantic's first error as one line, with the nearest valid key for an unknown one. Where several forms are
    allowed, it reports each: take the form that fits furthest."""
    errors = error.errors()
    start = next((k for k, part in enumerate(errors[0]["loc"]) if FORM.fullmatch(str(part))), len(errors[0]["loc"]))
    alternatives = [error for error in errors if error["loc"][:start] == errors[0]["loc"][:start]]
    specific = ("extra_forbidden", "value_error")  # of a form's own keys, or of its options together
    first = max(alternatives, key=lambda error: (len(error["loc"]), error["type"] in specific))
    path = [part for part in map(str, first["loc"]) if not FORM.fullmatch(part)]
    if first["type"] == "extra_forbidden":
        return f"unknown key {'.'.join(path)!r}; {suggestion(path[-1], _valid_keys(path[:-1], root))}"
    message = first["msg"].removeprefix("Value error, ")
    of_group = first["type"] == "value_error" and len(first["loc"]) < 2  # its input is a whole group of options
    value = "" if first["type"] == "missing" or of_group else f" (found {str(first['input'])[:60]!r})"
    if first["type"] == "string_type" and isinstance(first["input"], int | float | date):
        value += f": YAML reads a {type(first['input']).__name__} there, so write the text in quotes"
    return f"{'.'.join(path) or 'config'}: {message[:1].lower()}{message[1:]}{value}"


def _valid_keys(path: Sequence[str], options: type[BaseModel]) -> list[str]:
    """Return the options that exist at a dotted path."""
    for part in path:
        if part in options.model_fields:
            options = next(iter(_options_in(options.model_fields[part].annotation)), options)
    return list(options.model_fields)


def _options_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield all groups of options in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _options_in(part)
