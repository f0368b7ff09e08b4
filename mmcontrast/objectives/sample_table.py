"""Numbers kept for every sample by its id, for objectives with a memory."""

from typing import Any

import torch
from torch import Tensor, nn

EMPTY = torch.iinfo(torch.int64).min  # no sample's id
MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd: spreads ids over the table (Knuth, volume 3, 6.4)


class SampleTable(nn.Module):
    """Named columns of floats by sample id: a hash table with linear probing, grown as samples come, at most half full.

    Its state is the ids and their values alone, whatever the table's size. On every rank it is the same, as all write what
    all have found.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[str] = []
        self._clear(64, torch.float32, torch.device("cpu"))

    def _clear(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.register_buffer("keys", torch.full((capacity,), EMPTY, device=device), persistent=False)
        values = torch.full((capacity, len(self.columns)), torch.nan, dtype=dtype, device=device)
        self.register_buffer("values", values, persistent=False)
        self.used = 0  # places taken, at most

    def read(self, ids: Tensor, column: str) -> Tensor:
        """[n] for ids int64 [n]; NaN where nothing was written."""
        if column not in self.columns:
            return self.values.new_full((len(ids),), torch.nan)
        places = self._places(ids, insert=False)
        return torch.where(self.keys[places] == ids, self.values[places, self.columns.index(column)], torch.nan)

    def write(self, ids: Tensor, column: str, values: Tensor) -> None:
        """values [n] for ids int64 [n]; of an id that is there twice, either."""
        if values.dtype != self.values.dtype:
            self.values = self.values.to(torch.promote_types(values.dtype, self.values.dtype))
        if column not in self.columns:
            self.columns.append(column)
            self.values = torch.cat([self.values, self.values.new_full((len(self.keys), 1), torch.nan)], 1)
        if 2 * (self.used + len(ids)) > len(self.keys):
            self._grow(len(ids))
        self.values[self._places(ids, insert=True), self.columns.index(column)] = values.to(self.values.dtype)

    def _grow(self, more: int) -> None:
        keys, values = self._content()
        capacity = len(self.keys)
        while capacity < 2 * (len(keys) + more):
            capacity *= 2
        self._clear(capacity, values.dtype, values.device)
        self.values[self._places(keys, insert=True)] = values

    def _places(self, ids: Tensor, insert: bool) -> Tensor:
        """[n]: where each id is, or would be."""
        mask = len(self.keys) - 1
        places = ((ids * MULTIPLIER) >> 20) & mask
        left = torch.arange(len(ids), device=ids.device)
        while len(left):
            here, wanted = places[left], ids[left]
            free = self.keys[here] == EMPTY
            if insert:
                self.keys[here[free]] = wanted[free]  # of several that want one place, one has it
                arrived = self.keys[here] == wanted
                self.used += int((free & arrived).sum())
            else:
                arrived = free | (self.keys[here] == wanted)
            left = left[~arrived]
            places[left] = (places[left] + 1) & mask
        return places

    def _content(self) -> tuple[Tensor, Tensor]:
        taken = self.keys != EMPTY
        return self.keys[taken], self.values[taken]

    def __len__(self) -> int:
        return int((self.keys != EMPTY).sum())

    def get_extra_state(self) -> dict[str, Any]:
        ids, values = self._content()
        order = ids.argsort()  # not that of the table, which depends on when a run was resumed
        return {"columns": list(self.columns), "ids": ids[order].cpu(), "values": values[order].cpu()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.columns = list(state["columns"])
        device = self.keys.device
        self._clear(64, state["values"].dtype, device)
        self._grow(len(state["ids"]))
        self.values[self._places(state["ids"].to(device), insert=True)] = state["values"].to(device)
