"""A cost model of the communication of a loss, call by call, by which `communication: auto` chooses.

One term of a loss has a forward and a backward pass. In each, columns travel with the tensors that belong to them (`Pass.out`),
and the ranks' results for them return to their owner (`Pass.home`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Literal

Scheme = Literal["ring", "hierarchical", "gather"]
Kind = Literal["move", "all_gather", "all_to_all", "reduce_scatter", "all_reduce"]
SCHEMES: tuple[Scheme, ...] = ("ring", "hierarchical", "gather")  # by the memory that they need, ascending
COPIES = 3  # of gathered columns at a time: themselves, their gradients, and the gradients while they are sent
GATHERED = 256 * 2**20  # the most bytes of them for which "auto" gathers from all ranks
OPERATIONS = 8  # multiplications and additions per score and dimension: 2 forward, 6 backward


@dataclass(frozen=True)
class Link:
    """One direction of a device's connection to others.

    Attributes:
        latency: seconds until the first byte of a message arrives.
        bandwidth: bytes per second.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """The properties of a machine from which the time of a step is computed.

    Attributes:
        within, between: links of a device to those of its node, and to other nodes.
        call: seconds to start a call. block: seconds for the host to start the kernels of one block of columns, forward and
            backward.
        products: FLOP/s of a loss, including its other operations.
        overlaps: whether messages of a ring travel, and kernels are started, while the device multiplies.
        scatter: bytes that a reduce-scatter sends, relative to the least possible: gloo's is an all-reduce.
    """

    within: Link
    between: Link
    call: float
    block: float
    products: float
    overlaps: bool
    scatter: float = 1.0


# by the type of device; docs/scale.md says where each number comes from
MACHINES = {
    "cuda": Machine(Link(2e-6, 300e9), Link(5e-6, 25e9), 10e-6, 1e-3, 2e14, overlaps=True),
    "cpu": Machine(Link(100e-6, 1e9), Link(100e-6, 1e9), 100e-6, 1e-3, 5e10, overlaps=False, scatter=2.0),
}


@dataclass(frozen=True)
class Pass:
    """The bytes per row of each tensor that travels: `out` with the columns, `home` of vectors and of matrices (gradients)."""

    out: tuple[int, ...]
    home: tuple[int, ...] = ()
    home_matrices: tuple[int, ...] = ()


def passes(
    width: int, element: int = 4, reductions: int = 1, counted: bool = True, both: bool = True, learning: bool = True
) -> tuple[Pass, Pass]:
    """Return the forward and the backward pass of two fields' rows [n, width] with one scale.

    Args:
        element: bytes of a number of the embeddings; statistics have 4, or 8 beside float64.
        reductions: of the objective and its signals.
        counted: whether there are group ids, with which the negatives of each column are counted.
        both: compute both directions in one pass. learning: compute the columns' gradient.
    """
    number = max(element, 4)
    columns = (number,) * reductions if both else ()
    forward = Pass((width * element, 8), ((8,) if counted and both else ()) + columns)
    return forward, Pass((width * element, 8, *columns, *columns), (), (width * number,) if learning else ())


@dataclass(frozen=True)
class Calls:
    """A sequence of equal calls of one kind.

    Attributes:
        ranks: that take part in each. nodes: that these ranks are on.
        tensors: messages that a rank sends in each; 1 for collectives.
        sent: bytes that a rank sends in all of them.
    """

    kind: Kind
    ranks: int
    nodes: int
    count: int
    tensors: int
    sent: int

    @property
    def messages(self) -> int:
        """Return the messages of a rank in all calls: a collective of W ranks is W − 1 of them."""
        return self.count * (self.tensors if self.kind == "move" else self.ranks - 1)

    def seconds(self, machine: Machine) -> float:
        """Return the time without other work. A ring that crosses nodes waits for the link between them at every step;
        collectives use the links of all devices of a node at once."""
        link, bytes = (machine.between if self.nodes > 1 else machine.within), float(self.sent)
        latency = self.count * machine.call
        if self.kind == "move":
            return latency + self.count * link.latency + bytes / link.bandwidth  # the tensors of a call are sent together
        if self.kind == "reduce_scatter":
            bytes *= machine.scatter
        rounds = 2 * ceil(log2(self.ranks)) if self.kind == "all_reduce" else self.ranks - 1
        others = self.ranks - self.ranks // self.nodes if self.kind == "all_to_all" else self.nodes - 1
        across = bytes * others / max(self.ranks - 1, 1)
        if self.kind == "all_reduce":  # a node's bytes leave it once, through all of its links
            across = bytes * self.nodes / self.ranks
        slowest = max(bytes / machine.within.bandwidth, across / machine.between.bandwidth if self.nodes > 1 else 0.0)
        return latency + self.count * rounds * link.latency + slowest


def loss_calls(scheme: Scheme, nodes: int, within: int, rows: int, both_passes: Sequence[Pass]) -> list[Calls]:
    """Return all calls of a term of a loss, forward and backward, on `nodes` of `within` ranks with `rows` columns each."""
    ranks = nodes * within
    calls: list[Calls] = []
    for pass_ in both_passes:
        home = (*pass_.home, *pass_.home_matrices)
        if scheme != "gather":
            length = ranks if scheme == "ring" else nodes
            moves = [(length - 1, pass_.out), (length if length > 1 else 0, home)]
            calls += [
                Calls("move", length, nodes, count, len(tensors), count * rows * sum(tensors))
                for count, tensors in moves
                if count and tensors
            ]
        if scheme != "ring":
            times, members, across = (nodes, within, 1) if scheme == "hierarchical" else (1, ranks, nodes)
            kinds: list[tuple[Kind, tuple[int, ...]]] = [
                ("all_gather", pass_.out), ("all_to_all", pass_.home), ("reduce_scatter", pass_.home_matrices)
            ]  # fmt: skip
            calls += [
                Calls(kind, members, across, times * len(tensors), 1, times * (members - 1) * rows * sum(tensors))
                for kind, tensors in kinds
                if tensors
            ]
    return calls


def gathered_bytes(scheme: Scheme, nodes: int, within: int, rows: int, width: int) -> int:
    """Return the bytes of other ranks' columns that a rank holds, in fp32, if all ranks have equally many: travelling blocks
    and gradients, and gathered columns."""
    block = 4 * rows * width
    blocks = {
        "ring": 5 * (nodes * within > 1),
        "hierarchical": 3 * (nodes > 1) + COPIES * within,
        "gather": COPIES * nodes * within,
    }
    return block * blocks[scheme]


def products_seconds(rows: int, columns: int, width: int, machine: Machine) -> float:
    """Return the seconds of a rank's products of one term, forward and backward, of its rows with all ranks' columns."""
    return OPERATIONS * rows * columns * width / machine.products


def blocks_of(scheme: Scheme, nodes: int, within: int) -> int:
    """Return the number of blocks in which a rank sees all columns."""
    return {"ring": nodes * within, "hierarchical": nodes, "gather": 1}[scheme]


def waiting_seconds(calls: Sequence[Calls], blocks: int, products: float, machine: Machine) -> float:
    """Return the seconds that a scheme adds to a loss's products: its calls, and the start of further blocks. A ring hides its
    messages behind the computation of tiles; collectives do not."""
    moving = sum(call.seconds(machine) for call in calls if call.kind == "move")
    starting = (blocks - 1) * machine.block
    if machine.overlaps:
        moving = max(0.0, moving - products * (blocks - 1) / blocks)
        starting = max(0.0, starting - products)
    between = sum(call.seconds(machine) for call in calls if call.kind != "move")
    return (max(moving, starting) if machine.overlaps else moving + starting) + between


def cheapest(nodes: int, within: int, rows: int, width: int, machine: Machine, element: int = 4) -> Scheme:
    """Return the scheme that adds the least time to a loss's products; of equal ones the one that needs the least memory."""
    products = products_seconds(rows, rows * nodes * within, width, machine)
    possible: list[Scheme] = ["ring"]
    possible += ["hierarchical"] if nodes > 1 and within > 1 else []
    possible += ["gather"] if gathered_bytes("gather", nodes, within, rows, width) <= GATHERED else []

    def waiting(scheme: Scheme) -> float:
        calls = loss_calls(scheme, nodes, within, rows, passes(width, element))
        return waiting_seconds(calls, blocks_of(scheme, nodes, within), products, machine)

    return min(possible, key=waiting)


def with_links(machine: Machine, within: Link | None = None, between: Link | None = None) -> Machine:
    """Return a machine with other links."""
    return replace(machine, within=within or machine.within, between=between or machine.between)
