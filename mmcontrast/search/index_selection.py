"""Choose the kind of a field's index: exact while that is fast, a graph while it fits, codes beyond."""

import math
import os
from dataclasses import dataclass

from mmcontrast.errors import UserError

GIB = 2**30
FLAT_ROWS = 50_000  # up to here an exact search takes milliseconds
NEIGHBOURS = 32  # links of a row in the graph; the lowest level has twice as many
LEAST_PQ_ROWS = 256  # a code book has as many entries
KINDS = ("flat", "ivf_pq", "hnsw")


@dataclass(frozen=True)
class IndexPlan:
    """The chosen kind of an index.

    Attributes:
        kind: "flat" (exact), "hnsw" (arXiv:1603.09320) or "ivf_pq" (Jégou et al., doi:10.1109/TPAMI.2010.57).
        factory: the string for `faiss.index_factory` (np: codes are not permuted for Hamming distances, which takes long).
        search: parameters of search for `faiss.ParameterSpace`, from fast to thorough: the first with enough recall is kept.
        train_rows: rows of the sample that trains it; 0: nothing to train.
        bytes: in memory, approximately.
        reason: a sentence.
    """

    kind: str
    factory: str
    search: tuple[str, ...]
    train_rows: int
    bytes: int
    reason: str


def plan_index(rows: int, dim: int, kind: str = "auto", memory: int | None = None, exact: bool = False) -> IndexPlan:
    """Choose the kind of an index.

    Args:
        rows, dim: N and D of the field's vectors.
        kind: one of `KINDS`, or "auto".
        memory: bytes that an index may take; default: half of the machine's.
        exact: scores are hyperbolic: graphs and codes do not support that a query's time has another sign than a row's.

    Raises:
        UserError: for an unknown kind; for a graph or codes of hyperbolic scores; for codes of too few rows to learn them from.
    """
    if kind not in ("auto", *KINDS):
        raise UserError(f"--kind {kind!r}: auto, or one of {', '.join(KINDS)}")
    limit, limit_name = memory or machine_memory() // 2, "--memory" if memory else "half of this machine's memory"
    chosen, reason = kind, "asked for by --kind"
    if exact and kind not in ("auto", "flat"):
        raise UserError(f"--kind {kind}: the table's scores are hyperbolic, which are searched exactly alone: --kind flat")
    if exact:
        chosen, reason = "flat", "hyperbolic scores are searched exactly"
    elif kind == "auto":
        flat_bytes, graph_bytes = _flat_bytes(rows, dim), _graph_bytes(rows, dim)
        if rows <= FLAT_ROWS and (flat_bytes <= limit or rows < LEAST_PQ_ROWS):
            chosen, reason = "flat", f"{rows:,} rows, up to {FLAT_ROWS:,}, are searched exactly in milliseconds"
        elif graph_bytes <= limit:
            problem = f"{rows:,} rows are many for an exact search"
            chosen, reason = "hnsw", f"{problem}, and a graph of {_size(graph_bytes)} fits in {_size(limit)}, {limit_name}"
        else:
            problem = f"a graph of {rows:,} rows takes {_size(graph_bytes)}, more than {_size(limit)}, {limit_name}"
            chosen, reason = "ivf_pq", f"{problem}: codes, whose best are scored again from the table"
    if chosen == "flat":
        return IndexPlan("flat", "IDMap,Flat", ("",), 0, _flat_bytes(rows, dim), reason)
    if chosen == "hnsw":
        efforts = tuple(f"efSearch={candidates}" for candidates in (64, 128, 256, 512))
        return IndexPlan("hnsw", f"IDMap,HNSW{NEIGHBOURS}", efforts, 0, _graph_bytes(rows, dim), reason)
    if rows < LEAST_PQ_ROWS:
        raise UserError(
            f"--kind ivf_pq: {rows} rows are too few to learn codes from, {LEAST_PQ_ROWS} at least; --kind flat is exact"
        )
    lists = 2 ** round(math.log2(max(1.0, min(4 * math.sqrt(rows), rows / 39))))
    codes = next(number for number in range(max(1, dim // 4), 0, -1) if dim % number == 0)  # bytes a row
    factory, size = f"IDMap,IVF{lists},PQ{codes}np", rows * (codes + 16) + 4 * dim * (lists + 256)
    efforts = tuple(f"nprobe={max(1, lists // share)}" for share in (64, 32, 16, 8, 4, 2))
    return IndexPlan("ivf_pq", factory, tuple(dict.fromkeys(efforts)), min(rows, max(64 * lists, 65_536)), size, reason)


def _flat_bytes(rows: int, dim: int) -> int:
    return rows * (4 * dim + 8)


def _graph_bytes(rows: int, dim: int) -> int:
    return rows * (4 * dim + 8 + 4 * (2 * NEIGHBOURS + 4))


def _size(number: int) -> str:
    return f"{number / GIB:.2g} GiB" if number >= GIB / 10 else f"{number / 2**20:.2g} MiB"


def machine_memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
