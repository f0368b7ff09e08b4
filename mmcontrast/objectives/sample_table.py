"""A table of numbers by sample id, for objectives with a memory."""

from typing import Any

import torch
from torch import Tensor, nn

from mmcontrast.score.ranks import Everyone

EMPTY = torch.iinfo(torch.int64).min  # no sample's id
MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd: spreads ids over the table (Knuth, volume 3, 6.4)
MIX = -4658895280553007687, -7723592293110705685  # of splitmix64, which spreads ids over ranks, whatever their slots


class SampleTable(nn.Module):
    """A hash table of named columns of floats by sample id, with linear probing; it grows with the samples and is at most half
    full.

    Its state is the ids and their values alone, whatever the table's size. It is the same on every rank, as all ranks write the
    values of all, until `divide` leaves each rank the ids that belong to it.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[str] = []
        self.rank, self.world_size = 0, 1  # of those that divide it
        self._clear(64, torch.float32, torch.device("cpu"))

    def _clear(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the table empty."""
        self.register_buffer("keys", torch.full((capacity,), EMPTY, device=device), persistent=False)
        values = torch.full((capacity, len(self.columns)), torch.nan, dtype=dtype, device=device)
        self.register_buffer("values", values, persistent=False)
        self.used = 0  # an upper bound of the occupied slots

    def divide(self, rank: int, world_size: int) -> None:
        """Keep the ids of one of so many ranks from now on. Then `read` and `write` must be called by all of them at once.

        Raises:
            ValueError: for a table that is divided already.
        """
        if self.world_size > 1:
            raise ValueError(f"the table is divided among {self.world_size} ranks already")
        self.rank, self.world_size = rank, world_size
        self.set_extra_state(self.get_extra_state())

    def _is_own(self, ids: Tensor) -> Tensor:
        """Return whether each id is this rank's."""
        mixed = (ids ^ (ids >> 30)) * MIX[0]
        mixed = (mixed ^ (mixed >> 27)) * MIX[1]
        return (mixed >> 31) % self.world_size == self.rank

    def read(self, ids: Tensor, column: str, everyone: Everyone | None = None) -> Tensor:
        """Return the values [n] of ids int64 [n]; NaN for those that were not written.

        Args:
            everyone: the ranks that divide the table, of which each asks for ids of its own.
        """
        if column not in self.columns:
            return self.values.new_full((len(ids),), torch.nan)
        if self.world_size == 1:
            return self._read(ids, column)
        assert everyone is not None and everyone.world_size == self.world_size
        ids = everyone(ids)
        return everyone.sum_of_own(torch.where(self._is_own(ids), self._read(ids, column), 0.0))

    def _read(self, ids: Tensor, column: str) -> Tensor:
        slots = self._find_slots(ids, insert=False)
        return torch.where(self.keys[slots] == ids, self.values[slots, self.columns.index(column)], torch.nan)

    def write(self, ids: Tensor, column: str, values: Tensor) -> None:
        """Write values [n] of ids int64 [n], those of all ranks; of an id that occurs twice, either value."""
        if self.world_size > 1:
            is_own = self._is_own(ids)
            ids, values = ids[is_own], values[is_own]
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

    def _start(self, ids: Tensor) -> Tensor:
        """Return the slot [n] in which the search for each id begins."""
        return ((ids * MULTIPLIER) >> 20) & (len(self.keys) - 1)

    def _find_slots(self, ids: Tensor, insert: bool) -> Tensor:
        """Return the slot [n] of each id, or the free slot in which it would be."""
        mask, slots = len(self.keys) - 1, self._start(ids)
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
        self.add(state["ids"], state["values"])

    def add(self, ids: Tensor, values: Tensor) -> None:
        """Add ids int64 [n] with the values [n, columns] of all columns; to a divided table those that are this rank's."""
        if self.world_size > 1:
            is_own = self._is_own(ids)
            ids, values = ids[is_own], values[is_own]
        device = self.keys.device
        self._grow(len(ids))
        self.values[self._find_slots(ids.to(device), insert=True)] = values.to(device)
