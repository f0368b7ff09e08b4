"""Makes and opens the Arrow files of a table: those of a Hugging Face dataset, or a copy of a Parquet or CSV file."""

import csv
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mmcontrast.data.column_types import plain_type
from mmcontrast.data.files import open_file
from mmcontrast.data.range_cache import cache_root
from mmcontrast.errors import UserError

STATE = "state.json"  # of a Hugging Face dataset
ROWS = 1024  # of a batch of the copy
CSV_BLOCK = 2**24  # bytes that are parsed at a time: no row is longer
VERSION = 3  # of the copies
UNUSED = 86_400  # seconds after which a copy of a file that has changed goes: another machine may have its own such file


def open_mapped(arrow: Sequence[Path]) -> pa.Table:
    """Return the table that lies in Arrow files, mapped into memory."""
    return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in arrow])


def dataset_files(path: Path) -> tuple[tuple[Path, ...], str]:
    """Return the Arrow files that `datasets.Dataset.save_to_disk` wrote, and their digest.

    Raises:
        UserError: if the dataset is a selection of rows.
    """
    state = json.loads((path / STATE).read_text())
    if state.get("_indices_files"):
        raise UserError(f"{path}: the dataset is a selection of rows; save it after `flatten_indices()`")
    arrow = tuple(path / Path(entry["filename"]).name for entry in state["_data_files"])
    version = f"{state['_fingerprint']} {[file.stat().st_size for file in arrow]}"
    return arrow, hashlib.blake2b(version.encode(), digest_size=8).hexdigest()


def copy_of_file(path: Path) -> tuple[tuple[Path, ...], str, list[str]]:
    """Return the Arrow copy of a Parquet or CSV file, the digest of its bytes, and the columns of numbers. Any number of
    processes may make it at once.

    Raises:
        UserError: if it cannot be written.
    """
    path_hash = hashlib.blake2b(str(path.absolute()).encode(), digest_size=12).hexdigest()
    version = hashlib.blake2b(f"{VERSION} {open_file(str(path)).fingerprint}".encode(), digest_size=6).hexdigest()
    folder = cache_root() / "tables"
    copy, digest_file = folder / f"{path_hash}-{version}.arrow", folder / f"{path_hash}-{version}.digest"
    try:
        open_mapped([copy])
        with suppress(OSError):
            for file in (copy, digest_file):
                os.utime(file)  # it is in use
        digest, *numbers = digest_file.read_text().split("\n")
        return (copy,), digest, [json.loads(name) for name in numbers]
    except (OSError, ValueError, pa.ArrowException):
        pass  # not there, or torn by a crash
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = _write_atomically(copy, lambda partial: _convert(path, partial))
        numbers = [] if path.suffix.lower() == ".parquet" else _number_columns(open_mapped([copy]))
        text = "\n".join([digest, *map(json.dumps, numbers)])
        _write_atomically(digest_file, lambda partial: partial.write_text(text))
        for outdated in {*folder.glob(f"{path_hash}-*")} - {copy, digest_file}:  # of the file before it changed
            with suppress(OSError):  # another process was faster; it is another user's
                if not outdated.name.endswith(".partial") and time.time() - outdated.stat().st_mtime > UNUSED:
                    outdated.unlink()
    except OSError as error:
        if error.errno is None:  # Arrow's, about what it reads
            raise ValueError(str(error)) from error
        raise UserError(f"{path}: no Arrow copy of it can be written to {folder} ({error.strerror})") from error
    return (copy,), digest, numbers


def _write_atomically(target: Path, write: Callable[[Path], object]) -> str:
    """Write a file under a temporary name first, and return its digest."""
    partial = target.with_name(f"{target.name}-{uuid4().hex}.partial")
    try:
        write(partial)
        with partial.open("rb") as written:
            digest = hashlib.file_digest(written, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def _convert(path: Path, target: Path) -> None:
    """Write a Parquet or CSV file as Arrow, its columns with plain types."""
    batches: Iterable[pa.RecordBatch]
    if path.suffix.lower() == ".parquet":
        file = pq.ParquetFile(path)
        schema, batches = file.schema_arrow, file.iter_batches(ROWS)
    else:
        schema, batches = _read_csv(path)
    target_schema = pa.schema([field.with_type(plain_type(field.type)) for field in schema], schema.metadata)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, target_schema) as writer:
        for batch in batches:
            writer.write_batch(batch if target_schema.equals(schema) else batch.cast(target_schema))


def _read_csv(path: Path) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    """Return the schema and the batches of a CSV file: all cells as text, just as they stand; an empty cell is null.
    Names of columns lose spaces around them.

    Raises:
        UserError: if it is not UTF-8, or a quote is never closed.
    """
    with path.open("rb") as file:
        start = file.read(2**16)
    not_utf8 = UserError(f"{path} is not UTF-8: save it as that (in Excel: CSV UTF-8)")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise not_utf8
    delimiter = _delimiter(path, start)
    quoted = _has_quoted_cells(path, delimiter)
    parse_options = pyarrow.csv.ParseOptions(
        delimiter=delimiter, newlines_in_values=quoted, quote_char='"' if quoted else False
    )
    read_options = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK)

    def open_reader(**types: Any) -> pyarrow.csv.CSVStreamingReader:
        convert_options = pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True, **types)
        return pyarrow.csv.open_csv(
            path, read_options=read_options, parse_options=parse_options, convert_options=convert_options
        )

    def batches() -> Iterable[pa.RecordBatch]:
        try:
            for batch in reader:
                yield batch.rename_columns(stripped.names)
        except pa.ArrowInvalid as error:
            raise not_utf8 if "UTF8" in str(error) else error from error

    names = open_reader().schema.names
    try:
        reader = open_reader(column_types={name: pa.string() for name in names})
    except pa.ArrowInvalid as error:
        raise not_utf8 if "UTF8" in str(error) else error from error
    stripped = pa.schema([field.with_name(field.name.strip()) for field in reader.schema])
    return stripped, batches()


def _has_quoted_cells(path: Path, delimiter: str) -> bool:
    """Return whether quotes enclose cells, as CSV has it; tabs may separate plain text, in which a quote is a quote.

    Raises:
        UserError: for a CSV in which they do not, of which pyarrow would read several lines as one text.
    """
    with path.open("rb") as file:
        if not any(b'"' in block for block in iter(lambda: file.read(CSV_BLOCK), b"")):
            return True
    csv.field_size_limit(2**31 - 1)
    last = 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for _ in reader:
                last = reader.line_num
        except csv.Error as error:
            if path.suffix.lower() == ".tsv":
                return False
            if "unexpected end of data" in str(error):
                raise UserError(
                    f"{path}: a quote that opens in line {last + 1} is never closed: close it, or double it"
                ) from error
            raise UserError(
                f"{path}: a cell that begins with a quote in line {last + 1} goes on after the next quote ({error}): enclose"
                " the whole cell in quotes, and double those within it"
            ) from error
    return True


def _delimiter(path: Path, start: bytes) -> str:
    """Return what separates the columns: a comma, or what the header has in its place, as Excel writes in many countries."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = re.sub(r'"[^"]*"', "", start.decode("utf-8", "replace")).splitlines()[:1]
    return next((mark for mark in ",;\t" if mark in "".join(header)), ",")


def _number_columns(table: pa.Table) -> list[str]:
    """Return the columns all of whose texts are numbers just as Python prints them, so that nothing is lost: not 007, 1.50 or
    1e5."""

    def all_numbers(column: pa.ChunkedArray) -> bool:
        return all(text is None or parse_number(text) is not text for chunk in column.chunks for text in chunk.to_pylist())

    columns = zip(table.column_names, table.columns, strict=True)
    return [name for name, column in columns if column.null_count < len(table) and all_numbers(column)]


def parse_number(text: str) -> Any:
    """Return the number that Python prints so; the text itself if there is none."""
    if len(text) < 26 and text[-1:].isdigit() and text.isascii():
        for kind in (int, float):
            try:
                if str(number := kind(text)) == text and -(2**63) <= number < 2**63:
                    return number
            except ValueError:
                pass
    return text
