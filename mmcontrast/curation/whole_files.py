"""Writes files that appear when they are whole, from any number of processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from mmcontrast.strict_json import dumps

GROUP_ROWS = 65_536  # of a table: those that are read together


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears when it is whole. Several processes, and machines, may do so, each with the same bytes."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except FileNotFoundError:  # another process has completed the selection, and removed partial files
        if not path.exists():
            raise
    finally:
        partial.unlink(missing_ok=True)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that appears when it is whole."""
    write_whole(path, lambda partial: pq.write_table(table, partial, row_group_size=GROUP_ROWS))


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON that appears when it is whole."""
    write_whole(path, lambda partial: partial.write_text(dumps(content, indent=1), encoding="utf-8"))
