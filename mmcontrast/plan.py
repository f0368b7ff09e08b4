"""`mmcontrast plan`: does a batch fit on a device, and what does a sample cost? Computed without weights, data or a GPU."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from mmcontrast.components import suggestion
from mmcontrast.config import RunConfig
from mmcontrast.errors import UserError
from mmcontrast.models import ContrastiveModel, TransformersTower
from mmcontrast.options import Component
from mmcontrast.runs import check_components, completed, contrasted_fields, model_of, open_start, scored_fields
from mmcontrast.scaling import Cluster, StepTime, Work, step_time
from mmcontrast.score.traffic import Scheme, gathered_bytes
from mmcontrast.training.cost import Bytes, Flops, count_bytes, count_flops, fakes, make_values
from mmcontrast.training.optim import freeze, make_optimizer
from mmcontrast.training.options import TeacherOptions, TrainOptions
from mmcontrast.training.parallel import check_placement, recompute_blocks
from mmcontrast.training.progressive import apply_schedules

GIB = 2**30
DEFAULT_MEMORY = 80 * GIB
RESERVED, RESERVED_SHARE = GIB, 0.05  # assumed: CUDA's context and libraries; what the allocator cannot use
WAITING = 4  # GiB of a batch's inputs for one device, from which on their place in the host's memory is a question
LOSS_TILES = 48 * 2**20  # measured beside the gradients of a loss in docs/score_statistics.md
SMALLEST, PROBES = 2, (8, 16)  # batch norms refuse one sample


@dataclass(frozen=True)
class TowerPlan:
    """A tower with its projection.

    Attributes:
        flops: of its forward, a sample, for all of its fields.
        saved: bytes that it keeps for the backward, of the samples that are on the device at a time.
    """

    parameters: int
    learning: int
    flops: float
    saved: int


@dataclass(frozen=True)
class Plan:
    """What a config takes of each device.

    Attributes:
        per_device: samples of a step on one device. at_a_time: of them, those whose activations exist at once.
        flops_per_sample: of forward and backward; of recomputation nothing.
        memory: bytes by what they are for. available: of one device.
        largest: the largest power of two for train.micro_batch_size that fits, or None where none does.
        largest_batch: the largest batch of all devices that fits with gradient caching, or None where none does.
        time: of a step, predicted. assumed: what it is made of that is neither counted nor measured here.
        notes: what was assumed, or is not counted. remedies: options of training that are left to take less memory.
    """

    name: str
    devices: int
    batch_size: int
    per_device: int
    at_a_time: int
    cached: bool
    parameters: int
    learning: int
    flops_per_sample: float
    towers: dict[str, TowerPlan]
    memory: dict[str, int]
    available: int
    largest: int | None
    largest_batch: int | None
    time: StepTime
    assumed: list[str]
    notes: list[str]
    remedies: list[str]

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def verdict(self) -> str:
        if self.fits:
            return f"fits with {(self.available - self.total) / GIB:.1f} GiB to spare"
        over = f"does not fit: {(self.total - self.available) / GIB:.1f} GiB too much"
        if self.largest:
            return f"{over}; train.micro_batch_size={self.largest} fits (the same loss, a second forward)"
        remedies = [f"set {remedy}" for remedy in self.remedies]
        return f"{over}, with any train.micro_batch_size: {' or '.join([*remedies, 'take a smaller model or larger devices'])}"

    def to_json(self) -> dict[str, Any]:
        time = dataclasses.asdict(self.time) | {"total": self.time.total, "dominant": self.time.dominant}
        own = {"total": self.total, "fits": self.fits, "verdict": self.verdict, "time": time}
        return dataclasses.asdict(self) | own


def plan_run(config: RunConfig, devices: int = 1, available: int | None = None, cluster: Cluster | None = None) -> Plan:
    """
    Args:
        devices: over which the batch is spread, each with all of the weights.
        available: bytes of one; default: the GPU's at hand, else 80 GiB.
        cluster: the nodes that have them, and how they are linked; default: one node.

    Raises:
        UserError: for a mistake in the config, or a batch that so many devices cannot share.
    """
    options = config.train
    if options.batch_size % devices or options.batch_size // devices % options.accumulation_steps:
        raise UserError(
            f"train.batch_size={options.batch_size} cannot be cut into equal parts for {devices} devices and"
            f" train.accumulation_steps={options.accumulation_steps}"
        )
    available, cluster = available or device_memory(), cluster or Cluster()
    if devices % cluster.nodes:
        raise UserError(f"{devices} devices cannot be spread evenly over {cluster.nodes} nodes: change --devices or --nodes")
    shape = cluster.nodes, devices // cluster.nodes
    per_device = options.batch_size // devices
    part = per_device // options.accumulation_steps
    at_a_time = min(part, options.micro_batch_size or part)
    bare = without_downloads(config)
    if not bare.model.starts:
        check_components(bare)  # before anything large is made
    with fakes():
        model = model_of(bare, tokenizers=False, weights=False)
        for tower in model.towers.values():
            if isinstance(tower, TransformersTower):
                tower.length_chunks = 1  # the lengths of made texts say nothing
        config = completed(config, model)
        objective, pairing = check_components(completed(bare, model))
        check_placement(model, options)
        for field in options.resolution.keys() - model.modalities.keys():
            raise UserError(f"train.resolution: no field {field!r}; {suggestion(field, model.modalities)}")
        freeze(model, options.freeze)
        apply_schedules(model, largest_inputs(options), 0)
        model.train()
        flops = flops_of(model)
        recompute_blocks(model, options.recompute)
        step = bytes_of(model, at_a_time, options, several=at_a_time < per_device)
        state, notes = optimizer_state(model, options)
        terms = [term for term, weight in pairing.weighted_terms(list(contrasted_fields(config))).items() if weight]
        work = Work(
            samples=per_device, at_a_time=at_a_time, cuts=options.accumulation_steps, forward=sum(flops.forward.values()),
            backward=flops.backward, again=int(bool(options.micro_batch_size)), width=model.embed_dim,
            recomputed=sum(flops.forward[f] for f, tower in model.tower_of.items() if tower in options.recompute),
            terms=len(terms), reductions=len(objective.reductions), both=objective.both_directions,
            gradients=size(p for p in model.parameters() if p.requires_grad),
            weights=size(model.parameters()) if options.parallel == "fsdp" else 0, refetched=options.reshard_after_forward,
        )  # fmt: skip
        chosen: Scheme | None = None if options.communication == "auto" else options.communication
        time = step_time(work, *shape, cluster.machine(options.precision), cluster.towers_rate(options.precision), chosen)
        fixed = resident(model, options, devices, state)
        loss = loss_memory(model, part, shape, time.scheme, max(len(term) for term in terms))
        fixed |= {"embeddings and loss": loss}
        taught, teachers = teaching(options, scored_fields(config, pairing))
        if teachers:
            fixed |= {"teachers' weights": teachers}
            notes.append(
                f"of the FLOPs, {taught / 1e9:.1f} G a sample are the teachers' forward; their activations, which nothing"
                " keeps, are not counted"
            )
        memory = with_step(fixed, model, at_a_time, step)
        a_sample_of_inputs = memory["inputs"] / at_a_time
        largest = None
        if sum(memory.values()) > available:
            largest = largest_that_fits(model, options, part, fixed, available)
        largest_batch = None
        if micro := at_a_time if sum(memory.values()) <= available else largest:
            peak = step.peak if micro == at_a_time else bytes_of(model, micro, options, several=True).peak
            peak += work.gradients * (at_a_time == per_device)  # which are there from the first micro-batch on
            beside = with_step(fixed | {"embeddings and loss": LOSS_TILES}, model, micro, Bytes(step.saved, peak))
            a_sample = (loss - LOSS_TILES) / part * (1 + RESERVED_SHARE)
            rows = int((available - sum(beside.values())) / a_sample) // micro * micro
            largest_batch = devices * options.accumulation_steps * rows
    if getattr(objective, "stateful", False):
        notes.append("what the objective remembers of every sample is not counted")
    for field, number in Counter(given.field for given in config.data.mined.values()).items():
        notes.append(f"data.negatives: {number} more {field} a sample are neither in the FLOPs nor in the memory")
    waiting = per_device * a_sample_of_inputs / GIB if at_a_time < per_device else 0.0
    if waiting >= WAITING:
        notes.append(f"{waiting:.2f} GiB of inputs a device wait in the host's memory, beside what the loader's workers hold")
    if options.parallel == "fsdp" and devices > 1:
        notes.append("gradients and activations are those of a device that has all weights: more than fsdp takes")
    remedies = [] if options.recompute else [f"train.recompute=[{', '.join(model.towers)}]"]
    remedies += ["train.parallel=fsdp"] if devices > 1 and options.parallel == "ddp" else []
    return Plan(
        name=config.run.name,
        devices=devices,
        batch_size=options.batch_size,
        per_device=per_device,
        at_a_time=at_a_time,
        cached=bool(options.micro_batch_size),
        parameters=count(model.parameters()),
        learning=count(p for p in model.parameters() if p.requires_grad),
        flops_per_sample=flops.total + taught,
        towers={name: plan_tower(model, name, flops, step) for name in model.towers},
        memory=memory,
        available=available,
        largest=largest,
        largest_batch=largest_batch or None,
        time=time,
        assumed=assumptions(cluster, options, devices),
        notes=notes,
        remedies=remedies,
    )


def largest_inputs(options: TrainOptions) -> TrainOptions:
    """With the largest pictures and the most patches that any step sees."""
    resolution = {field: {0: max(sides.values())} for field, sides in options.resolution.items()}
    dropped = {tower: {0: min(shares.values())} for tower, shares in options.patch_dropout.items()}
    return options.model_copy(update={"resolution": resolution, "patch_dropout": dropped})


def device_memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else DEFAULT_MEMORY


def without_downloads(config: RunConfig) -> RunConfig:
    """The same architecture with random weights, and texts whose tokenizer does not matter."""
    fields = {}
    for name, field in config.fields.items():
        modality = field.modality
        if isinstance(modality, dict) and modality.get("type") == "text":
            modality = {option: value for option, value in modality.items() if option != "tokenizer"}
        fields[name] = field.model_copy(update={"modality": modality})
    return config.model_copy(update={"fields": fields, "towers": {n: _random(tower) for n, tower in config.towers.items()}})


def _random(tower: Component) -> Component:
    if isinstance(tower, str):
        return tower
    return {option: value for option, value in tower.items() if option != "pretrained"}


class CannotBePlanned(UserError):
    """The model computes what shapes alone do not say, so nothing of it can be counted."""


def flops_of(model: ContrastiveModel) -> Flops:
    """
    Raises:
        CannotBePlanned: if what is in a batch decides how the model computes.
    """
    try:
        return count_flops(model, make_values(model, SMALLEST))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise CannotBePlanned(f"this model cannot be planned: {' '.join(str(error).split())[:200]}") from error


def bytes_of(model: ContrastiveModel, samples: int, options: TrainOptions, several: bool) -> Bytes:
    """Of one part of a step; `several`: others have left their gradients before it."""
    model.zero_grad()
    if several:
        count_bytes(model, make_values(model, SMALLEST), options.precision)
    return count_bytes(model, make_values(model, samples), options.precision)


def optimizer_state(model: nn.Module, options: TrainOptions) -> tuple[int, list[str]]:
    """Bytes, after a step with the gradients at hand; and what had to be assumed."""
    optimizer = make_optimizer(model, options)  # type: ignore[arg-type]
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        assumed = 2 * size(p for p in model.parameters() if p.requires_grad)
        why = str(error).splitlines()[0][:80]
        return assumed, [f"train.optimizer: its state is assumed to be AdamW's, two fp32 numbers a weight ({why})"]
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return size(tensors), []


def teaching(options: TrainOptions, scored: Sequence[str]) -> tuple[float, int]:
    """Return the FLOPs of a sample in all teachers, and the bytes of their weights; 0 of embeddings that are stored."""
    flops, weights = 0.0, 0
    for given in options.teachers:
        if isinstance(given, TeacherOptions):
            teacher = open_start(given.start, weights=False)
            forward = flops_of(teacher).forward
            flops += sum(forward.get(given.fields.get(field, field), 0.0) for field in scored)
            weights += size([*teacher.parameters(), *teacher.buffers()])
    return flops, weights


def resident(model: ContrastiveModel, options: TrainOptions, devices: int, state: int) -> dict[str, int]:
    """What is there from the first step to the last. fsdp cuts it over the devices, and fetches one block and the next, with
    what is in no block (reshard_after_forward: false: all)."""
    sharded = options.parallel == "fsdp" and devices > 1
    weights = size([*model.parameters(), *model.buffers()])
    share = math.ceil(weights / devices) if sharded else weights
    memory = {"weights": share, "optimizer state": math.ceil(state / devices) if sharded else state}
    if sharded:
        blocks = [size(block.parameters()) for tower in map(model.tower, model.towers) for block in tower.blocks().values()]
        at_once = sorted(blocks)[-2:] if options.reshard_after_forward else blocks
        memory["weights that are fetched"] = weights - sum(blocks) + sum(at_once)
    elif devices > 1:  # DistributedDataParallel's, beside the gradients
        memory["buckets for the gradients' reduction"] = size(p for p in model.parameters() if p.requires_grad)
    if options.ema_decay:
        memory["averaged weights"] = share
    if options.queue_size:
        rows = options.queue_size * len(model.modalities) * (4 * model.embed_dim + 8)
        memory["queue and its encoder"] = share + rows
    return memory


def loss_memory(model: ContrastiveModel, samples: int, shape: tuple[int, int], scheme: Scheme, fields: int) -> int:
    """The embeddings with their gradients, and what the loss needs beside: the two gradients of a term, the columns that come
    from other devices (`gathered_bytes`), and one tile; of hyperbolic scores the points of a term, as made and as
    multiplied, with gradients. All O(N·D)."""
    rows = 4 * model.embed_dim * samples
    points = 0 if model.hyperbolic is None else 3 * fields
    others = gathered_bytes(scheme, *shape, samples, model.embed_dim) if math.prod(shape) > 1 else 0
    return rows * (2 * len(model.modalities) + fields + points) + others + LOSS_TILES


def with_step(fixed: dict[str, int], model: ContrastiveModel, samples: int, step: Bytes) -> dict[str, int]:
    """All rows of the table."""
    values = size(make_values(model, samples).values())
    memory = fixed | {"gradients and activations, at their peak": step.peak, "inputs": values}
    return memory | {"reserved (assumed)": round(RESERVED + RESERVED_SHARE * sum(memory.values()))}


def largest_that_fits(
    model: ContrastiveModel, options: TrainOptions, part: int, fixed: dict[str, int], available: int
) -> int | None:
    """Bytes grow linearly with the samples: the line through two probes says where to look, measuring there decides."""

    def total(samples: int) -> int:
        return sum(with_step(fixed, model, samples, bytes_of(model, samples, options, several=True)).values())

    if total(SMALLEST) > available:
        return None
    low, high = (total(samples) for samples in PROBES)
    slope = max(1.0, (high - low) / (PROBES[1] - PROBES[0]))
    guess = min(part, max(SMALLEST, int(PROBES[0] + (available - low) / slope)))
    samples = 2 ** math.floor(math.log2(guess))
    while samples > SMALLEST and total(samples) > available:
        samples //= 2
    return samples


def plan_tower(model: ContrastiveModel, name: str, flops: Flops, step: Bytes) -> TowerPlan:
    fields = [field for field, tower in model.tower_of.items() if tower == name]
    parameters = [*model.towers[name].parameters(), *model.projections[name].parameters()]
    return TowerPlan(
        parameters=count(parameters),
        learning=count(p for p in parameters if p.requires_grad),
        flops=sum(flops.forward[field] for field in fields),
        saved=sum(step.saved[field] for field in fields),
    )


def assumptions(cluster: Cluster, options: TrainOptions, devices: int) -> list[str]:
    """Say what the time of a step is made of that nobody has measured."""
    rate, products = cluster.towers_rate(options.precision), cluster.machine(options.precision).products
    said = [
        f"{cluster.device}: towers reach {rate / 1e12:.0f} TFLOP/s (bf16 peak: {cluster.peak / 1e12:.0f}; --mfu), the loss"
        f" {products / 1e12:.0f}; the optimizer's update, and waiting for data, take no time"
    ]
    if devices > 1:
        links = {"within a node": cluster.within} | ({"between nodes": cluster.link} if cluster.nodes > 1 else {})
        said += [
            f"{where} {link.bandwidth / 1e9:.4g} GB/s a device and direction, {link.latency * 1e6:.3g} µs"
            for where, link in links.items()
        ]
        said.append(
            "a ring's messages and the gradients' reduction hide behind what is computed meanwhile; a call takes 10 µs to"
            " start, the kernels of a block of columns 1 ms of the host's time"
        )
    return said


def count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def size(tensors: Iterable[Tensor] | Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def plan_table(plan: Plan) -> Group:
    """To print."""
    towers = Table("tower, with its projection", title=f"{plan.name}: computed, not measured", title_justify="left")
    for heading in ("parameters", "of which learn", "GFLOPs a sample, forward", f"kept for the backward of {plan.at_a_time}"):
        towers.add_column(heading, justify="right")
    for name, tower in plan.towers.items():
        figures = f"{tower.parameters / 1e6:.2f} M", f"{tower.learning / 1e6:.2f} M", f"{tower.flops / 1e9:.2f}"
        towers.add_row(name, *figures, f"{tower.saved / GIB:.2f} GiB")
    whole = f"{plan.parameters / 1e6:.2f} M", f"{plan.learning / 1e6:.2f} M"
    forward, saved = sum(t.flops for t in plan.towers.values()), sum(t.saved for t in plan.towers.values())
    towers.add_row("all", *whole, f"{forward / 1e9:.2f}", f"{saved / GIB:.2f} GiB", style="bold")

    at_a_time = f", {plan.at_a_time} at a time" if plan.at_a_time < plan.per_device else ""
    memory = Table(f"each of {plan.devices} devices, {plan.per_device} samples{at_a_time}", "GiB")
    memory.columns[1].justify = "right"
    for name, bytes in plan.memory.items():
        memory.add_row(name, f"{bytes / GIB:.2f}")
    memory.add_row("all", f"{plan.total / GIB:.2f}", style="bold")
    again = " (gradient caching adds a forward)" if plan.cached else ""
    flops = f"forward and backward: {plan.flops_per_sample / 1e9:.1f} GFLOPs a sample{again}"
    notes = [f"note: {note}" for note in plan.notes]
    lines = [flops, *notes, f"{plan.available / GIB:.3g} GiB a device: {plan.verdict}"]
    return Group(towers, memory, *(Text(line) for line in lines), *time_tables(plan))


def time_tables(plan: Plan) -> Iterator[Table | Text]:
    """Yield the time of a step by parts, the loss's communication by scheme, and what is assumed."""
    time = plan.time
    parts = Table("a step, predicted", "seconds", "share")
    for column in parts.columns[1:]:
        column.justify = "right"
    for name, seconds in time.parts.items():
        parts.add_row(name, f"{seconds:.3g}", f"{seconds / time.total:.0%}")
    parts.add_row("all", f"{time.total:.3g}", "", style="bold")
    yield parts
    if plan.devices > 1:
        schemes = Table("communication of the loss", title="a device's, in a step", title_justify="left")
        for heading in ("calls", "GiB sent", "ms alone", "ms that it adds", "GiB of others' columns"):
            schemes.add_column(heading, justify="right")
        for name, one in time.schemes.items():
            figures = f"{one.calls:,}", f"{one.sent / GIB:.2f}", f"{one.alone * 1e3:.3g}", f"{one.waits * 1e3:.3g}"
            style = "bold" if name == time.scheme else ""
            schemes.add_row(name, *figures, f"{one.memory / GIB:.2f}", style=style)
        yield schemes
        if time.schemes[time.scheme].waits > 1.1 * time.schemes[time.fastest].waits + 1e-3:
            yield Text(f"with these links train.communication={time.fastest} is the fastest")
    yield Text(f"{plan.batch_size / time.total:,.0f} samples a second; most of it is {time.dominant}")
    if plan.largest_batch:
        yield Text(f"largest batch that fits so many devices, with gradient caching: {plan.largest_batch:,}")
    for assumption in plan.assumed:
        yield Text(f"assumed: {assumption}")
