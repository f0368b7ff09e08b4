"""Tables as shards: a sample is a row, its members are columns. Parquet, CSV, and Hugging Face datasets on a disk.

Rows are read at random from memory-mapped Arrow files. A Hugging Face dataset is one; of a Parquet or CSV file, which only
give up their rows in large groups, an Arrow copy is made once in the cache folder.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from mmcontrast.data.files import is_remote, open_file
from mmcontrast.data.parts import ShardPart
from mmcontrast.data.range_cache import cache_root
from mmcontrast.data.shard import Keys, ShardIndex, member_of
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality

STATE = "state.json"  # of a Hugging Face dataset
SUFFIXES = (".parquet", ".csv", ".tsv")
FILE_COLUMNS = frozenset({*ImageModality.extensions, *AudioModality.extensions, "filepath"})
ROWS = 1024  # of a batch of the copy
CSV_BLOCK = 2**24  # bytes that are parsed at a time: no row is longer
LONG_LIST = 64  # numbers: a longer list is a vector, not metadata
CHECKED_ROWS = 5_000_000  # of tables, whose sample ids are compared when they are opened
VERSION = 2  # of the copies
Types = pa.types


class RowKeys(Sequence[str]):
    """Names of rows without names: the table's and the row's number, from 0 on."""

    def __init__(self, table: str, rows: int) -> None:
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # one at a time
        if not 0 <= row < self.rows:
            raise IndexError(row)
        return f"{self.table}-{row}"


@dataclass(frozen=True)
class TableIndex(ShardIndex):
    """A memory-mapped table. `json` of a row is all of it that JSON can hold: numbers, texts, truth values, times, short lists,
    structures. So `sample_id`, `group_id` and labels are columns. A column `json` adds what it holds.

    Columns hold bytes, texts, {bytes, path} as Hugging Face's pictures and sounds do, lists of texts (joined by lines), lists
    of numbers (as .npy), or paths.

    Attributes:
        arrow: the files that hold it.
        file_columns: columns whose texts are paths, within `folder` and nowhere else.
        numbers: columns of texts, all of which are numbers as Python prints them: numbers in the metadata.
    """

    arrow: tuple[Path, ...]
    file_columns: frozenset[str]
    folder: Path
    numbers: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:  # another process maps the files itself
        return {key: value for key, value in self.__dict__.items() if key != "table"}

    @cached_property
    def table(self) -> pa.Table:
        return _mapped(self.arrow)

    @cached_property
    def _sizes(self) -> dict[str, np.ndarray]:
        return {}

    def sizes_of(self, extension: str) -> np.ndarray:
        if extension not in self._sizes:  # an order by length asks in every window
            self._sizes[extension] = self._measured(extension)
        return self._sizes[extension]

    def _measured(self, extension: str) -> np.ndarray:
        if extension == "json" or extension in self.file_columns:
            return np.array([self.size(row, extension) for row in range(len(self))], dtype=np.int64)
        column = self._column(extension)
        if Types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if _is_text(column.type) or _is_binary(column.type):
            lengths = pc.binary_length(column)
        else:
            lengths = pc.if_else(pc.is_valid(column), pa.scalar(8, pa.int64()), pa.scalar(None, pa.int64()))
        return pc.fill_null(lengths.cast(pa.int64()), -1).to_numpy()

    def has(self, extension: str) -> np.ndarray:
        if extension == "json":
            return np.ones(len(self), dtype=bool)
        column = self._column(extension)
        there = pc.is_valid(column)
        if Types.is_struct(column.type) and {"bytes", "path"} & {inner.name for inner in column.type}:
            inner = [pc.is_valid(pc.struct_field(column, f)) for f in ("bytes", "path") if column.type.get_field_index(f) >= 0]
            there = pc.and_(there, pc.or_(inner[0], inner[-1]))
        return np.asarray(there.to_numpy(zero_copy_only=False), dtype=bool)

    def identity(self, sample: int) -> str:
        return str(sample)  # a column of keys may hold one several times

    def describe(self, sample: int, extension: str = "") -> str:
        words = f"row {sample}, {super().describe(sample, extension)}"
        if extension in self.file_columns and extension in self.extensions:
            value = self.table[extension][sample].as_py()
            words += f" ({value})" if isinstance(value, str) else ""
        return words

    def _column(self, name: str) -> pa.ChunkedArray:
        column = self.table[name]
        return column if (plain := _plain(column.type)) == column.type else column.cast(plain)

    def size(self, sample: int, extension: str) -> int:
        if extension == "json":
            return 0
        value = self.table[extension][sample]
        if pa.types.is_struct(value.type):
            data, path = (value.get(name) if value.is_valid and name in value else None for name in ("bytes", "path"))
            value = data if data is not None and data.is_valid else path
            named = value is path
        else:
            named = extension in self.file_columns and isinstance(value.as_py(), str)
        if value is None or not value.is_valid:
            return -1
        if named:
            try:
                return self._file(value.as_py()).stat().st_size
            except (OSError, ValueError, RuntimeError, DecodeError):
                return 0  # said when it is read
        return value.as_buffer().size if hasattr(value, "as_buffer") else 8

    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        """
        Raises:
            DecodeError: for a value that cannot be read, or a file that is not there.
        """
        try:
            return self._read(sample, extensions)
        except (ValueError, TypeError, KeyError, RuntimeError, OSError, pa.ArrowException) as error:
            raise DecodeError(f"row {sample} cannot be read ({error})") from error

    def _read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        members = {}
        for extension in extensions:
            if extension == "json":
                members["json"] = json.dumps(self._metadata(sample), default=_json).encode()
            elif extension in self.extensions:
                value = self.table[extension][sample].as_py()
                if (data := self._bytes(value, extension in self.file_columns)) is not None:
                    members[extension] = data
        return members

    def _metadata(self, sample: int) -> dict[str, Any]:
        found = {}
        for name in self._described:
            value = _value(self.table[name][sample])
            if value is not None:
                found[name] = _number(value) if name in self.numbers else value
        if "json" in self.table.column_names and (value := self.table["json"][sample].as_py()) is not None:
            about = value if isinstance(value, dict) else json.loads(value)
            if not isinstance(about, dict):
                raise DecodeError(f"column json: a JSON {type(about).__name__}, not an object")
            found |= {name: entry for name, entry in about.items() if entry is not None}
        return found

    @cached_property
    def _described(self) -> list[str]:
        return [name for name in self.table.column_names if name != "json" and _is_metadata(self.table[name])]

    @property
    def undescribed(self) -> list[str]:
        """Columns that are no metadata: bytes, and long lists of numbers."""
        return [name for name in self.table.column_names if name not in {*self._described, "json"}]

    def _bytes(self, value: Any, named: bool) -> bytes | None:
        if isinstance(value, dict):
            if not {"bytes", "path"} & value.keys():
                entries = ", ".join(f"json:COLUMN.{name}" for name in list(value)[:3])
                raise DecodeError(f"a structure, not a member: name one of its entries as a key ({entries})")
            named = value.get("bytes") is None
            value = value.get("path") if named else value["bytes"]
        if value is None or isinstance(value, bytes):
            return value
        if named and isinstance(value, str):
            path = self._file(value)
            try:
                return path.read_bytes()
            except OSError as error:
                raise DecodeError(f"{path} cannot be read: {error.strerror}") from error
        return member_of(value)

    def _file(self, name: str) -> Path:
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise DecodeError(f"{path} is not in {self.folder}: set `files` of this source to its folder")
        return path


def is_table(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) or (not is_remote(name) and (Path(name) / STATE).exists())


def open_table(name: str, file_columns: Collection[str] = FILE_COLUMNS, files: str | None = None) -> TableIndex:
    """
    Args:
        files: the folder in which the paths of `file_columns` are; default: the table's own.

    Raises:
        UserError: if it cannot be read.
    """
    if is_remote(name):
        raise UserError(f"{name}: tables are read from a disk; copy it first")
    path = Path(name)
    try:
        arrow, digest, numbers = (*_dataset(path), []) if path.is_dir() else _copied(path)
        table = _mapped(arrow)
        if path.is_dir():
            table.validate(full=True)  # somebody else wrote it: an offset that points astray would end the process
        keys = _keys(table, path.name if path.is_dir() else path.stem)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} cannot be read as a table ({' '.join(str(error).split())[:300]})") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise UserError(f"{name}: two columns have one name, among {', '.join(table.column_names)}")
    columns = tuple(column for column in table.column_names if column != "json")
    folder = Path(files) if files else path.parent if path.is_file() else path
    return TableIndex(name, keys, (*columns, "json"), digest, arrow, frozenset(file_columns), folder, frozenset(numbers))


def refuse_repeated_ids(shards: Iterable[ShardIndex]) -> None:
    """
    Args:
        shards: of any kind, of which tables are looked at, and selected rows of tables.

    Raises:
        UserError: if a sample_id is that of two rows. Not looked for in more rows than can be compared in a second or so.
    """
    tables = list({shard.name: shard for shard in shards if "sample_id" in shard.extensions and _table_of(shard)}.values())
    if not tables or sum(map(len, tables)) > CHECKED_ROWS:
        return
    try:
        columns = [_ids_of(shard) for shard in tables]
    except pa.ArrowException:
        return  # no ids: said of each sample when it is read
    column = pa.chunked_array([chunk for one in columns for chunk in one.chunks], pa.large_string())
    given = pc.drop_null(column)
    if pc.count_distinct(given).as_py() == len(given):
        return
    counts = pc.value_counts(given).to_pylist()
    value = next(entry["values"] for entry in counts if entry["counts"] > 1 and entry["values"])
    rows = pc.indices_nonzero(pc.fill_null(pc.equal(column, value), False)).to_pylist()[:2]
    starts = np.cumsum([0, *map(len, tables)])
    numbers = [int(np.searchsorted(starts, row, side="right")) - 1 for row in rows]
    places = [(tables[k], row - int(starts[k])) for k, row in zip(numbers, rows, strict=True)]
    first, second = (
        f"{shard.name}, row {int(shard.rows[row]) if isinstance(shard, ShardPart) else row}" for shard, row in places
    )
    raise UserError(
        f"{second}: its sample_id {value!r} is that of {first} too; a sample_id is one sample's: what several are about is a"
        " group_id"
    )


def _table_of(shard: ShardIndex) -> TableIndex | None:
    whole = shard.shard if isinstance(shard, ShardPart) else shard
    return whole if isinstance(whole, TableIndex) else None


def _ids_of(shard: ShardIndex) -> pa.ChunkedArray:
    table = _table_of(shard)
    assert table is not None
    column = table._column("sample_id").cast(pa.large_string())
    return column.take(pa.array(shard.rows)) if isinstance(shard, ShardPart) else column


def _keys(table: pa.Table, name: str) -> Sequence[str]:
    for column in ("__key__", "key"):
        if column in table.column_names and not table[column].null_count:
            kind = _plain(table[column].type)
            if _is_text(kind) or Types.is_integer(kind):
                named = [str(key).encode() for key in table[column].to_pylist()]
                ends = np.cumsum([len(key) for key in named], dtype=np.int64)
                return Keys(np.frombuffer(b"".join(named), dtype=np.uint8), ends)
    return RowKeys(name, len(table))


def _mapped(arrow: Sequence[Path]) -> pa.Table:
    return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in arrow])


def _dataset(path: Path) -> tuple[tuple[Path, ...], str]:
    """(files, digest) of what `datasets.Dataset.save_to_disk` wrote."""
    state = json.loads((path / STATE).read_text())
    if state.get("_indices_files"):
        raise UserError(f"{path}: the dataset is a selection of rows; save it after `flatten_indices()`")
    arrow = tuple(path / Path(entry["filename"]).name for entry in state["_data_files"])
    about = f"{state['_fingerprint']} {[file.stat().st_size for file in arrow]}"
    return arrow, hashlib.blake2b(about.encode(), digest_size=8).hexdigest()


def _copied(path: Path) -> tuple[tuple[Path, ...], str, list[str]]:
    """(the Arrow copy, digest of its bytes, columns of numbers) of a Parquet or CSV file. Any number of processes may make it
    at once.

    Raises:
        UserError: if it cannot be written.
    """
    place = hashlib.blake2b(str(path.absolute()).encode(), digest_size=12).hexdigest()
    version = hashlib.blake2b(f"{VERSION} {open_file(str(path)).fingerprint}".encode(), digest_size=6).hexdigest()
    folder = cache_root() / "tables"
    copy, about = (folder / f"{place}-{version}.{suffix}" for suffix in ("arrow", "digest"))
    try:
        _mapped([copy])
        digest, *numbers = about.read_text().split("\n")
        return (copy,), digest, [json.loads(name) for name in numbers]
    except (OSError, ValueError, pa.ArrowException):
        pass  # not there, or torn by a crash
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = _write_whole(copy, lambda partial: _convert(path, partial))
        numbers = [] if path.suffix.lower() == ".parquet" else _numbers_in(_mapped([copy]))
        text = "\n".join([digest, *map(json.dumps, numbers)])
        _write_whole(about, lambda partial: partial.write_text(text))
        for other in {*folder.glob(f"{place}-*")} - {copy, about}:  # of the file before it changed
            if not other.name.endswith(".partial"):
                other.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:  # Arrow's, about what it reads
            raise ValueError(str(error)) from error
        raise UserError(f"{path}: no Arrow copy of it can be written to {folder} ({error.strerror})") from error
    return (copy,), digest, numbers


def _write_whole(target: Path, write: Callable[[Path], object]) -> str:
    """Under a temporary name first; returns the digest of what was written."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}-", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        with partial.open("rb") as written:
            digest = hashlib.file_digest(written, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def _convert(path: Path, target: Path) -> None:
    batches: Iterable[pa.RecordBatch]
    if path.suffix.lower() == ".parquet":
        file = pq.ParquetFile(path)
        schema, batches = file.schema_arrow, file.iter_batches(ROWS)
    else:
        schema, batches = _csv(path)
    plain = pa.schema([field.with_type(_plain(field.type)) for field in schema], schema.metadata)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, plain) as writer:
        for batch in batches:
            writer.write_batch(batch if plain.equals(schema) else batch.cast(plain))


def _csv(path: Path) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    """All of it as text, just as it stands; an empty cell is none.

    Raises:
        UserError: if it is not UTF-8.
    """
    with path.open("rb") as file:
        start = file.read(2**16)
    not_utf8 = UserError(f"{path} is not UTF-8: save it as that (in Excel: CSV UTF-8)")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise not_utf8
    parse = pyarrow.csv.ParseOptions(delimiter=_delimiter(path, start), newlines_in_values=True)
    read = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK)

    def opened(**types: Any) -> pyarrow.csv.CSVStreamingReader:
        kinds = pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True, **types)
        return pyarrow.csv.open_csv(path, read_options=read, parse_options=parse, convert_options=kinds)

    def batches() -> Iterable[pa.RecordBatch]:
        try:
            yield from reader
        except pa.ArrowInvalid as error:
            raise not_utf8 if "UTF8" in str(error) else error from error

    names = opened().schema.names
    try:
        reader = opened(column_types={name: pa.string() for name in names})
    except pa.ArrowInvalid as error:
        raise not_utf8 if "UTF8" in str(error) else error from error
    return reader.schema, batches()


def _delimiter(path: Path, start: bytes) -> str:
    """A comma, or what stands between the names of the columns in its place, as Excel has it where a comma is a decimal's."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = re.sub(r'"[^"]*"', "", start.decode("utf-8", "replace")).splitlines()[:1]
    return next((mark for mark in ",;\t" if mark in "".join(header)), ",")


def _numbers_in(table: pa.Table) -> list[str]:
    """Columns all of whose texts are numbers just as Python prints them, so that nothing is lost: not 007, 1.50 or 1e5."""

    def all_numbers(column: pa.ChunkedArray) -> bool:
        return all(text is None or _number(text) is not text for chunk in column.chunks for text in chunk.to_pylist())

    columns = zip(table.column_names, table.columns, strict=True)
    return [name for name, column in columns if column.null_count < len(table) and all_numbers(column)]


def _number(text: str) -> Any:
    """The number that Python prints so; the text itself if there is none."""
    if len(text) < 26 and text[-1:].isdigit() and text.isascii():
        for kind in (int, float):
            try:
                if str(number := kind(text)) == text and -(2**63) <= number < 2**63:
                    return number
            except ValueError:
                pass
    return text


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type that holds the same values as they are: no dictionary, no view."""
    if Types.is_dictionary(kind) or Types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if Types.is_string_view(kind):
        return pa.large_string()
    if Types.is_binary_view(kind):
        return pa.large_binary()
    if Types.is_struct(kind):
        return pa.struct([inner.with_type(_plain(inner.type)) for inner in kind])
    if Types.is_list_view(kind) or Types.is_large_list_view(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if Types.is_list(kind) or Types.is_large_list(kind):
        make = pa.list_ if Types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _is_text(kind: pa.DataType) -> bool:
    return Types.is_string(kind) or Types.is_large_string(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return Types.is_binary(kind) or Types.is_large_binary(kind)


def _is_listed(kind: pa.DataType) -> bool:
    return Types.is_list(kind) or Types.is_large_list(kind) or Types.is_fixed_size_list(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    inner = list(kind) if Types.is_struct(kind) else [kind.value_field] if _is_listed(kind) else []
    return _is_binary(kind) or Types.is_fixed_size_binary(kind) or any(_holds_bytes(of.type) for of in inner)


def _is_metadata(column: pa.ChunkedArray) -> bool:
    if _holds_bytes(column.type) or Types.is_null(column.type):
        return False
    kind = _plain(column.type)
    if not _is_listed(kind) or _is_text(kind.value_type) or not len(column):
        return True
    return (pc.max(pc.list_value_length(column.cast(kind))).as_py() or 0) <= LONG_LIST


def _value(scalar: pa.Scalar) -> Any:
    if scalar.is_valid and Types.is_temporal(scalar.type) and not Types.is_duration(scalar.type):
        return scalar.cast(pa.string()).as_py()  # nanoseconds too
    value = scalar.as_py()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
