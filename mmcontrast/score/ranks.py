"""How the columns of all ranks meet the rows of this one: round a ring, or gathered at once. The only file that knows ranks.

A driver shows the caller column blocks (`visits`), and adds up, for each block's owner, what the ranks found for it
(`accumulator`). A single process is a ring of one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Communication = Literal["ring", "gather"]
Merge = Callable[[Tensor, Tensor], Tensor]


class Accumulator(Protocol):
    """`add` at every visit; after the last, `home` has what all ranks added up for this rank's own columns."""

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
        """merge[k](a, b) joins the k-th part with what others found."""

    def home(self) -> list[Tensor]: ...


class Driver(Protocol):
    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(step, block) until the rows here have seen every rank's columns; tensors are [columns, …]."""

    def accumulator(self) -> Accumulator: ...


def driver(group: dist.ProcessGroup | None, sizes: Sequence[int], communication: Communication) -> Driver:
    """
    Args:
        group: a torch.distributed group, or None: this process alone.
        sizes: columns of every rank; all ranks pass the same list, and the same of all else.
    """
    if communication not in ("ring", "gather"):
        raise ValueError(f'communication is "ring" or "gather", not {communication!r}')
    return Gather(group, sizes) if group is not None and communication == "gather" else Ring(group, sizes)


class Gather:
    """Every rank holds all columns for the length of a pass: O(global batch) memory, two collectives a pass."""

    def __init__(self, group: dist.ProcessGroup, sizes: Sequence[int]) -> None:
        self.group, self.sizes, self.rank = group, tuple(sizes), dist.get_rank(group)

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        yield 0, [self.gathered(tensor) for tensor in block]

    def gathered(self, tensor: Tensor) -> Tensor:
        """All ranks' rows in order; padded to one size under way."""
        most = max(self.sizes)
        if most == 0:
            return tensor
        own = tensor.new_zeros((most, *tensor.shape[1:]))
        own[: len(tensor)] = tensor
        every = tensor.new_empty((len(self.sizes) * most, *tensor.shape[1:]))
        dist.all_gather_into_tensor(every, own, group=self.group)
        return torch.cat([part[:size] for part, size in zip(every.split(most), self.sizes, strict=True)])

    def accumulator(self) -> "GatherAccumulator":
        return GatherAccumulator(self)


class GatherAccumulator:
    """Statistics [columns] are gathered and merged; what has rows (dY) is summed at its owner."""

    def __init__(self, gather: Gather) -> None:
        self.gather = gather

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
        self.parts = [self._owned(join, part) for join, part in zip(merge, parts, strict=True)]

    def _owned(self, merge: Merge, part: Tensor) -> Tensor:
        gather = self.gather
        if part.dim() > 1:
            own = list(part.split(gather.sizes))
            for rank, rows in enumerate(own):
                if len(rows):
                    dist.reduce(rows, dist.get_global_rank(gather.group, rank), group=gather.group)
            return own[gather.rank]
        if len(part) == 0:
            return part
        every = part.new_empty(len(gather.sizes) * len(part))
        dist.all_gather_into_tensor(every, part.contiguous(), group=gather.group)
        first, *others = (found.split(gather.sizes)[gather.rank] for found in every.split(len(part)))
        for other in others:
            first = merge(first, other)
        return first

    def home(self) -> list[Tensor]:
        return self.parts


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None, sizes: Sequence[int]) -> Tensor:
    """[n, …] of all ranks in their order, O(global batch); the gradient is that of the sum of what the ranks derive from it."""
    return rows if group is None else _GatherRows.apply(rows, Gather(group, sizes))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return gather.gathered(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        accumulator = ctx.gather.accumulator()
        accumulator.add(0, [torch.add], [grads[0].clone(memory_format=torch.contiguous_format)])
        return accumulator.home()[0], None


class Ring:
    """Rank r holds rows r for good. Column block r visits every rank once, in W − 1 moves to the right neighbour; what
    the ranks add up for it follows one step behind, and comes home with the W-th move. What only travels is sent while
    the tile before is computed."""

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
        """The own block first; the next arrives while the caller works."""
        for step in range(self.world_size):
            moving = None
            if step + 1 < self.world_size:
                moving = Move(self, block, self.sizes[self.owner(step + 1)], tag=0)
            yield step, block
            if moving is not None:
                block = moving.arrived()

    def accumulator(self) -> "RingAccumulator":
        return RingAccumulator(self)


class RingAccumulator:
    """Sent on as soon as this rank has added its part."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.moving: Move | None = None

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
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
