"""What travels between the layers: a batch of samples with any number of fields, and the embeddings made of it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

ABSENT = -1  # the group id of a sample in a field that it lacks


@dataclass
class Batch:
    """N samples. A sample may lack fields; `values[field]` holds the rows of those that have it, in order.

    Attributes:
        values: per field, what its modality collates, P ≤ N rows. If nobody in the batch has the field, one blank row
            stands there, so that every tower takes part in every step.
        present: per field, bool [N].
        sample_ids: int64 [N], unique and stable: the key of audit, augmentation and per-sample state.
        group_ids: int64 [N], what a sample is about; equal ones are not negatives of each other.
        metadata: per sample, what its shard says of it, with its `key`.
        replaced: of samples that could not be decoded, in whose place others stand: their `error`, and `source` if there
            are several.
    """

    values: dict[str, Tensor]
    present: dict[str, Tensor]
    sample_ids: Tensor
    group_ids: Tensor
    metadata: list[dict[str, Any]]
    replaced: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def ids(self) -> dict[str, Tensor]:
        """Per field, int64 [N]: the group id, or −1 where the sample lacks the field."""
        return {name: torch.where(here, self.group_ids, ABSENT) for name, here in self.present.items()}

    def split(self, size: int) -> list["Batch"]:
        """Parts of `size` samples, the last of what is left."""
        return [self._part(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def _part(self, start: int, stop: int) -> "Batch":
        values = {}
        for name, rows in self.values.items():
            first, last = int(self.present[name][:start].sum()), int(self.present[name][:stop].sum())
            values[name] = rows[first:last] if last > first else rows[:1]  # nobody's: any row will do
        here = slice(start, stop)
        return Batch(
            values,
            {name: present[here] for name, present in self.present.items()},
            self.sample_ids[here],
            self.group_ids[here],
            self.metadata[here],
        )

    def labels(self) -> "Batch":
        """All but the values."""
        return replace(self, values={})

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            values={name: move(value) for name, value in self.values.items()},
            present={name: move(here) for name, here in self.present.items()},
            sample_ids=move(self.sample_ids),
            group_ids=move(self.group_ids),
        )
