"""Blocks of columns travel round a ring of ranks; a single process is a ring of one. The only file that knows ranks.

Rank r holds rows r for good. Column block r visits every rank once, in W − 1 moves to the right neighbour; what the
ranks add up for it (column statistics, dY) follows one step behind, and comes home with the W-th move. What only
travels is sent while the tile before is computed.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ring:
    """The ranks of a group in a circle.

    Args:
        group: a torch.distributed group, or None: this process alone.
        sizes: rows of every rank's column block; all ranks pass the same list.
    """

    def __init__(self, group: dist.ProcessGroup | None, sizes: Sequence[int]) -> None:
        self.group, self.sizes = group, tuple(sizes)
        self.world_size, self.rank = len(self.sizes), dist.get_rank(group) if group is not None else 0
        if group is not None:
            self.right = dist.get_global_rank(group, (self.rank + 1) % self.world_size)
            self.left = dist.get_global_rank(group, (self.rank - 1) % self.world_size)

    def owner(self, step: int) -> int:
        """Whose column block is here at a step."""
        return (self.rank - step) % self.world_size

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(step, block) for every column block, the own one first; the next arrives while the caller works."""
        for step in range(self.world_size):
            moving = None
            if step + 1 < self.world_size:
                moving = Move(self, block, self.sizes[self.owner(step + 1)], tag=0)
            yield step, block
            if moving is not None:
                block = moving.arrived()


class Accumulator:
    """What the ranks add up for a travelling column block. `add` at every visit; after the last, `home` is complete."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.moving: Move | None = None

    def add(self, step: int, merge: Sequence, parts: list[Tensor]) -> None:
        """merge[k](a, b) joins the k-th part with what the ranks before added up."""
        if self.moving is not None:
            earlier = self.moving.arrived()
            parts = [join(a, b) for join, a, b in zip(merge, earlier, parts, strict=True)]
        if self.ring.world_size > 1:
            self.moving = Move(self.ring, parts, self.ring.sizes[self.ring.owner(step + 1)], tag=100)
        self.parts = parts

    def home(self) -> list[Tensor]:
        return self.parts if self.moving is None else self.moving.arrived()


class Move:
    """Tensors under way to the right neighbour, and as many from the left, of `rows` rows each."""

    def __init__(self, ring: Ring, tensors: list[Tensor], rows: int, tag: int) -> None:
        self.sent = [tensor.contiguous() for tensor in tensors]  # kept alive until they have arrived
        self.received = [tensor.new_empty((rows, *tensor.shape[1:])) for tensor in self.sent]
        operations = []
        for number, (out, into) in enumerate(zip(self.sent, self.received, strict=True)):
            if out.numel():
                operations.append(dist.P2POp(dist.isend, out, ring.right, ring.group, tag + number))
            if into.numel():
                operations.append(dist.P2POp(dist.irecv, into, ring.left, ring.group, tag + number))
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def arrived(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def exchange(values: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[list[int]]:
    """Every rank's small list of integers (of one length), by rank."""
    if group is None:
        return [list(values)]
    own = torch.tensor(list(values), dtype=torch.int64, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return [rank.tolist() for rank in everyone]
