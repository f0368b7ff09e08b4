"""Drivers that bring the columns of all ranks to the rows of this one: in a ring, gathered, or both. Only this file knows
ranks.

A driver yields column blocks (`visits`), and merges, for each block's owner, the ranks' results (`accumulator`). A single
process is a ring of one.
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

# the names since torch 2.14, and before
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Accumulator(Protocol):
    """Merges the results of all ranks for each rank's columns: `add` at every visit, `home` after the last."""

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
        """Add this rank's parts of a step; merge[k](a, b) joins the k-th part with those of other ranks."""

    def home(self) -> list[Tensor]:
        """Return the merged parts of this rank's own columns."""


class Driver(Protocol):
    """A way in which columns and results travel between the ranks."""

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield (step, block) until this rank's rows have seen every rank's columns; tensors are [columns, …]."""

    def accumulator(self) -> Accumulator:
        """Return an accumulator for one pass."""


def driver(
    group: dist.ProcessGroup | None,
    sizes: Sequence[int],
    communication: Communication,
    within: int = 1,
    width: int = 512,
    device: torch.device | str = "cuda",
) -> Driver:
    """Return the driver of a communication scheme. All ranks must pass the same arguments.

    Args:
        group: a torch.distributed group, or None: this process alone.
        sizes: the number of columns of every rank.
        communication: "auto" is the choice of `traffic.cheapest` for these sizes.
        within: ranks of a node; node k has the global ranks from k · within on.
        width: of a column. device: the columns'.

    Raises:
        ValueError: for an unknown communication; for "hierarchical" on nodes with unequal numbers of ranks, or where a group
            within them cannot be made.
    """
    if communication not in COMMUNICATIONS:
        raise ValueError(f"communication is {communication!r}, it must be one of {', '.join(COMMUNICATIONS)}")
    if group is None:
        return Ring(group, sizes)
    members = dist.get_process_group_ranks(group)
    nodes = [len(list(ranks)) for _, ranks in groupby(members, lambda rank: rank // within)]
    equal_nodes = len(set(nodes)) == 1
    if communication == "hierarchical" and not equal_nodes:
        raise ValueError(
            f"communication is hierarchical: nodes have {', '.join(map(str, nodes))} ranks, not equally many; use ring"
        )
    asked, device = communication, torch.device(device)
    if communication == "auto":
        shape = (len(nodes), nodes[0]) if equal_nodes else (len(members), 1)
        communication = cheapest(*shape, max(sizes), width, MACHINES.get(device.type, MACHINES["cuda"]))
    if communication == "hierarchical" and not subgroups_agree(group, device):
        if asked == "hierarchical":
            raise ValueError(
                "communication is hierarchical: the ranks have made different numbers of process groups, by which torch names a"
                " new one, so they would wait for each other for ever: make groups on all ranks alike, or use ring"
            )
        communication = "ring"
    if communication == "gather":
        return Gather(group, sizes)
    return Hierarchical(group, sizes, nodes[0]) if communication == "hierarchical" else Ring(group, sizes)


def ranks_of_node() -> int:
    """Return the ranks of this node by LOCAL_WORLD_SIZE, which torchrun, accelerate and our Slurm script set."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def agreed(within: Sequence[int]) -> int:
    """Return the ranks of a node if all ranks agree, else 1: the nodes are unknown."""
    return within[0] if len(set(within)) == 1 else 1


class Gather:
    """A driver that gathers all columns on every rank for a pass: O(global batch) memory, two collectives per tensor."""

    def __init__(self, group: dist.ProcessGroup, sizes: Sequence[int]) -> None:
        self.group, self.sizes, self.rank = group, tuple(sizes), dist.get_rank(group)
        self.equal = len(set(self.sizes)) == 1

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        yield 0, [self.gathered(tensor) for tensor in block]

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return all ranks' rows in order; they are padded to one size for sending."""
        longest = max(self.sizes)
        if longest == 0:
            return tensor
        gathered = tensor.new_empty((len(self.sizes) * longest, *tensor.shape[1:]))
        ALL_GATHER(gathered, pad(tensor, longest), group=self.group)
        if self.equal:
            return gathered
        return torch.cat([part[:size] for part, size in zip(gathered.split(longest), self.sizes, strict=True)])

    def owned(self, merge: Merge, part: Tensor) -> Tensor:
        """Return all ranks' parts of this rank's own rows: matrices (dY) summed, vectors merged in the ranks' order."""
        own, longest = self.sizes[self.rank], max(self.sizes)
        if longest == 0:
            return part
        if part.dim() > 1:
            sent = part.contiguous() if self.equal else torch.cat([pad(rows, longest) for rows in part.split(self.sizes)])
            total = part.new_empty((longest, *part.shape[1:]))
            REDUCE_SCATTER(total, sent, group=self.group)
            return total[:own]
        received = part.new_empty(len(self.sizes) * own)
        dist.all_to_all_single(received, part.contiguous(), [own] * len(self.sizes), list(self.sizes), group=self.group)
        merged, *others = received.view(len(self.sizes), own)
        for other in others:
            merged = merge(merged, other)
        return merged

    def accumulator(self) -> "GatherAccumulator":
        return GatherAccumulator(self)


class GatherAccumulator:
    """The accumulator of `Gather`: each rank gets all ranks' results for its own rows."""

    def __init__(self, gather: Gather) -> None:
        self.gather = gather

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
        self.parts = [self.gather.owned(join, part) for join, part in zip(merge, parts, strict=True)]

    def home(self) -> list[Tensor]:
        return self.parts


def pad(rows: Tensor, length: int) -> Tensor:
    """Return rows padded by zeros to a length."""
    if len(rows) == length:
        return rows.contiguous()
    out = rows.new_zeros((length, *rows.shape[1:]))
    out[: len(rows)] = rows
    return out


class Hierarchical:
    """A driver of a ring of nodes, whose ranks gather: the k-th ranks of all nodes form a ring, and at every step the ranks of
    a node gather the columns that arrived. M nodes of L ranks take M steps instead of the ring's M · L; a rank holds the
    columns of a node and its own next ones. The results of a node are summed within it before they travel on."""

    def __init__(self, group: dist.ProcessGroup, sizes: Sequence[int], within: int) -> None:
        members, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        node, local = divmod(rank, within)
        self.node = subgroup(group, tuple(members[node * within : (node + 1) * within]))
        self.ring = Ring(subgroup(group, tuple(members[local::within])), sizes[local::within])
        self.sizes = [tuple(sizes[start : start + within]) for start in range(0, len(sizes), within)]

    def gather(self, step: int) -> Gather:
        """Return the gathering of the columns of a step within the node."""
        return Gather(self.node, self.sizes[self.ring.owner(step)])

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        for step, own in self.ring.visits(block):
            yield step, [self.gather(step).gathered(tensor) for tensor in own]

    def accumulator(self) -> "HierarchicalAccumulator":
        return HierarchicalAccumulator(self)


class HierarchicalAccumulator:
    """The accumulator of `Hierarchical`: the node's results for each column go to the rank that passes them on."""

    def __init__(self, hierarchical: Hierarchical) -> None:
        self.hierarchical, self.travelling = hierarchical, hierarchical.ring.accumulator()

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
        gather = self.hierarchical.gather(step)
        self.travelling.add(step, merge, [gather.owned(join, part) for join, part in zip(merge, parts, strict=True)])

    def home(self) -> list[Tensor]:
        return self.travelling.home()


@cache
def subgroups_agree(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether all ranks of a group would give a new group the same name; asked once a group.

    Torch makes the name of the ranks and of a count of groups: before 2.14 of those that a rank is a member of. Where it
    differs, ranks wait for each other for ever.
    """
    name_of = getattr(dist.distributed_c10d, "_hash_ranks_to_str", None)
    names = exchange([int(name_of([0])[:15], 16) if name_of else 0], group, device)
    return len({name for (name,) in names}) == 1


@cache
def subgroup(group: dist.ProcessGroup, members: tuple[int, ...]) -> dist.ProcessGroup:
    """Return a group of some ranks, which is made once; only its members may call this."""
    new_group = dist.new_group(list(members), use_local_synchronization=True)
    assert isinstance(new_group, dist.ProcessGroup), "only members may call this"
    return new_group


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None, sizes: Sequence[int]) -> Tensor:
    """Return [n, …] of all ranks in order, O(global batch). The gradient is that of the sum of the ranks' results."""
    return rows if group is None else _GatherRows.apply(rows, Gather(group, sizes))


class Everyone:
    """The ranks of a group, each with rows of its own; without a group, this process alone.

    Args:
        sizes: rows of every rank.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, sizes: Sequence[int] = ()) -> None:
        self.group, self.sizes = group, list(sizes)
        self.rank, self.world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the rows [n, …] of all ranks in order, differentiably."""
        return gather_rows(rows, self.group, self.sizes)

    @torch.no_grad()
    def sum_of_own(self, values: Tensor) -> Tensor:
        """Return, of the sum over the ranks of values for the rows of all ranks, the part of this rank's own rows."""
        if self.group is not None:
            values = values.contiguous()
            dist.all_reduce(values, group=self.group)
            values = values.split(self.sizes)[self.rank]
        return values


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
    """A driver in which rank r keeps rows r, and column block r visits every rank once, in W − 1 moves to the right neighbour.
    The ranks' results for it follow one step behind, and return with the W-th move. Columns are sent while the block before is
    computed."""

    def __init__(self, group: dist.ProcessGroup | None, sizes: Sequence[int]) -> None:
        self.group, self.sizes = group, tuple(sizes)
        self.world_size, self.rank = len(self.sizes), dist.get_rank(group) if group is not None else 0
        if group is not None:
            self.right = dist.get_global_rank(group, (self.rank + 1) % self.world_size)
            self.left = dist.get_global_rank(group, (self.rank - 1) % self.world_size)

    def owner(self, step: int) -> int:
        """Return the rank whose column block is here at a step."""
        return (self.rank - step) % self.world_size

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield this rank's block first; the next one arrives while the caller works."""
        for step in range(self.world_size):
            move = None
            if step + 1 < self.world_size:
                move = Move(self, block, self.sizes[self.owner(step + 1)], tag=0)
            yield step, block
            if move is not None:
                block = move.wait()

    def accumulator(self) -> "RingAccumulator":
        return RingAccumulator(self)


class RingAccumulator:
    """The accumulator of `Ring`: results are sent on as soon as this rank has added its part."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.move: Move | None = None

    def add(self, step: int, merge: Sequence[Merge], parts: list[Tensor]) -> None:
        if self.move is not None:
            earlier = self.move.wait()
            parts = [join(a, b) for join, a, b in zip(merge, earlier, parts, strict=True)]
        if self.ring.world_size > 1:
            self.move = Move(self.ring, parts, self.ring.sizes[self.ring.owner(step + 1)], tag=100)
        self.parts = parts

    def home(self) -> list[Tensor]:
        return self.parts if self.move is None else self.move.wait()


class Move:
    """Tensors that are being sent to the right neighbour and received from the left, of `rows` rows each."""

    def __init__(self, ring: Ring, tensors: list[Tensor], rows: int, tag: int) -> None:
        self.sent = [tensor.contiguous() for tensor in tensors]  # kept alive until they are received
        self.received = [tensor.new_empty((rows, *tensor.shape[1:])) for tensor in self.sent]
        operations = []
        for number, (sent, received) in enumerate(zip(self.sent, self.received, strict=True)):
            if sent.numel():
                operations.append(dist.P2POp(dist.isend, sent, ring.right, ring.group, tag + number))
            if received.numel():
                operations.append(dist.P2POp(dist.irecv, received, ring.left, ring.group, tag + number))
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """Wait for the received tensors, and return them."""
        for work in self.works:
            work.wait()
        return self.received


def exchange(values: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[list[int]]:
    """Return every rank's small list of integers (of one length), by rank: one collective, for which the host waits once."""
    if group is None:
        return [list(values)]
    own = torch.tensor(list(values), dtype=torch.int64, device=device)
    gathered = own.new_empty(dist.get_world_size(group) * len(own))
    ALL_GATHER(gathered, own, group=group)
    return gathered.view(-1, len(own)).tolist()
