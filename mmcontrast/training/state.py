"""A run's state: taken from what learns, and given back to it, on any number of ranks, whole or in shards."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.evaluation.sending import from_first
from mmcontrast.models import ContrastiveModel
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from mmcontrast.training.context import RunContext
from mmcontrast.training.mining import Mining
from mmcontrast.training.parallel import in_shards, shard_all_like, shard_like
from mmcontrast.training.step import Learner
from mmcontrast.training.tensors import read_parts

GIVEN = ("lr", "peak_lr", "weight_decay", "betas", "eps")  # of a group: the config's, also of a run that is resumed


def state_of(done: int, job: RunContext, learner: Learner) -> Contents:
    """All there is to save after a number of steps, as it is: what is in shards stays there."""
    optimizer, shards = optimizer_state(learner.optimizer, job.model)
    scaler = learner.accelerator.scaler
    state = {
        "step": done,
        "optimizer": optimizer,
        "scaler": scaler.state_dict() if scaler else {},
        "objective": job.objective.state_dict(),
        "order": job.order.state(),
        "mined": job.mined,
        "threads": torch.get_num_threads(),
        "teachers": [teacher.identity for teacher in job.teachers],
    }
    of_start = job.model.of_start
    weights, averaged, queue = _saved(job.model, of_start), _saved(learner.averaged, of_start), _saved(learner.queue)
    return Contents(weights, averaged, state, job.config, shards, job.model.start_digest, queue)


def _saved(module: nn.Module | None, but: Container[str] = ()) -> dict[str, Tensor]:
    tensors = module.state_dict() if module else {}
    return {name: tensor for name, tensor in tensors.items() if name not in but}


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(groups and state by the names of the weights, the part of the state that is in shards by "kind/name")."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = [group | {"params": [names[one] for one in group["params"]]} for group in optimizer.param_groups]
    state: dict[str, dict[str, Any]] = {}
    shards: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        name = names[parameter]
        shards |= {f"{kind}/{name}": value for kind, value in values.items() if in_shards(value)}
        state[name] = {kind: value for kind, value in values.items() if not in_shards(value)}
    return {"kind": type(getattr(optimizer, "optimizer", optimizer)).__name__, "groups": groups, "state": state}, shards


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, Any], shards: Path) -> None:
    """
    Args:
        saved, shards: as `optimizer_state` gave them, the latter in a folder, if there were any.

    The rates, decays and betas are those of the optimizer, not of what was saved.

    Raises:
        ValueError: if it was another optimizer, or other weights learn.
    """
    now, _ = optimizer_state(optimizer, model)
    if now["kind"] != saved["kind"]:
        raise ValueError(f"it was {saved['kind']}, and is {now['kind']}")
    names, before = (sorted(n for group in one["groups"] for n in group["params"]) for one in (now, saved))
    if names != before:
        raise ValueError(f"{', '.join(sorted(set(names) ^ set(before))[:3])} learn in one of the two")
    parameters = dict(model.named_parameters())
    state = {name: dict(values) for name, values in saved["state"].items()}
    for key, tensor in read_shards(shards, parameters).items() if shards.exists() else ():
        kind, _, name = key.partition("/")
        state[name][kind] = tensor
    numbers = {name: k for k, name in enumerate(name for group in now["groups"] for name in group["params"])}
    groups = []
    for group in now["groups"]:  # some optimizers count their steps there
        same = next(one for one in saved["groups"] if group["params"][0] in one["params"])
        now_given = {option: value for option, value in group.items() if option in GIVEN or option not in same}
        groups.append(same | now_given | {"params": [numbers[name] for name in group["params"]]})
    placed = {
        numbers[name]: {
            kind: shard_like(value, parameters[name]) if isinstance(value, Tensor) and value.dim() else value
            for kind, value in values.items()
        }
        for name, values in state.items()
    }
    optimizer.load_state_dict({"state": placed, "param_groups": groups})


def read_shards(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ranks wrote of "kind/name", each rank reading what it will hold of it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    into: dict[str, Tensor] = {}
    for key, about in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata)
        parameter = parameters[key.partition("/")[2]].detach()
        same = in_shards(parameter) and parameter.shape == about.size
        dtype = about.properties.dtype
        into[key] = torch.empty_like(parameter, dtype=dtype) if same else torch.empty(about.size, dtype=dtype)
    dcp.load(into, storage_reader=reader, no_dist=True)
    return into


def restore(path: Path, job: RunContext, learner: Learner, mining: Mining | None = None) -> int:
    """Loads a checkpoint into a job; returns the steps that are done.

    Args:
        mining: opens the table that was mined last before the checkpoint.

    Raises:
        UserError: if the checkpoint is damaged, of another model or another order of the data; it says what differs.
    """
    group, device = learner.group, learner.accelerator.device
    checkpoint.check(path, group)
    state: dict[str, Any] = from_first(lambda: checkpoint.load_state(path), group, device)

    def load(module: nn.Module, file: Path) -> None:
        load_weights(module, read_parts(file, module.state_dict(), group, device), str(file))

    if mining and state.get("mined") is not None:
        mining.open(state["mined"])
    now = job.order.state()
    for name in sorted(state["order"].keys() | now.keys()):
        before, after = (str(order.get(name)) for order in (state["order"], now))
        if before != after:
            here, there = yaml.safe_load(job.config)["data"], saved_data(path)
            changed = [f"data.{option}" for option in ("held_out", "select") if here.get(option) != there.get(option)]
            said = [f"{name} was {there.get(name[5:])}, is {here.get(name[5:])}" for name in changed]
            why = f" ({'; '.join(said)})" if said else ""
            raise UserError(
                f"cannot resume {job.folder}: its data order had {name}={before[:200]}, now {after[:200]}{why};"
                " give it back, or start another run with train.init_from"
            )
    if state["step"] > job.options.total_steps:
        epochs = job.options.epochs
        asked = f"train.steps={job.options.steps}" if epochs is None else f"the {job.options.steps} of train.epochs={epochs:g}"
        raise UserError(f"{job.folder} already has {state['step']} steps, more than {asked}")
    check_start(job.model, path)
    check_teachers(job, state.get("teachers", []))
    load(job.model, checkpoint.weights_file(path))
    try:
        load_optimizer(learner.optimizer, job.model, state["optimizer"], path / checkpoint.SHARDS)
    except (ValueError, KeyError) as error:
        raise UserError(f"cannot resume {job.folder}: another optimizer, or other weights learn ({error})") from error
    if learner.accelerator.scaler and state["scaler"]:
        learner.accelerator.scaler.load_state_dict(state["scaler"])
    job.objective.load_state_dict(state["objective"])
    if learner.averaged:
        load(learner.averaged, checkpoint.weights_file(path, averaged=True))
    if learner.queue and (path / checkpoint.QUEUE).exists():
        load(learner.queue, path / checkpoint.QUEUE)
    elif learner.queue and state.get("queue"):  # of a checkpoint of before 2026-11-26
        load_weights(learner.queue, state["queue"], f"the queue in {path}")
    elif learner.queue:
        raise UserError(f"cannot resume {job.folder} with a queue: it had none; start another run with train.init_from")
    return state["step"]


def saved_data(path: Path) -> Any:
    """Return the `data` of a checkpoint's config."""
    return yaml.safe_load((path / checkpoint.CONFIG).read_text(encoding="utf-8"))["data"]


def check_start(model: ContrastiveModel, path: Path) -> None:
    """
    Raises:
        UserError: for a checkpoint whose weights were trained beside another start.
    """
    if (trained := checkpoint.start_of(path)) != model.start_digest:
        what = "model.start is not what it was" if trained and model.start_digest else "it was trained with another model.lora"
        raise UserError(f"{path}: {what}: its weights do not belong to these: give back the start, and its name in config.yaml")


def check_teachers(job: RunContext, saved: list[dict[str, str]]) -> None:
    """
    Raises:
        UserError: for teachers that are not those of a checkpoint. Their places may be others, their weights may not.
    """
    now = [teacher.identity for teacher in job.teachers]
    if [one["digest"] for one in now] != [one["digest"] for one in saved]:
        before, after = (", ".join(f"{one['name']} ({one['digest'][:8]})" for one in each) or "none" for each in (saved, now))
        raise UserError(
            f"cannot resume {job.folder}: its teacher was {before}, is {after}: give train.teacher what it had, or start"
            " another run with train.init_from"
        )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Give a model its weights, all but those that it has of a start.

    Raises:
        UserError: if names or shapes differ; it names the first.
    """
    of_start: frozenset[str] = getattr(model, "of_start", frozenset())
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in of_start}
    for name in sorted(own.keys() ^ weights.keys()):
        raise UserError(f"{source}: {name} is {'missing in it' if name in own else 'not in the model'}: another architecture")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise UserError(f"{source}: {name} is {list(weights[name].shape)}, the model's {list(tensor.shape)}")
    model.load_state_dict(shard_all_like(weights, own), strict=not of_start)


def weights_path(source: str, group: dist.ProcessGroup | None = None) -> Path:
    """A .safetensors file, a checkpoint's folder, or the last checkpoint of a run's folder.

    Args:
        group: its ranks share the check of the checkpoint's files; all must ask.

    Raises:
        UserError: if the checkpoint is damaged.
    """
    path = Path(source)
    if (path / "checkpoints").is_dir():
        path = checkpoint.find(path / "checkpoints", "last")
    if path.is_dir() and not (path / checkpoint.MANIFEST).exists():
        raise UserError(f"{source} is neither a run's folder, nor one of its checkpoints, nor a .safetensors file")
    if path.is_dir():
        checkpoint.check(path, group)
    return path
