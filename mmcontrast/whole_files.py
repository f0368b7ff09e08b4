"""Writes files that appear when they are whole, from any number of processes and machines."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from mmcontrast.strict_json import dumps


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears when it is whole. Several processes may do so, each with the same bytes.

    Args:
        write: writes the file that it is given.

    Raises:
        OSError: if it cannot be written; nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except FileNotFoundError:  # another process has finished the same work, and removed partial files
        if not path.exists():
            raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a text that appears when it is whole, as UTF-8."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", errors=errors))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that appears when it is whole; NaN and infinity are null."""
    write_text(path, dumps(content, indent=1))
