"""The request of `mmcontrast finetune`: what it starts from, the name of its run, and the run that it resumes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmcontrast.config import RunConfig, config_of, load_config
from mmcontrast.errors import UserError
from mmcontrast.run_folder import CONFIG, REQUEST

EPOCHS = 10
IN_CONFIG = {"model", "data", "name", "architecture", "files", "select", "lora", "epochs"}  # compared with the run's config


@dataclass(frozen=True)
class Request:
    """The request of a user.

    Attributes:
        model: a name that `mmcontrast.load` takes; with `architecture`, the file of its weights.
        data, val: shards, a folder, or a table, with `keys` and `files` as `ShardOptions`.
        beside: a second half, as a text tower beside timm's pictures.
        lora: the rank of low-rank updates.
        lock: fields whose towers are not trained.
        classes: the column or extension that names classes, in the place of texts; "folder": the folder that a sample lies in.
        templates: of the prompts that are made of them: texts with {}, or the name of a list of open_clip's.
        image_size, context_length, new_tokens: of `model.start`, where they differ from its own.
        probe_epochs: in which the projections are trained alone, before the towers (LP-FT, arXiv:2202.10054).
        select: a selection of `data`, as `data.select`.
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
    select: str | None = None

    def to_json(self) -> str:
        """Return the request as it is kept in its run's folder."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)


def config_to_resume(request: Request, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config that a run was started with.

    Raises:
        UserError: if there is no such run, or it was started for another request.
    """
    draft = {"run": {"name": request.name or name_of(request)}, "model": {"start": start_of(request)}}
    draft |= {"data": {"train": request.data}, "train": {"epochs": request.epochs, "batch_size": 1}}
    folder = config_of(draft, [override for override in overrides if override.startswith("run.")]).folder
    if not (folder / CONFIG).is_file():
        raise UserError(f"no run at {folder} to resume: start it without --resume, or name it as --name")
    refuse_another_request(request, load_config(folder / CONFIG), folder, overrides)
    return load_config(folder / CONFIG, overrides)


def refuse_another_request(request: Request, config: RunConfig, folder: Path, overrides: Sequence[str]) -> None:
    """Check that a run was started with what a command that resumes it names; what it leaves to its defaults, or
    overrides, may be anything.

    Raises:
        UserError: for the first option that differs.
    """
    train, lora = config.data.train, config.model.lora
    source = next(iter(train.values())) if isinstance(train, dict) else None
    shards = source.shards if source else train
    start = start_of(request)
    names = [entry["model"] if isinstance(entry, dict) else entry for entry in (start if isinstance(start, list) else [start])]
    asked: dict[str, tuple[Any, Any]] = {
        "MODEL": (names, [option.model for option in config.model.starts]),
        "DATA": ([request.data], [shards] if isinstance(shards, str) else shards),
        "--files": (request.files, source and source.files),
        "--select": (request.select, source and source.select),
        "--lora": (request.lora, lora and lora.rank),
        "--epochs": (None if request.epochs == EPOCHS else request.epochs, config.train.epochs),
    }
    keys: dict[str, tuple[str, ...]] = {"MODEL": ("model.start",), "DATA": ("data.train",), "--lora": ("model.lora",)}
    keys["--epochs"] = ("train.epochs", "train.steps")
    for option, (value, saved) in asked.items():
        overridden = any(override.startswith(keys.get(option, ())) for override in overrides)
        if value is not None and value != saved and not overridden:
            shown, was = (", ".join(v) if isinstance(v, list) else "none" if v is None else v for v in (value, saved))
            raise UserError(
                f"{option} {shown}: {folder} was started with {was}: leave it as it was, change options of the config as"
                " OPTION=VALUE, or start another run with --name"
            )

    if not (folder / REQUEST).is_file():
        return
    first, now = json.loads((folder / REQUEST).read_text(encoding="utf-8")), json.loads(request.to_json())
    default = json.loads(Request(request.model, request.data).to_json())
    for name in sorted(now.keys() - IN_CONFIG):
        if now[name] not in (default[name], first.get(name)):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: {folder} was started with {first.get(name) or 'none'}, not {now[name]}: leave it out")


def start_of(request: Request) -> Any:
    """Return the value of `model.start`.

    Raises:
        UserError: for a file of weights without its architecture.
    """
    if request.architecture:
        if not Path(request.model).is_file():
            raise UserError(f"--architecture {request.architecture}: {request.model} must be the file of its weights")
        start: Any = {"model": request.architecture, "pretrained": str(Path(request.model).absolute())}
    elif Path(request.model).is_file():
        raise UserError(f"{request.model} is a file of weights: name their architecture, as --architecture ViT-B-32")
    else:
        start = str(Path(request.model).absolute()) if Path(request.model).exists() else request.model
        start = {"model": start, "pretrained": request.pretrained} if request.pretrained else start
    sizes: dict[str, Any] = {"image_size": request.image_size, "context_length": request.context_length}
    sizes["new_tokens"] = list(request.new_tokens)
    if options := {option: value for option, value in sizes.items() if value}:
        start = ({"model": start} if isinstance(start, str) else start) | options
    return [start, request.beside] if request.beside else start


def name_of(request: Request) -> str:
    """Return a run's name: the model's and the data's."""
    parts = [Path(request.architecture or request.model).name, Path(request.data).name.partition(".")[0]]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-") or "tuned"
