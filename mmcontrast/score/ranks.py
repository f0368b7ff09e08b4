"""How the columns of all ranks meet the rows of this one: round a ring, gathered, or both. The only file that knows ranks.

A driver shows the caller column blocks (`visits`), and adds up, for each block's owner, what the ranks found for it
(`accumulator`). A single process is a ring of one.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mmcontrast.score.traffic import MACHINES, cheapest

Communication = Literal["auto", "ring", "gather", "hierarchical"]
COMMUNICATIONS = ("auto", "ring", "gather", "hierarchical")
Merge = Callable[[Tensor, Tensor], Tensor]

# their names from torch 2.14 on, and before
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Accumulator(Protocol):
    """`add` at every visit; after the last, `home` has what all ranks added up for this rank's own columns."""

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
        """merge[k](a, b) joins the k-th part with what others found."""

    def home(self) -> list[Tensor]: ...


class Driver(Protocol):
    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(step, block) until the rows here have seen every rank's columns; tensors are [columns, …]."""

    def accumulator(self) -> Accumulator: ...


def driver(
    group: dist.ProcessGroup | None,
    sizes: Sequence[int],
    communication: Communication,
    within: int = 1,
    width: int = 512,
    device: str = "cuda",
) -> Driver:
    """
    Args:
        group: a torch.distributed group, or None: this process alone.
        sizes: columns of every rank; all ranks pass the same list, and the same of all else.
        communication: "auto" is what `traffic.cheapest` says of these sizes.
        within: ranks of a node, of which node k has the global ranks from k · within on.
        width: of a column. device: its type.

    Raises:
        ValueError: for an unknown communication; for "hierarchical" on nodes with unequal numbers of ranks.
    """
    if communication not in COMMUNICATIONS:
        raise ValueError(f"communication is {communication!r}, it must be one of {', '.join(COMMUNICATIONS)}")
    if group is None:
        return Ring(group, sizes)
    members = dist.get_process_group_ranks(group)
    nodes = [len(list(ranks)) for _, ranks in groupby(members, lambda rank: rank // within)]
    equal = len(set(nodes)) == 1
    if communication == "hierarchical" and not equal:
        raise ValueError(
            f"communication is hierarchical: nodes have {', '.join(map(str, nodes))} ranks, not equally many; use ring"
        )
    if communication == "auto":
        shape = (len(nodes), nodes[0]) if equal else (len(members), 1)
        communication = cheapest(*shape, max(sizes), width, MACHINES.get(device, MACHINES["cuda"]))
    if communication == "hierarchical" and not subgroups_agree(group):
        raise ValueError(
            "communication is hierarchical: the ranks are members of different numbers of process groups, of which this torch"
            " makes the name of a new one, so they would wait for each other for ever; use ring, or torch 2.14 or later"
        )
    if communication == "gather":
        return Gather(group, sizes)
    return Hierarchical(group, sizes, nodes[0]) if communication == "hierarchical" else Ring(group, sizes)


def ranks_of_node() -> int:
    """How many ranks the launcher says that this node has: torchrun, accelerate and our Slurm script set LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def agreed(within: Sequence[int]) -> int:
    """Ranks of a node, if all ranks say the same; else 1: nothing is known of nodes."""
    return within[0] if len(set(within)) == 1 else 1


class Gather:
    """Every rank holds all columns for the length of a pass: O(global batch) memory, two collectives a tensor."""

    def __init__(self, group: dist.ProcessGroup, sizes: Sequence[int]) -> None:
        self.group, self.sizes, self.rank = group, tuple(sizes), dist.get_rank(group)
        self.equal = len(set(self.sizes)) == 1

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        yield 0, [self.gathered(tensor) for tensor in block]

    def gathered(self, tensor: Tensor) -> Tensor:
        """All ranks' rows in order; padded to one size under way."""
        most = max(self.sizes)
        if most == 0:
            return tensor
        every = tensor.new_empty((len(self.sizes) * most, *tensor.shape[1:]))
        ALL_GATHER(every, padded(tensor, most), group=self.group)
        if self.equal:
            return every
        return torch.cat([part[:size] for part, size in zip(every.split(most), self.sizes, strict=True)])

    def owned(self, merge: Merge, part: Tensor) -> Tensor:
        """What all ranks' parts say of this rank's own rows: of what has columns the sum (dY), else merged in their order."""
        own, most = self.sizes[self.rank], max(self.sizes)
        if most == 0:
            return part
        if part.dim() > 1:
            sent = part.contiguous() if self.equal else torch.cat([padded(rows, most) for rows in part.split(self.sizes)])
            total = part.new_empty((most, *part.shape[1:]))
            REDUCE_SCATTER(total, sent, group=self.group)
            return total[:own]
        every = part.new_empty(len(self.sizes) * own)
        dist.all_to_all_single(every, part.contiguous(), [own] * len(self.sizes), list(self.sizes), group=self.group)
        first, *others = every.view(len(self.sizes), own)
        for other in others:
            first = merge(first, other)
        return first

    def accumulator(self) -> "GatherAccumulator":
        return GatherAccumulator(self)


class GatherAccumulator:
    """Each rank gets its own rows of what all found."""

    def __init__(self, gather: Gather) -> None:
        self.gather = gather

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
        self.parts = [self.gather.owned(join, part) for join, part in zip(merge, parts, strict=True)]

    def home(self) -> list[Tensor]:
        return self.parts


def padded(rows: Tensor, most: int) -> Tensor:
    if len(rows) == most:
        return rows.contiguous()
    out = rows.new_zeros((most, *rows.shape[1:]))
    out[: len(rows)] = rows
    return out


class Hierarchical:
    """Nodes are a ring, whose ranks gather: the k-th ranks of all nodes pass their columns on as a ring does, and at every step
    the ranks of a node gather the columns that came. For M nodes of L ranks M steps in the place of the ring's M · L; a rank
    holds the columns of a node and its own next ones. What a node found is summed within it before it travels on."""

    def __init__(self, group: dist.ProcessGroup, sizes: Sequence[int], within: int) -> None:
        members, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        node, local = divmod(rank, within)
        self.node = subgroup(group, tuple(members[node * within : (node + 1) * within]))
        self.ring = Ring(subgroup(group, tuple(members[local::within])), sizes[local::within])
        self.sizes = [tuple(sizes[start : start + within]) for start in range(0, len(sizes), within)]

    def gather(self, step: int) -> Gather:
        """Of the columns that are here at a step."""
        return Gather(self.node, self.sizes[self.ring.owner(step)])

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        for step, own in self.ring.visits(block):
            yield step, [self.gather(step).gathered(tensor) for tensor in own]

    def accumulator(self) -> "HierarchicalAccumulator":
        return HierarchicalAccumulator(self)


class HierarchicalAccumulator:
    """A node's share of each of its columns goes to the rank that passes it on."""

    def __init__(self, hierarchical: Hierarchical) -> None:
        self.hierarchical, self.travelling = hierarchical, hierarchical.ring.accumulator()

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
        gather = self.hierarchical.gather(step)
        self.travelling.add(step, merge, [gather.owned(join, part) for join, part in zip(merge, parts, strict=True)])

    def home(self) -> list[Tensor]:
        return self.travelling.home()


@cache
def subgroups_agree(group: dist.ProcessGroup) -> bool:
    """Return whether all ranks of a group would give a new group the same name.

    Before 2.14 torch makes it of the number of groups that a rank is a member of, so that ranks for which it differs wait for
    each other for ever.
    """
    name_of = getattr(dist.distributed_c10d, "_hash_ranks_to_str", None)
    if name_of is None:
        return True
    names: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, name_of([0]), group=group)
    return len(set(names)) == 1


@cache
def subgroup(group: dist.ProcessGroup, members: tuple[int, ...]) -> dist.ProcessGroup:
    """Return the group of some members, made once; only these ask."""
    made = dist.new_group(list(members), use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup), "only members ask"
    return made


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
    """Every rank's small list of integers (of one length), by rank: one collective, for which the host waits once."""
    if group is None:
        return [list(values)]
    own = torch.tensor(list(values), dtype=torch.int64, device=device)
    everyone = own.new_empty(dist.get_world_size(group) * len(own))
    ALL_GATHER(everyone, own, group=group)
    return everyone.view(-1, len(own)).tolist()
