"""Predict the time of a training step on many devices, by parts: from operations, bytes, and the rates of devices and links.

docs/scale.md gives the source of each number, and the errors of the prediction where it could be checked.
"""

import math
from dataclasses import dataclass, replace

import torch

from mmcontrast.errors import UserError
from mmcontrast.score.traffic import (
    GATHERED,
    MACHINES,
    SCHEMES,
    Calls,
    Link,
    Machine,
    Scheme,
    blocks_of,
    cheapest,
    gathered_bytes,
    loss_calls,
    passes,
    products_seconds,
    waiting_seconds,
    with_links,
)
from mmcontrast.training.cost import peak_flops

DEFAULT_GPU = "NVIDIA H100 80GB HBM3"
INFINIBAND = Link(5e-6, 50e9)  # assumed: a port of 400 Gb/s for each device
NVLINK = Link(2e-6, 450e9)  # assumed: of an H100; A100: 300, A800: 200
LOSS_SHARE = 0.42  # measured: of the dense peak, infonce at N = 65,536, D = 512 on an H200: docs/scale.md
TF32, FP32 = 1 / 2, 1 / 16  # of the dense bf16 peak, by data sheets of A100 and H100


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices.

    Attributes:
        link, within: of a device to other nodes, and to the others of its node, one direction.
        gpu: a name of `peak_flops`; None: the local one if its peak is known, else an H100.
        mfu: share of its peak that the towers reach; None: `assumed_mfu`.
    """

    nodes: int = 1
    link: Link = INFINIBAND
    within: Link = NVLINK
    gpu: str | None = None
    mfu: float | None = None

    @property
    def device(self) -> str:
        local_gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else DEFAULT_GPU
        return self.gpu or (local_gpu if peak_flops(local_gpu) else DEFAULT_GPU)

    @property
    def peak(self) -> float:
        """Return the dense bf16 peak of a device in FLOP/s.

        Raises:
            UserError: for an unknown name.
        """
        peak = peak_flops(self.device)
        if peak is None:
            raise UserError(f"--gpu {self.device!r}: its peak is not known; there is A100, A800, H100, H200, B200 and others")
        return peak

    def machine(self, precision: str) -> Machine:
        """Return the rates of devices and links for the loss in a precision."""
        share = LOSS_SHARE * (FP32 if precision == "fp32" else TF32)
        return replace(with_links(MACHINES["cuda"], self.within, self.link), products=self.peak * share)

    def towers_rate(self, precision: str) -> float:
        """Return the FLOP/s of the towers on one device."""
        share_of_peak = {"fp32": FP32, "tf32": TF32}.get(precision, 1.0)
        return self.peak * share_of_peak * (self.mfu or assumed_mfu(self.peak))


def assumed_mfu(peak: float) -> float:
    """Return the share of a peak that towers reach, as published of ViT-g/14 on A100 (0.39) and H100 (0.2)."""
    return 0.4 if peak < 4e14 else 0.2


def link_of(text: str, option: str) -> Link:
    """Parse GB/s[,us], of an option's value.

    Raises:
        UserError: for anything but one or two positive numbers.
    """
    default = INFINIBAND if option == "--link" else NVLINK
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(math.isfinite(n) and n > 0 for n in numbers):
        raise UserError(f"{option} {text!r} is not GB/s[,us], like 50 or 50,5: gigabytes a second of a device, one direction")
    return Link(numbers[1] * 1e-6 if len(numbers) == 2 else default.latency, numbers[0] * 1e9)


@dataclass(frozen=True)
class Work:
    """The work of a step on each of several devices.

    Attributes:
        samples: of one device. at_a_time: of them, those whose activations exist at once.
        cuts: parts of the batch, each contrasted within itself (accumulation).
        forward, backward: FLOPs a sample. again: additional forwards, which fetch their weights again: 1 with gradient
            caching. locked: FLOPs a sample of the forward that are not done again. recomputed: those of blocks that recompute.
        terms: pairs of fields. width, element, reductions, both: of their rows, as `passes` takes them.
        gradients, weights: bytes of reduced gradients, and of weights that are fetched for each pass if they are sharded.
        refetched: whether shards are fetched again for the backward.
        shard_ranks: devices that share a copy of the weights; 0: all. reduced_once: shards of the gradients are reduced once
            a step, not after every micro-batch.
    """

    samples: int
    at_a_time: int
    forward: float
    backward: float
    width: int
    gradients: int
    cuts: int = 1
    again: int = 0
    locked: float = 0.0
    recomputed: float = 0.0
    terms: int = 1
    element: int = 4
    reductions: int = 1
    both: bool = True
    weights: int = 0
    refetched: bool = True
    shard_ranks: int = 0
    reduced_once: bool = False


@dataclass(frozen=True)
class SchemeTime:
    """A loss's communication by one scheme.

    Attributes:
        waits: seconds that it adds to a step. alone: seconds without overlap. calls: of a rank in a step. sent: bytes of them.
        memory: bytes of columns of other ranks.
    """

    waits: float
    alone: float
    calls: int
    sent: int
    memory: int


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step, by parts that add up.

    Attributes:
        schemes: all possible ones. scheme: the one that is used. fastest: of all.
        reduction: seconds of the gradients' reduction (and fetching of shards) without overlap.
    """

    parts: dict[str, float]
    schemes: dict[Scheme, SchemeTime]
    scheme: Scheme
    fastest: Scheme
    reduction: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def dominant(self) -> str:
        return max(self.parts, key=lambda part: self.parts[part])


def sharded_calls(work: Work, nodes: int, within: int) -> list[Calls]:
    """Return what fetching weights in shards and reducing their gradients calls in a step: all-gathers and reduce-scatters
    among the devices that share a copy of the weights, all-reduces of a shard among the copies (HSDP)."""
    devices, micro_batches = nodes * within, math.ceil(work.samples / work.at_a_time)
    ranks = min(work.shard_ranks or devices, devices)
    copies, reductions = devices // ranks, 1 if work.reduced_once else micro_batches
    nodes_of_copy = max(1, ranks // within)
    fetches = micro_batches * (1 + work.again + work.refetched)
    fetched = fetches * work.weights * (ranks - 1) // ranks
    reduced = reductions * work.gradients * (ranks - 1) // ranks
    calls = [Calls("all_gather", ranks, nodes_of_copy, fetches, 1, fetched)]
    calls.append(Calls("reduce_scatter", ranks, nodes_of_copy, reductions, 1, reduced))
    if copies > 1:
        among_copies = reductions * 2 * (work.gradients // ranks) * (copies - 1) // copies
        calls.append(Calls("all_reduce", copies, nodes // nodes_of_copy, reductions, 1, among_copies))
    return [call for call in calls if call.ranks > 1]


def step_time(
    work: Work, nodes: int, within: int, machine: Machine, towers_rate: float, scheme: Scheme | None = None
) -> StepTime:
    """Return the time of a step on `nodes` of `within` devices.

    Args:
        scheme: of communication; None: the choice of "auto".
    """
    devices, rows = nodes * within, work.samples // work.cuts
    losses = work.terms * work.cuts
    forward_again = work.again * (work.forward - work.locked) + work.recomputed
    towers = work.samples * (work.forward + work.backward + forward_again) / towers_rate
    products = products_seconds(rows, rows * devices, work.width, machine)
    both_passes = passes(work.width, work.element, work.reductions, both=work.both)
    possible_schemes = [name for name in SCHEMES if name != "hierarchical" or (nodes > 1 and within > 1)]
    schemes: dict[Scheme, SchemeTime] = {}
    exchange = Calls("all_gather", devices, nodes, 1, 1, (devices - 1) * 40)  # of sizes
    for name in possible_schemes:
        calls = loss_calls(name, nodes, within, rows, both_passes)
        sizes = exchange.seconds(machine) * work.cuts if devices > 1 else 0.0
        if devices == 1:
            calls = []
        schemes[name] = SchemeTime(
            losses * waiting_seconds(calls, blocks_of(name, nodes, within), products, machine) + sizes,
            losses * sum(call.seconds(machine) for call in calls) + sizes,
            losses * sum(call.count for call in calls) + (work.cuts if devices > 1 else 0),
            losses * sum(call.sent for call in calls),
            gathered_bytes(name, nodes, within, rows, work.width) if devices > 1 else 0,
        )
    if scheme not in schemes:
        scheme = cheapest(nodes, within, rows, work.width, MACHINES["cuda" if machine.overlaps else "cpu"])
    candidates = [name for name in possible_schemes if name != "gather" or schemes[name].memory <= GATHERED]
    fastest = min(candidates, key=lambda name: schemes[name].waits)
    reduction, hidden = 0.0, 0.0
    if devices > 1:
        if work.weights:
            reduction, hidden = sum(call.seconds(machine) for call in sharded_calls(work, nodes, within)), towers
        else:
            sent_bytes = 2 * work.gradients * (devices - 1) // devices
            reduction = Calls("all_reduce", devices, nodes, 1, 1, sent_bytes).seconds(machine)
            hidden = min(work.at_a_time, work.samples) * (work.backward + work.recomputed) / towers_rate
    waits = max(0.0, reduction - hidden) if machine.overlaps else reduction
    parts = {
        "towers": towers,
        "the loss's products": losses * products,
        "reduction of the gradients": waits,
        "communication of the loss": schemes[scheme].waits,
    }
    return StepTime(parts, schemes, scheme, fastest, reduction)
