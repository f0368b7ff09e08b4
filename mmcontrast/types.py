"""Defines a batch of samples with any number of fields, which is passed between the layers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

ABSENT = -1  # the group id of a sample in a field that it lacks


@dataclass
class Batch:
    """N samples. A sample may lack fields; `values[field]` holds the rows of those that have it, in order.

    Attributes:
        values: per field, P ≤ N rows as its modality collates them. If no sample of the batch has the field, one blank row,
            so that every tower takes part in every step.
        present: per field, bool [N].
        sample_ids: int64 [N], unique and stable: the key of the sample log, augmentation and per-sample state.
        group_ids: int64 [N], of the thing that a sample shows; equal ones are not negatives of each other.
        metadata: per sample, its json with its `key`.
        replaced: of samples that could not be decoded and were replaced by others: their `error`, and `source` if there are
            several.
        weights: [N] ≥ 0, of the samples in the loss; None: all alike.
        views: the same samples as each teacher reads them, with values and present of its own.
        encoded_as: of values that are further candidates of a field, as mined negatives are, that field, whose tower encodes
            them.
    """

    values: dict[str, Tensor]
    present: dict[str, Tensor]
    sample_ids: Tensor
    group_ids: Tensor
    metadata: list[dict[str, Any]]
    replaced: list[dict[str, str]] = field(default_factory=list)
    weights: Tensor | None = None
    views: list["Batch"] = field(default_factory=list)
    encoded_as: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def ids(self) -> dict[str, Tensor]:
        """Return per field int64 [N]: the group id, or −1 where the sample lacks the field."""
        return {name: torch.where(present, self.group_ids, ABSENT) for name, present in self.present.items()}

    def split(self, size: int) -> list["Batch"]:
        """Return parts of consecutive samples, at most `size` each, of sizes as equal as possible."""
        number = -(-len(self) // size)
        ends = [len(self) * k // number for k in range(number + 1)]
        return [self._part(slice(start, stop)) for start, stop in pairwise(ends)]

    def deal(self, number: int) -> list["Batch"]:
        """Return parts that take every `number`-th sample. Ranks hold consecutive samples of the whole batch: where `number`
        divides those of a rank, the parts of all ranks make up the same parts of the whole batch for any number of ranks."""
        return [self] if number == 1 else [self._part(slice(k, None, number)) for k in range(number)]

    def _part(self, chosen: slice) -> "Batch":
        values = {}
        for name, rows in self.values.items():
            present = self.present[name]
            numbers = (present.cumsum(0) - 1)[chosen][present[chosen]]
            if not len(numbers):
                values[name] = rows[:1]  # of no sample: any row will do
            elif chosen.step is None:
                values[name] = rows[int(numbers[0]) : int(numbers[-1]) + 1]  # no copy, and pinned memory stays pinned
            else:
                values[name] = rows[numbers].pin_memory() if rows.is_pinned() else rows[numbers]
        return Batch(
            values,
            {name: present[chosen] for name, present in self.present.items()},
            self.sample_ids[chosen],
            self.group_ids[chosen],
            self.metadata[chosen],
            weights=None if self.weights is None else self.weights[chosen],
            views=[view._part(chosen) for view in self.views],
            encoded_as=self.encoded_as,
        )

    def labels(self) -> "Batch":
        """Return the batch without values and views; with weights only where one is not 1. For a batch on the host."""
        weights = None if self.weights is None or bool((self.weights == 1).all()) else self.weights
        return replace(self, values={}, views=[], weights=weights)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            values={name: move(value) for name, value in self.values.items()},
            present={name: move(present) for name, present in self.present.items()},
            sample_ids=move(self.sample_ids),
            group_ids=move(self.group_ids),
            weights=None if self.weights is None else move(self.weights),
            views=[view._map(move) for view in self.views],
        )
