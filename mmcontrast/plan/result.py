"""The plan of a run: parameters, FLOPs, memory and time of a step on each device, and whether it fits."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mmcontrast.scaling import StepTime

GIB = 2**30


@dataclass(frozen=True)
class TowerPlan:
    """The cost of a tower with its projection.

    Attributes:
        learning: trainable parameters.
        flops: of its forward, for one sample, over all of its fields.
        saved: bytes that it keeps for the backward, for the samples that are on the device at a time.
    """

    parameters: int
    learning: int
    flops: float
    saved: int


@dataclass(frozen=True)
class Plan:
    """The computed memory, cost and time of a config on each device.

    Attributes:
        per_device: samples of a step on one device. at_a_time: of them, those whose activations exist at once.
        cached: whether gradients are cached, by train.micro_batch_size.
        parameters: of the model. learning: of them, the trainable ones.
        flops_per_sample: of forward and backward, without recomputation.
        memory: bytes by use. available: of one device.
        largest: the largest power of two for train.micro_batch_size that fits; None if none does.
        largest_batch: the largest batch of all devices that fits with gradient caching; None if none does.
        time: of a step, predicted. assumed: its assumptions, neither counted nor measured here.
        notes: what was assumed, or is not counted. remedies: options of training that would still save memory.
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
        derived = {"total": self.total, "fits": self.fits, "verdict": self.verdict, "time": time}
        return dataclasses.asdict(self) | derived
