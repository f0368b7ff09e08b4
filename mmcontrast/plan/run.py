"""Plan a run from its config: build the model without weights, count its FLOPs, and measure the memory of a step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmcontrast.components import suggestion
from mmcontrast.config import RunConfig
from mmcontrast.errors import UserError
from mmcontrast.models import ContrastiveModel, TransformersTower
from mmcontrast.objectives import Objective, Pairing
from mmcontrast.plan.memory import (
    LOSS,
    count,
    device_memory,
    flops_of,
    largest_batch_that_fits,
    largest_that_fits,
    loss_memory,
    optimizer_state,
    part_memory,
    resident_memory,
    size,
    step_memory,
)
from mmcontrast.plan.result import GIB, Plan, TowerPlan
from mmcontrast.run_checks import check_components, check_components_ahead, contrasted_fields, scored_fields
from mmcontrast.runs import completed, model_of, open_start, without_pretrained
from mmcontrast.scaling import Cluster, Work, step_time
from mmcontrast.score.traffic import Scheme
from mmcontrast.training.cost import Bytes, Flops, fakes
from mmcontrast.training.optim import freeze
from mmcontrast.training.options import TeacherOptions, TrainOptions
from mmcontrast.training.parallel import check_placement, recompute_blocks
from mmcontrast.training.progressive import apply_schedules

WAITING = 4  # GiB of a batch's inputs for one device from which on the plan notes their place in the host's memory


@dataclass(frozen=True)
class BatchShares:
    """The shares of a batch.

    Attributes:
        nodes, devices: of all, over which the batch is spread.
        per_device: samples of a step on one device. per_loss: of them, those of one accumulation step.
        at_a_time: of them, those whose activations exist at once.
    """

    nodes: int
    devices: int
    per_device: int
    per_loss: int
    at_a_time: int

    @classmethod
    def of(cls, options: TrainOptions, devices: int, nodes: int) -> "BatchShares":
        """Divide a batch.

        Raises:
            UserError: if it cannot be divided equally.
        """
        if options.batch_size % devices or options.batch_size // devices % options.accumulation_steps:
            raise UserError(
                f"train.batch_size={options.batch_size} cannot be cut into equal parts for {devices} devices and"
                f" train.accumulation_steps={options.accumulation_steps}"
            )
        if devices % nodes:
            raise UserError(f"{devices} devices cannot be spread evenly over {nodes} nodes: change --devices or --nodes")
        per_device = options.batch_size // devices
        per_loss = per_device // options.accumulation_steps
        return cls(nodes, devices, per_device, per_loss, min(per_loss, options.micro_batch_size or per_loss))

    @property
    def shape(self) -> tuple[int, int]:
        """Return (nodes, devices of a node)."""
        return self.nodes, self.devices // self.nodes

    @property
    def cached(self) -> bool:
        """Return whether gradients are cached: a loss has several parts."""
        return self.at_a_time < self.per_loss

    @property
    def in_parts(self) -> bool:
        """Return whether a step computes its activations in several parts, whose gradients add up."""
        return self.at_a_time < self.per_device


def plan_run(config: RunConfig, devices: int = 1, available: int | None = None, cluster: Cluster | None = None) -> Plan:
    """Plan a run: its model, its memory on each device and the time of a step.

    Args:
        devices: over which the batch is spread, each with all of the weights.
        available: bytes of one device; default: of the GPU at hand, else 80 GiB.
        cluster: the nodes of the devices, and their links; default: one node.

    Raises:
        UserError: for a mistake in the config, or a batch that cannot be divided over the devices.
    """
    options, cluster = config.train, cluster or Cluster()
    shares = BatchShares.of(options, devices, cluster.nodes)
    available = available or device_memory()
    with fakes():
        model, config, objective, pairing = build_model(config)
        flops = flops_of(model)
        recompute_blocks(model, options.recompute)
        step = part_memory(model, shares.at_a_time, options, several=shares.in_parts)
        optimizer_bytes, notes = optimizer_state(model, options)
        terms = [term for term, weight in pairing.weighted_terms(list(contrasted_fields(config))).items() if weight]
        work = step_work(model, options, shares, flops, objective, len(terms))
        scheme: Scheme | None = None if options.communication == "auto" else options.communication
        rate, machine = cluster.towers_rate(options.precision), cluster.machine(options.precision)
        time = step_time(work, *shares.shape, machine, rate, scheme)
        teacher_flops, teacher_bytes = teachers_cost(options, scored_fields(config, pairing))
        fixed = resident_memory(model, options, devices, optimizer_bytes)
        fixed[LOSS] = loss_memory(model, shares.per_loss, shares.shape, time.scheme, max(len(term) for term in terms))
        if teacher_bytes:
            fixed["teachers' weights"] = teacher_bytes
        memory = step_memory(fixed, model, shares.at_a_time, step)
        fits = sum(memory.values()) <= available
        largest = None if fits else largest_that_fits(model, options, shares.per_loss, fixed, available)
        largest_batch = None
        if micro_batch := shares.at_a_time if fits else largest:
            if micro_batch != shares.at_a_time:
                micro_step = part_memory(model, micro_batch, options, several=True)
            else:  # as one of several it finds the gradients of those before it
                micro_step = Bytes(step.saved, step.peak + (0 if shares.in_parts else work.gradients))
            rows = largest_batch_that_fits(model, micro_batch, micro_step, fixed, shares.per_loss, available)
            largest_batch = devices * options.accumulation_steps * rows
    notes += plan_notes(config, shares, objective, teacher_flops, bool(teacher_bytes), memory["inputs"])
    remedies = [] if options.recompute else [f"train.recompute=[{', '.join(model.towers)}]"]
    remedies += ["train.parallel=fsdp"] if devices > 1 and options.parallel == "ddp" else []
    return Plan(
        name=config.run.name,
        devices=devices,
        batch_size=options.batch_size,
        per_device=shares.per_device,
        at_a_time=shares.at_a_time,
        cached=shares.cached,
        parameters=count(model.parameters()),
        learning=count(p for p in model.parameters() if p.requires_grad),
        flops_per_sample=flops.total + teacher_flops,
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


def build_model(config: RunConfig) -> tuple[ContrastiveModel, RunConfig, Objective, Pairing]:
    """Build the model of a config without weights, as a step with the largest inputs trains it, with its objective and pairing.

    Returns:
        (model, config as `completed` by it, objective, pairing).

    Raises:
        UserError: for a mistake in the config.
    """
    options, bare = config.train, without_downloads(config)
    check_components_ahead(bare)  # before anything large is built
    model = model_of(bare, tokenizers=False, weights=False)
    for tower in model.towers.values():
        if isinstance(tower, TransformersTower):
            tower.length_chunks = 1  # the lengths of generated texts mean nothing
    config = completed(config, model)
    objective, pairing = check_components(completed(bare, model))
    check_placement(model, options)
    for field in options.resolution.keys() - model.modalities.keys():
        raise UserError(f"train.resolution: no field {field!r}; {suggestion(field, model.modalities)}")
    freeze(model, options.freeze)
    apply_schedules(model, largest_inputs(options), 0)
    return model.train(), config, objective, pairing


def step_work(
    model: ContrastiveModel, options: TrainOptions, shares: BatchShares, flops: Flops, objective: Objective, num_terms: int
) -> Work:
    """Return the work of a step on each device, from which its time is predicted."""
    recomputed = sum(flops.forward[field] for field, tower in model.tower_of.items() if tower in options.recompute)
    return Work(
        samples=shares.per_device,
        at_a_time=shares.at_a_time,
        forward=sum(flops.forward.values()),
        backward=flops.backward,
        width=model.embed_dim,
        gradients=size(p for p in model.parameters() if p.requires_grad),
        cuts=options.accumulation_steps,
        again=int(shares.cached),
        locked=sum(flops.forward[field] for field, tower in model.tower_of.items() if model.is_locked(tower)),
        recomputed=recomputed,
        terms=num_terms,
        reductions=len(objective.reductions),
        both=objective.both_directions,
        weights=size(model.parameters()) if options.parallel == "fsdp" else 0,
        refetched=options.reshard_after_forward,
        shard_ranks=options.shard_ranks or 0,
        reduced_once=options.reduce_gradients == "step",
    )


def largest_inputs(options: TrainOptions) -> TrainOptions:
    """Return options with the largest pictures and the most patches of any step."""
    resolution = {field: {0: max(sides.values())} for field, sides in options.resolution.items()}
    dropped = {tower: {0: min(shares.values())} for tower, shares in options.patch_dropout.items()}
    return options.model_copy(update={"resolution": resolution, "patch_dropout": dropped})


def without_downloads(config: RunConfig) -> RunConfig:
    """Return a config of the same architecture with random weights, and with texts that need no tokenizer."""
    fields = {}
    for name, field in config.fields.items():
        modality = field.modality
        if isinstance(modality, dict) and modality.get("type") == "text":
            modality = {option: value for option, value in modality.items() if option != "tokenizer"}
        fields[name] = field.model_copy(update={"modality": modality})
    return without_pretrained(config).model_copy(update={"fields": fields})


def teachers_cost(options: TrainOptions, scored: Sequence[str]) -> tuple[float, int]:
    """Return the FLOPs of a sample in all teachers, and the bytes of their weights; 0 for stored embeddings."""
    flops, weights = 0.0, 0
    for teacher_options in options.teachers:
        if isinstance(teacher_options, TeacherOptions):
            teacher = open_start(teacher_options.start, weights=False)
            forward = flops_of(teacher).forward
            flops += sum(forward.get(teacher_options.fields.get(field, field), 0.0) for field in scored)
            weights += size([*teacher.parameters(), *teacher.buffers()])
    return flops, weights


def plan_notes(
    config: RunConfig, shares: BatchShares, objective: Objective, teacher_flops: float, has_teachers: bool, input_bytes: int
) -> list[str]:
    """Return what the plan's numbers leave out; `input_bytes`: of the samples that are on a device at a time."""
    options, notes = config.train, []
    if has_teachers:
        notes.append(
            f"of the FLOPs, {teacher_flops / 1e9:.1f} G a sample are the teachers' forward; their activations, which nothing"
            " keeps, are not counted"
        )
    if getattr(objective, "stateful", False):
        notes.append("what the objective remembers of every sample is not counted")
    for field, number in Counter(negatives.field for negatives in config.data.mined.values()).items():
        notes.append(f"data.negatives: {number} more {field} a sample are neither in the FLOPs nor in the memory")
    waiting = shares.per_device * (input_bytes / shares.at_a_time) / GIB if shares.in_parts else 0.0
    if waiting >= WAITING:
        notes.append(f"{waiting:.2f} GiB of inputs a device wait in the host's memory, beside what the loader's workers hold")
    if options.parallel == "fsdp" and shares.devices > 1:
        notes.append("gradients and activations are those of a device that has all weights: more than fsdp takes")
    return notes


def plan_tower(model: ContrastiveModel, name: str, flops: Flops, step: Bytes) -> TowerPlan:
    """Return the plan of one tower with its projection."""
    fields = [field for field, tower in model.tower_of.items() if tower == name]
    parameters = [*model.towers[name].parameters(), *model.projections[name].parameters()]
    return TowerPlan(
        parameters=count(parameters),
        learning=count(p for p in parameters if p.requires_grad),
        flops=sum(flops.forward[field] for field in fields),
        saved=sum(step.saved[field] for field in fields),
    )


def assumptions(cluster: Cluster, options: TrainOptions, devices: int) -> list[str]:
    """Return the assumptions behind the time of a step that nobody has measured."""
    rate, products = cluster.towers_rate(options.precision), cluster.machine(options.precision).products
    lines = [
        f"{cluster.device}: towers reach {rate / 1e12:.0f} TFLOP/s (bf16 peak: {cluster.peak / 1e12:.0f}; --mfu), the loss"
        f" {products / 1e12:.0f}; the optimizer's update, and waiting for data, take no time"
    ]
    if devices > 1:
        links = {"within a node": cluster.within} | ({"between nodes": cluster.link} if cluster.nodes > 1 else {})
        lines += [
            f"{scope} {link.bandwidth / 1e9:.4g} GB/s a device and direction, {link.latency * 1e6:.3g} µs"
            for scope, link in links.items()
        ]
        lines.append(
            "a ring's messages and the gradients' reduction hide behind what is computed meanwhile; a call takes 10 µs to"
            " start, the kernels of a block of columns 1 ms of the host's time"
        )
    return lines
