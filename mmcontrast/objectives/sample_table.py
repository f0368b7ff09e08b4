"""A table of numbers by sample id, for objectives with a memory."""

from typing import Any

import torch
from torch import Tensor, nn

EMPTY = torch.iinfo(torch.int64).min  # no sample's id
MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd: spreads ids over the table (Knuth, volume 3, 6.4)


class SampleTable(nn.Module):
    """A hash table of named columns of floats by sample id, with linear probing; it grows with the samples and is at most half
    full.

    Its state is the ids and their values alone, whatever the table's size. It is the same on every rank, as all ranks write the
    values of all.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[str] = []
        self._clear(64, torch.float32, torch.device("cpu"))

    def _clear(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the table empty."""
        self.register_buffer("keys", torch.full((capacity,), EMPTY, device=device), persistent=False)
        values = torch.full((capacity, len(self.columns)), torch.nan, dtype=dtype, device=device)
        self.register_buffer("values", values, persistent=False)
        self.used = 0  # an upper bound of the occupied slots

    def read(self, ids: Tensor, column: str) -> Tensor:
        """Return the values [n] of ids int64 [n]; NaN for those that were not written."""
        if column not in self.columns:
            return self.values.new_full((len(ids),), torch.nan)
        slots = self._find_slots(ids, insert=False)
        return torch.where(self.keys[slots] == ids, self.values[slots, self.columns.index(column)], torch.nan)

    def write(self, ids: Tensor, column: str, values: Tensor) -> None:
        """Write values [n] of ids int64 [n]; of an id that occurs twice, either value."""
        if values.dtype != self.values.dtype:
            self.values = self.values.to(torch.promote_types(values.dtype, self.values.dtype))
        if column not in self.columns:
            self.columns.append(column)
            self.values = torch.cat([self.values, self.values.new_full((len(self.keys), 1), torch.nan)], 1)
        if 2 * (self.used + len(ids)) > len(self.keys):
            self._grow(len(ids))
        self.values[self._find_slots(ids, insert=True), self.columns.index(column)] = values.to(self.values.dtype)

    def _grow(self, more: int) -> None:
        """Make the table large enough for more ids."""
        keys, values = self._content()
        capacity = len(self.keys)
        while capacity < 2 * (len(keys) + more):
            capacity *= 2
        self._clear(capacity, values.dtype, values.device)
        self.values[self._find_slots(keys, insert=True)] = values

    def _find_slots(self, ids: Tensor, insert: bool) -> Tensor:
        """Return the slot [n] of each id, or the free slot in which it would be."""
        mask = len(self.keys) - 1
        slots = ((ids * MULTIPLIER) >> 20) & mask
        pending = torch.arange(len(ids), device=ids.device)
        while len(pending):
            tried, pending_ids = slots[pending], ids[pending]
            free = self.keys[tried] == EMPTY
            if insert:
                self.keys[tried[free]] = pending_ids[free]  # of several ids that try one slot, one gets it
                done = self.keys[tried] == pending_ids
                self.used += int((free & done).sum())
            else:
                done = free | (self.keys[tried] == pending_ids)
            pending = pending[~done]
            slots[pending] = (slots[pending] + 1) & mask
        return slots

    def _content(self) -> tuple[Tensor, Tensor]:
        """Return the ids of the table and their values."""
        occupied = self.keys != EMPTY
        return self.keys[occupied], self.values[occupied]

    def __len__(self) -> int:
        return int((self.keys != EMPTY).sum())

    def get_extra_state(self) -> dict[str, Any]:
        ids, values = self._content()
        order = ids.argsort()  # not the table's order, which depends on when a run was resumed
        return {"columns": list(self.columns), "ids": ids[order].cpu(), "values": values[order].cpu()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.columns = list(state["columns"])
        device = self.keys.device
        self._clear(64, state["values"].dtype, device)
        self._grow(len(state["ids"]))
        self.values[self._find_slots(state["ids"].to(device), insert=True)] = state["values"].to(device)
