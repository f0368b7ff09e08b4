"""Defines a stage, by which a selection is made: it measures the samples of one shard at a time, and judges them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import FILE_COLUMNS

PRIVATE = "_"  # begins the names of columns that the first pass leaves for the second
Decisions = Any


@dataclass(frozen=True)
class Judgement:
    """The samples that a stage drops and why, with numbers for its summary.

    Attributes:
        reasons: [n] why a sample is dropped; None: it is kept.
        kinds: [n] the name of each reason in the summary; default: the reason itself.
    """

    reasons: Sequence[str | None]
    counts: dict[str, int] = field(default_factory=dict)
    kinds: Sequence[str | None] | None = None


class Stage(ABC):
    """One kind of stage, with its options. It is sent to worker processes: large files are opened there.

    Attributes:
        name: its command: `mmcontrast data NAME`.
        version: of the tables that it writes.
        two_passes: all shards must be measured before one is judged.
        files, file_columns: of tables, as `open_table`.
    """

    name: str
    version = 1
    two_passes = False
    files: str | None = None

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return the options on which the tables depend, as JSON has them."""

    @property
    def file_columns(self) -> frozenset[str]:
        return FILE_COLUMNS

    @abstractmethod
    def measure(self, shard: ShardIndex, rows: np.ndarray, previous: pa.Table | None) -> pa.Table:
        """Return [n] measures of some rows of a shard.

        Args:
            previous: the measures of these rows in the selection that this one continues.
        """

    def decide(self, tables: Iterator[pa.Table]) -> Decisions:
        """Return what judging one shard needs to know of all, from the measures of all shards. Of stages of two passes."""
        return None

    @abstractmethod
    def judge(self, measured: pa.Table, decisions: Decisions, number: int) -> Judgement:
        """Judge the samples of one shard by their measures.

        Args:
            number: of the shard among all.
        """

    def summary(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Return further entries of summary.json, from the counts of all judgements, added up."""
        return {"counts": dict(counts)} if counts else {}
