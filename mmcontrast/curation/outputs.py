"""Writes the outputs of stages of embedding tables: one Parquet file that appears whole, a summary, and a page."""

import hashlib
import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcontrast.components import suggestion
from mmcontrast.data.page import page
from mmcontrast.data.row_ids import SUMMARY
from mmcontrast.errors import UserError
from mmcontrast.file_lock import lock_file
from mmcontrast.search.table import StoredTable
from mmcontrast.strict_json import dumps
from mmcontrast.whole_files import write_json, write_text, write_whole

ROWS_AT_ONCE = 65_536  # of a table: those that are read together

SUFFIX = ".parquet"
ABOUT = ("model", "checkpoint", "precision", "data", "row_ids")  # of a table's manifest
TEXTS = ("caption", "text", "title", "name")  # entries of a sample's json that a page shows


def summary_file(out: Path) -> Path:
    return out.with_name(f"{out.stem}.summary.json")


def report_file(out: Path) -> Path:
    return out.with_name(f"{out.stem}.report.html")


def check_out(out: Path) -> None:
    """Check the name of an output.

    Raises:
        UserError: for a name that is no Parquet file's, or a file that exists.
    """
    if out.suffix != SUFFIX:
        raise UserError(f"{out}: the output is one Parquet file: name it {out.with_suffix(SUFFIX).name}")
    if out.exists():
        raise UserError(f"{out} exists: remove it, or choose another file")


def open_stored(folder: Path, fields: Mapping[str, str]) -> StoredTable:
    """Open an embedding table.

    Args:
        fields: by the option that names it, a field that some rows must have.

    Raises:
        UserError: if it is damaged, lacks a field, holds a sample twice, or is of a hyperbolic model.
    """
    table = StoredTable(folder)
    if table.distances is not None:
        raise UserError(f"{folder} is of a hyperbolic model: its tangent vectors have no cosines, by which this stage compares")
    for option, field in fields.items():
        if field not in table.fields:
            raise UserError(f"{option} {field}: {folder} has none of this name; {suggestion(field, table.fields)}")
        if not len(table.present(field)):
            raise UserError(f"{option} {field}: no row of {folder} has it")
    return table


def ids_of_table(table: StoredTable) -> np.ndarray:
    """Return the sample ids of all rows, int64 [N].

    Raises:
        UserError: if two rows have the same.
    """
    ids = table.ids("sample_id")
    ordered = np.argsort(ids, kind="stable")
    repeats = np.flatnonzero(np.diff(ids[ordered]) == 0)
    if len(repeats):
        first, second = ordered[repeats[0]], ordered[repeats[0] + 1]
        raise UserError(
            f"{table.folder}: rows {first} ({table.about(int(first))[0]!r}) and {second} ({table.about(int(second))[0]!r}) have"
            f" one sample_id, {ids[first]}: a sample_id is one sample's; what several are about is a group_id"
        )
    return ids


def about_table(table: StoredTable) -> dict[str, Any]:
    """Return what identifies a table: its folder's name, digest and rows, its model and data."""
    origin = {name: table.manifest[name] for name in ABOUT if name in table.manifest}
    digest = hashlib.blake2b(table.digest.encode(), digest_size=8)
    for column in ("sample_id", "group_id"):
        digest.update(np.ascontiguousarray(table.ids(column)).data)
    return {"name": table.folder.resolve().name, "digest": digest.hexdigest(), "rows": len(table)} | origin


@contextmanager
def parquet_file(out: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Open a Parquet file under a temporary name, which becomes `out` at the end.

    Raises:
        UserError: if it cannot be written.
    """
    partial = out.with_name(f".{out.name}.{uuid4().hex}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, schema) as writer:
            yield writer
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other processes from making the same output within it, by a lock beside it.

    Raises:
        UserError: if another one does, or the folder cannot be written.
    """
    file = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    with lock:
        if not lock_file(lock, wait=False):
            raise UserError(f"another process makes {out}: wait for its end; one alone does, also under torchrun")
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def finish(out: Path, writer: pq.ParquetWriter, summary: dict[str, Any], sections: Iterable[str]) -> None:
    """Write the summary into the file's metadata and beside it, and the page beside it."""
    writer.add_key_value_metadata({SUMMARY: dumps(summary).encode()})
    write_json(summary_file(out), summary)
    write_text(report_file(out), page(f"{summary['stage']}: {summary['table']['name']}", sections))


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that appears when it is whole."""
    write_whole(path, lambda partial: pq.write_table(table, partial, row_group_size=ROWS_AT_ONCE))


def counts_table(title: str, rows: Mapping[str, Any]) -> str:
    """Return a section of a page with numbers and their names."""
    cells = (f"<tr><td>{html.escape(str(name))}</td><td>{_format(value)}</td></tr>" for name, value in rows.items())
    return f"<h2>{html.escape(title)}</h2><table>{''.join(cells)}</table>"


def _format(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def sample_cell(table: StoredTable, row: int, note: str = "", kind: str = "item") -> str:
    """Return a row of the table as a part of a page: its key, a text of its metadata, and a note."""
    key, metadata = table.about(row)
    texts = [str(metadata[name])[:120] for name in TEXTS if metadata.get(name)]
    lines = [html.escape(key), *map(html.escape, texts[:1]), *([f"<small>{html.escape(note)}</small>"] if note else [])]
    return f'<div class="{kind}">{"<br>".join(lines)}</div>'


def spread(number: int, total: int) -> Sequence[int]:
    """Return up to so many of 0 … total − 1, evenly spread."""
    return np.unique(np.linspace(0, total - 1, min(number, total)).astype(np.int64)).tolist() if total else []
