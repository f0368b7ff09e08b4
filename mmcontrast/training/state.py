"""Save and restore a run's state: weights, optimizer, objective and data order, on any number of ranks, whole or in shards."""

import logging
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.evaluation.sending import from_first
from mmcontrast.models import ContrastiveModel
from mmcontrast.objectives import Objective
from mmcontrast.objectives.sample_table import SampleTable
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from mmcontrast.training.context import RunContext
from mmcontrast.training.mining import Mining
from mmcontrast.training.parallel import in_shards, shard_all_like, shard_like
from mmcontrast.training.step import Learner
from mmcontrast.training.tensors import read_parts
from mmcontrast.yaml_files import parse_yaml

logger = logging.getLogger("mmcontrast")
TABLE = "objective/"  # begins the names of an objective's tables, among the shards of a checkpoint
OF_CONFIG = ("lr", "peak_lr", "weight_decay", "betas", "eps")  # options of a group that a resumed run takes from its config


def state_of(done: int, job: RunContext, learner: Learner) -> Contents:
    """Return what a checkpoint saves after a number of steps; what is in shards stays in shards."""
    optimizer, shards = optimizer_state(learner.optimizer, job.model)
    objective, shares = objective_state(job.objective)
    scaler = learner.accelerator.scaler
    state = {
        "step": done,
        "optimizer": optimizer,
        "scaler": scaler.state_dict() if scaler else {},
        "objective": objective,
        "order": job.order.state(),
        "mined": job.mined,
        "threads": torch.get_num_threads(),
        "teachers": [teacher.identity for teacher in job.teachers],
    }
    weights = _state_without(job.model, job.model.of_start)
    averaged = _state_without(learner.averaged, job.model.of_start)
    queue = _state_without(learner.queue)
    return Contents(weights, averaged, state, job.config, shards | shares, job.model.start_digest, queue)


def _state_without(module: nn.Module | None, excluded: Container[str] = ()) -> dict[str, Tensor]:
    """Return a module's state but for some names; {} of None."""
    tensors = module.state_dict() if module else {}
    return {name: tensor for name, tensor in tensors.items() if name not in excluded}


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an optimizer's groups and state by the names of the weights, and the state in shards by "kind/name"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = [group | {"params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups]
    state: dict[str, dict[str, Any]] = {}
    shards: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        name = names[parameter]
        shards |= {f"{kind}/{name}": value for kind, value in values.items() if in_shards(value)}
        state[name] = {kind: value for kind, value in values.items() if not in_shards(value)}
    return {"kind": type(getattr(optimizer, "optimizer", optimizer)).__name__, "groups": groups, "state": state}, shards


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    saved: dict[str, Any],
    shards: Path,
    own: Container[str],
) -> None:
    """Load an optimizer's saved state.

    Args:
        saved: as `optimizer_state` returned it.
        shards: the folder of its state in shards, if there was any.
        own: options of its groups that stay those of the optimizer; others it may have counted itself.

    Raises:
        ValueError: if it was another optimizer, or other weights learn.
    """
    now, _ = optimizer_state(optimizer, model)
    if now["kind"] != saved["kind"]:
        raise ValueError(f"it was {saved['kind']}, and is {now['kind']}")
    names = [name for group in now["groups"] for name in group["params"]]
    saved_names = [name for group in saved["groups"] for name in group["params"]]
    if sorted(names) != sorted(saved_names):
        raise ValueError(f"{', '.join(sorted({*names} ^ {*saved_names})[:3])} learn in one of the two")
    parameters = dict(model.named_parameters())
    state = {name: dict(values) for name, values in saved["state"].items()}
    for key, tensor in read_shards(shards, parameters).items() if shards.exists() else ():
        kind, _, name = key.partition("/")
        state[name][kind] = tensor
    numbers = {name: number for number, name in enumerate(names)}
    groups = []
    for group in now["groups"]:  # some optimizers count their steps in them
        saved_group = next(candidate for candidate in saved["groups"] if group["params"][0] in candidate["params"])
        kept = {option: value for option, value in group.items() if option in own or option not in saved_group}
        groups.append(saved_group | kept | {"params": [numbers[name] for name in group["params"]]})
    placed = {
        numbers[name]: {
            kind: shard_like(value, parameters[name]) if isinstance(value, Tensor) and value.dim() else value
            for kind, value in values.items()
        }
        for name, values in state.items()
    }
    optimizer.load_state_dict({"state": placed, "param_groups": groups})


def objective_state(objective: Objective) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an objective's state, without the tables that ranks divide, and this rank's shares of those by name."""
    state, shares = objective.state_dict(), {}
    for name, table in tables_of(objective):
        if table.world_size > 1:
            content = state[f"{name}._extra_state"]
            for part in ("ids", "values"):
                shares[f"{TABLE}{name}/{table.rank}/{part}"] = content[part]
            state[f"{name}._extra_state"] = content | {part: content[part][:0] for part in ("ids", "values")}
    return state, shares


def tables_of(objective: Objective) -> Iterator[tuple[str, SampleTable]]:
    """Yield the tables by sample id of an objective, with their names."""
    return ((name, module) for name, module in objective.named_modules() if isinstance(module, SampleTable))


def load_objective(objective: Objective, state: dict[str, Any], shards: Path) -> None:
    """Load an objective's state, and of tables that ranks divided this rank's share, whatever the number of ranks then and now.

    Args:
        shards: the folder of their shares, if there were any.
    """
    objective.load_state_dict(state)
    if not shards.exists():
        return
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(shards)
    sizes = {key: value for key, value in reader.read_metadata().state_dict_metadata.items() if key.startswith(TABLE)}
    for name, table in tables_of(objective):
        for key in sorted(key for key in sizes if key.startswith(f"{TABLE}{name}/") and key.endswith("/ids")):
            keys = key, key.removesuffix("ids") + "values"
            share = {key: torch.empty(sizes[key].size, dtype=sizes[key].properties.dtype) for key in keys}  # type: ignore[union-attr]
            dcp.load(share, storage_reader=reader, no_dist=True)
            table.add(*share.values())


def read_shards(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the optimizer's state in shards by "kind/name", each rank its own part."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    tensors: dict[str, Tensor] = {}
    for key, metadata in reader.read_metadata().state_dict_metadata.items():
        if key.startswith(TABLE):
            continue
        assert isinstance(metadata, TensorStorageMetadata)
        parameter = parameters[key.partition("/")[2]].detach()
        same_shards = in_shards(parameter) and parameter.shape == metadata.size
        dtype = metadata.properties.dtype
        tensors[key] = torch.empty_like(parameter, dtype=dtype) if same_shards else torch.empty(metadata.size, dtype=dtype)
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def restore(path: Path, job: RunContext, learner: Learner, mining: Mining | None = None) -> int:
    """Load a checkpoint into a job and return the number of steps done.

    Args:
        mining: opens the last table that was mined before the checkpoint.

    Raises:
        UserError: if the checkpoint is damaged, or of another model or another order of the data; it says what differs.
    """
    group, device = learner.group, learner.accelerator.device
    checkpoint.check(path, group)
    state: dict[str, Any] = from_first(lambda: checkpoint.load_state(path), group, device)

    def load(module: nn.Module, file: Path) -> None:
        load_weights(module, read_parts(file, module.state_dict(), group, device), str(file))

    if mining and state.get("mined") is not None:
        mining.open(state["mined"])
    check_order(job, path, state["order"])
    if state["step"] > job.options.total_steps:
        epochs = job.options.epochs
        wanted = f"train.steps={job.options.steps}" if epochs is None else f"the {job.options.steps} of train.epochs={epochs:g}"
        raise UserError(f"{job.folder} already has {state['step']} steps, more than {wanted}")
    check_start(job.model, path)
    check_teachers(job, state.get("teachers", []))
    before, now = (parse_yaml(config) for config in ((path / checkpoint.CONFIG).read_text(encoding="utf-8"), job.config))
    for name, was, is_now in (
        ("model.lora", before.get("model", {}).get("lora"), now.get("model", {}).get("lora")),
        ("score", before.get("score"), now.get("score")),
    ):
        if was != is_now:
            raise UserError(
                f"cannot resume {job.folder} with {name}={is_now}: it was {was}; give it back, or start another run with"
                " train.init_from"
            )
    load(job.model, checkpoint.weights_file(path))
    try:
        own = {*OF_CONFIG, *options_of_optimizer(before), *options_of_optimizer(now)}
        load_optimizer(learner.optimizer, job.model, state["optimizer"], path / checkpoint.SHARDS, own)
    except (ValueError, KeyError) as error:
        raise UserError(f"cannot resume {job.folder}: another optimizer, or other weights learn ({error})") from error
    if learner.accelerator.scaler and state["scaler"]:
        learner.accelerator.scaler.load_state_dict(state["scaler"])
    try:
        load_objective(job.objective, state["objective"], path / checkpoint.SHARDS)
    except (RuntimeError, KeyError) as error:
        reason = f"{before['objective']} and {now['objective']} remember other things of earlier steps"
        raise UserError(
            f"cannot resume {job.folder} with another objective: {reason}; start another run with train.init_from"
        ) from error
    if learner.averaged:
        load(learner.averaged, checkpoint.weights_file(path, averaged=True))
    if learner.queue and (path / checkpoint.QUEUE).exists():
        load(learner.queue, path / checkpoint.QUEUE)
    elif learner.queue and state.get("queue"):  # in a checkpoint from before 2026-11-26
        load_weights(learner.queue, state["queue"], f"the queue in {path}")
    elif learner.queue:
        raise UserError(f"cannot resume {job.folder} with a queue: it had none; start another run with train.init_from")
    if learner.accelerator.is_main_process and (changes := changed_options(before, now)):
        logger.warning("resumed with other options: %s", "; ".join(changes))
    return state["step"]


def options_of_optimizer(config: Mapping[str, Any]) -> Iterable[str]:
    """Return the options that a config names for its optimizer itself."""
    optimizer = config["train"].get("optimizer")
    return optimizer.keys() - {"type"} if isinstance(optimizer, dict) else ()


def changed_options(before: Any, now: Any, name: str = "") -> list[str]:
    """Return the options that differ between two configs, "train.lr was 0.1, is 0.2"; not the run's name, place and length."""
    if before == now or name in ("run", "train.steps", "train.epochs"):
        return []
    if isinstance(before, dict) and isinstance(now, dict) and before.get("type") == now.get("type"):
        keys = [*before, *(key for key in now if key not in before)]
        changes = (changed_options(before.get(key), now.get(key), f"{name}.{key}" if name else key) for key in keys)
        return [change for each in changes for change in each]
    was, is_now = (yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0][:80] for value in (before, now))
    return [f"{name} was {was}, is {is_now}"]


def check_order(job: RunContext, path: Path, saved: Mapping[str, Any]) -> None:
    """Check that a job's data have the order that a checkpoint's data had.

    Raises:
        UserError: if they do not; it names the first difference, and the options that may have made it.
    """
    order = job.order.state()
    for name in sorted(saved.keys() | order.keys()):
        before, after = str(saved.get(name)), str(order.get(name))
        if before != after:
            data, data_before = parse_yaml(job.config)["data"], saved_data(path)
            changes = [
                f"data.{option} was {data_before.get(option)}, is {data.get(option)}"
                for option in ("held_out", "select")
                if data.get(option) != data_before.get(option)
            ]
            why = f" ({'; '.join(changes)})" if changes else ""
            raise UserError(
                f"cannot resume {job.folder}: its data order had {name}={before[:200]}, now {after[:200]}{why};"
                " give it back, or start another run with train.init_from"
            )


def saved_data(path: Path) -> Any:
    """Return the `data` of a checkpoint's config."""
    return parse_yaml((path / checkpoint.CONFIG).read_text(encoding="utf-8"))["data"]


def check_start(model: ContrastiveModel, path: Path) -> None:
    """Check that a checkpoint's weights were trained beside the model's start.

    Raises:
        UserError: if it was another start.
    """
    if (trained := checkpoint.start_of(path)) != model.start_digest:
        why = "model.start is not what it was" if trained and model.start_digest else "it was trained with another model.lora"
        raise UserError(f"{path}: {why}: its weights do not belong to these: give back the start, and its name in config.yaml")


def check_teachers(job: RunContext, saved: list[dict[str, str]]) -> None:
    """Check that a job's teachers are those of a checkpoint: from another path perhaps, but with the same weights.

    Raises:
        UserError: if they are not.
    """
    now = [teacher.identity for teacher in job.teachers]
    if [teacher["digest"] for teacher in now] != [teacher["digest"] for teacher in saved]:
        raise UserError(
            f"cannot resume {job.folder}: its teacher was {_names(saved)}, is {_names(now)}: give train.teacher what it had, or"
            " start another run with train.init_from"
        )


def _names(teachers: list[dict[str, str]]) -> str:
    """Return the names of teachers, with the beginning of their digests, for a message."""
    return ", ".join(f"{teacher['name']} ({teacher['digest'][:8]})" for teacher in teachers) or "none"


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a model's weights, all but those that it has from a start.

    Raises:
        UserError: if names or shapes differ; it names the first.
    """
    of_start: frozenset[str] = getattr(model, "of_start", frozenset())
    tensors = _state_without(model, of_start)
    for name in sorted(tensors.keys() ^ weights.keys()):
        raise UserError(
            f"{source}: {name} is {'missing in it' if name in tensors else 'not in the model'}: another architecture"
        )
    for name, tensor in tensors.items():
        if tensor.shape != weights[name].shape:
            raise UserError(f"{source}: {name} is {list(weights[name].shape)}, the model's {list(tensor.shape)}")
    model.load_state_dict(shard_all_like(weights, tensors), strict=not of_start)


def weights_path(source: str, group: dist.ProcessGroup | None = None) -> Path:
    """Return the path of weights: a .safetensors file, a checkpoint's folder, or the last checkpoint of a run's folder.

    Args:
        group: its ranks share the check of the checkpoint's files; all must call this.

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
