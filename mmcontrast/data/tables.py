"""Tables as shards: a sample is a row, its members are columns. Parquet, CSV, and Hugging Face datasets on a disk.

Rows are read at random from memory-mapped Arrow files. A Hugging Face dataset is one; of a Parquet or CSV file, which only
give up their rows in large groups, an Arrow copy is made once in the cache folder.
"""

import hashlib
import io
import json
import os
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
from mmcontrast.data.range_cache import cache_root
from mmcontrast.data.shard import Keys, ShardIndex
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality

STATE = "state.json"  # of a Hugging Face dataset
SUFFIXES = (".parquet", ".csv", ".tsv")
FILE_COLUMNS = frozenset({*ImageModality.extensions, *AudioModality.extensions, "filepath"})
ROWS = 1024  # of a batch of the copy


class RowKeys(Sequence[str]):
    """Names of rows without names: the table's digest and the row's number."""

    def __init__(self, digest: str, rows: int) -> None:
        self.digest, self.rows = digest, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # one at a time
        if not 0 <= row < self.rows:
            raise IndexError(row)
        return f"{self.digest[:8]}-{row}"


@dataclass(frozen=True)
class TableIndex(ShardIndex):
    """A memory-mapped table. `json` of a row is its numbers, texts and truth values, so that `sample_id`, `group_id` and
    labels are columns.

    Columns hold bytes, texts, {bytes, path} as Hugging Face's pictures and sounds do, lists of texts (joined by lines), lists
    of numbers (as .npy), or paths.

    Attributes:
        arrow: the files that hold it.
        file_columns: columns whose texts are paths, within `folder` and nowhere else.
    """

    arrow: tuple[Path, ...]
    file_columns: frozenset[str]
    folder: Path

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
        column = self.table[extension]
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if pa.types.is_string(column.type) or _is_binary(column.type) or pa.types.is_large_string(column.type):
            lengths = pc.binary_length(column)
        else:
            lengths = pc.if_else(pc.is_valid(column), pa.scalar(8, pa.int64()), pa.scalar(None, pa.int64()))
        return pc.fill_null(lengths.cast(pa.int64()), -1).to_numpy()

    def size(self, sample: int, extension: str) -> int:
        if extension == "json":
            return 0
        value = self.table[extension][sample]
        if pa.types.is_struct(value.type):
            data, path = (value.get(name) if value.is_valid and name in value else None for name in ("bytes", "path"))
            value = data if data is not None and data.is_valid else path
            named = value is path
        else:
            named = extension in self.file_columns and isinstance(value, pa.StringScalar | pa.LargeStringScalar)
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
                row = {name: self.table[name][sample].as_py() for name in self._scalars}
                members["json"] = json.dumps({name: value for name, value in row.items() if value is not None}).encode()
            elif extension in self.extensions:
                value = self.table[extension][sample].as_py()
                if (data := self._bytes(value, extension in self.file_columns)) is not None:
                    members[extension] = data
        return members

    @cached_property
    def _scalars(self) -> list[str]:
        kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
        return [field.name for field in self.table.schema if any(kind(field.type) for kind in kinds)]

    def _bytes(self, value: Any, named: bool) -> bytes | None:
        if isinstance(value, dict):
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
        if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
            return "\n".join(text for text in value if text).encode() or None
        if isinstance(value, list):
            target = io.BytesIO()
            np.save(target, np.array(value, dtype=np.float32))
            return target.getvalue()
        return str(value).encode()

    def _file(self, name: str) -> Path:
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise DecodeError(f"{path} is not in {self.folder}: set `files` of this source to its folder")
        return path


def is_table(name: str) -> bool:
    return name.endswith(SUFFIXES) or (not is_remote(name) and (Path(name) / STATE).exists())


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
        arrow, digest = _dataset(path) if path.is_dir() else _copied(path)
        table = _mapped(arrow)
        if path.is_dir():
            table.validate(full=True)  # somebody else wrote it: an offset that points astray would end the process
        keys = _keys(table, digest)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} cannot be read as a table ({' '.join(str(error).split())[:300]})") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise UserError(f"{name}: two columns have one name, among {', '.join(table.column_names)}")
    columns = tuple(column for column in table.column_names if column != "json")
    folder = Path(files) if files else path.parent if path.is_file() else path
    return TableIndex(name, keys, (*columns, "json"), digest, arrow, frozenset(file_columns), folder)


def _keys(table: pa.Table, digest: str) -> Sequence[str]:
    for column in {"key", "__key__"} & set(table.column_names):
        if pa.types.is_string(table[column].type) or pa.types.is_large_string(table[column].type):
            named = [str(key).encode() for key in table[column].to_pylist()]
            return Keys(np.frombuffer(b"".join(named), dtype=np.uint8), np.cumsum([len(key) for key in named], dtype=np.int64))
    return RowKeys(digest, len(table))


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


def _copied(path: Path) -> tuple[tuple[Path, ...], str]:
    """(the Arrow copy, digest of its bytes) of a Parquet or CSV file. Any number of processes may make it at once.

    Raises:
        UserError: if it cannot be written.
    """
    place = hashlib.blake2b(str(path.absolute()).encode(), digest_size=12).hexdigest()
    version = hashlib.blake2b(open_file(str(path)).fingerprint.encode(), digest_size=6).hexdigest()
    folder = cache_root() / "tables"
    copy, about = (folder / f"{place}-{version}.{suffix}" for suffix in ("arrow", "digest"))
    try:
        _mapped([copy])
        return (copy,), about.read_text()
    except (OSError, ValueError, pa.ArrowException):
        pass  # not there, or torn by a crash
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = _write_whole(copy, lambda partial: _convert(path, partial))
        _write_whole(about, lambda partial: partial.write_text(digest))
        for other in {*folder.glob(f"{place}-*")} - {copy, about}:  # of the file before it changed
            if not other.name.endswith(".partial"):
                other.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:  # Arrow's, about what it reads
            raise ValueError(str(error)) from error
        raise UserError(f"{path}: no Arrow copy of it can be written to {folder} ({error.strerror})") from error
    return (copy,), digest


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
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        schema, batches = file.schema_arrow, file.iter_batches(ROWS)
    else:
        options = pyarrow.csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True)
        texts = {"key": pa.string(), "__key__": pa.string()}  # 001 is not 1
        kinds = pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True, column_types=texts)
        reader = pyarrow.csv.open_csv(path, parse_options=options, convert_options=kinds)
        schema, batches = reader.schema, reader
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
