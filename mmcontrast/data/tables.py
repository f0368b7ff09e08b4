"""Tables as shards: a sample is a row, its members are columns. Parquet, CSV, and Hugging Face datasets on a disk.

Rows are read at random from memory-mapped Arrow files. A Hugging Face dataset is one; of a Parquet or CSV file, which only
give up their rows in large groups, an Arrow copy is made once in the cache folder.
"""

import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmcontrast.data.arrow_copies import STATE, copy_of_file, dataset_files, open_mapped, parse_number
from mmcontrast.data.column_types import holds_bytes, is_binary, is_list, is_metadata, is_text, plain_type
from mmcontrast.data.files import is_remote
from mmcontrast.data.parts import ShardPart
from mmcontrast.data.shard import Keys, ShardIndex, member_of
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality

SUFFIXES = (".parquet", ".csv", ".tsv")
FILE_COLUMNS = frozenset({*ImageModality.extensions, *AudioModality.extensions, "filepath"})
CHECKED_ROWS = 5_000_000  # of tables, whose sample ids are compared when they are opened
Types = pa.types
_log = logging.getLogger(__name__)


class RowKeys(Sequence[str]):
    """Names for rows that have none: the table's name and the row's number, from 0 on."""

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
    of numbers (as .npy), paths, or the numbers of Hugging Face's ClassLabel, which are read as a class's name.

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
        try:
            return open_mapped(self.arrow)
        except OSError as error:  # nothing is wrong with the rows
            raise UserError(f"{self.name}: its Arrow copy is gone ({error}): start again, which makes it anew") from error

    @cached_property
    def _sizes(self) -> dict[str, np.ndarray]:
        return {}

    def sizes_of(self, extension: str) -> np.ndarray:
        if extension not in self._sizes:  # an order by length asks in every window
            self._sizes[extension] = self._compute_sizes(extension)
        return self._sizes[extension]

    def _compute_sizes(self, extension: str) -> np.ndarray:
        if extension == "json" or extension in self.file_columns:
            return np.array([self.size(row, extension) for row in range(len(self))], dtype=np.int64)
        column = self._column(extension)
        if Types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if is_text(column.type) or is_binary(column.type):
            lengths = pc.binary_length(column)
        elif is_list(column.type) and is_text(column.type.value_type):  # lines
            lengths = pa.chunked_array([_lengths_of_lines(rows) for rows in column.chunks], pa.int64())
        else:
            lengths = pc.if_else(pc.is_valid(column), pa.scalar(8, pa.int64()), pa.scalar(None, pa.int64()))
        return pc.fill_null(lengths.cast(pa.int64()), -1).to_numpy()

    def has(self, extension: str) -> np.ndarray:
        if extension == "json":
            return np.ones(len(self), dtype=bool)
        column = self._column(extension)
        present = pc.is_valid(column)
        if Types.is_struct(column.type) and {"bytes", "path"} & {inner.name for inner in column.type}:
            names = [name for name in ("bytes", "path") if column.type.get_field_index(name) >= 0]
            inner = [pc.is_valid(pc.struct_field(column, name)) for name in names]
            present = pc.and_(present, pc.or_(inner[0], inner[-1]))
        return np.asarray(present.to_numpy(zero_copy_only=False), dtype=bool)

    def identity(self, sample: int) -> str:
        return str(sample)  # a column of keys may hold one several times

    def describe(self, sample: int, extension: str = "") -> str:
        words = f"row {sample}, {super().describe(sample, extension)}"
        if extension in self.file_columns and extension in self.extensions:
            value = self.table[extension][sample].as_py()
            words += f" ({value})" if isinstance(value, str) else ""
        return words

    def _column(self, name: str) -> pa.ChunkedArray:
        """Return a column with its plain type."""
        column = self.table[name]
        kind = plain_type(column.type)
        return column if kind == column.type else column.cast(kind)

    def size(self, sample: int, extension: str) -> int:
        if extension == "json":
            return 0
        value = self.table[extension][sample]
        if Types.is_struct(value.type):
            data, path = (value.get(name) if value.is_valid and name in value else None for name in ("bytes", "path"))
            value = data if data is not None and data.is_valid else path
            is_path = value is path
        else:
            is_path = extension in self.file_columns and isinstance(value.as_py(), str)
        if value is None or not value.is_valid:
            return -1
        if is_path:
            try:
                return self._resolve(value.as_py()).stat().st_size
            except (OSError, ValueError, RuntimeError, DecodeError):
                return 0  # reported when it is read
        return value.as_buffer().size if hasattr(value, "as_buffer") else 8

    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes of those of the wanted members that the row has.

        Raises:
            DecodeError: for a value that cannot be read, or a file that does not exist.
            UserError: if the Arrow copy is gone.
        """
        try:
            return self._read(sample, extensions)
        except UserError:
            raise
        except (ValueError, TypeError, LookupError, RuntimeError, OSError, pa.ArrowException) as error:
            raise DecodeError(f"row {sample} cannot be read ({error})") from error

    def _read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        members = {}
        for extension in extensions:
            if extension == "json":
                members["json"] = json.dumps(self._metadata(sample), default=_json_default).encode()
            elif extension in self.extensions:
                value = self.table[extension][sample].as_py()
                if extension in self._class_names and isinstance(value, int):
                    value = self._class_names[extension][value] if value >= 0 else None
                if (data := self._member_bytes(value, extension in self.file_columns)) is not None:
                    members[extension] = data
        return members

    @cached_property
    def _class_names(self) -> dict[str, list[str]]:
        """Return the names of the classes of each column of numbers that Hugging Face's datasets call a ClassLabel."""
        described = json.loads((self.table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = (described.get("info") or {}).get("features") or {}
        labels = {name: feature for name, feature in features.items() if isinstance(feature, dict) and "names" in feature}
        return {name: feature["names"] for name, feature in labels.items() if feature.get("_type") == "ClassLabel"}

    def _metadata(self, sample: int) -> dict[str, Any]:
        metadata = {}
        for name in self._metadata_columns:
            value = self.entry(name, self.table[name][sample])
            if value is not None:
                metadata[name] = value
        if "json" in self.table.column_names and (value := self.table["json"][sample].as_py()) is not None:
            entries = value if isinstance(value, dict) else json.loads(value)
            if not isinstance(entries, dict):
                raise DecodeError(f"column json: a JSON {type(entries).__name__}, not an object")
            metadata |= {name: entry for name, entry in entries.items() if entry is not None}
        return metadata

    def entry(self, name: str, scalar: pa.Scalar) -> Any:
        """Return a value of a column as the row's metadata has it; what JSON cannot hold is a text."""
        value = _metadata_value(scalar)
        if name in self.numbers and value is not None:
            return parse_number(value)
        return value if isinstance(value, str | int | float | list | dict | None) else _json_default(value)

    @cached_property
    def _metadata_columns(self) -> list[str]:
        return [name for name in self.table.column_names if name != "json" and is_metadata(self.table[name])]

    @property
    def undescribed(self) -> list[str]:
        """Return the columns that are no metadata: bytes, and long lists of numbers."""
        return [name for name in self.table.column_names if name not in {*self._metadata_columns, "json"}]

    def _member_bytes(self, value: Any, is_path: bool) -> bytes | None:
        if isinstance(value, dict):
            if not {"bytes", "path"} & value.keys():
                entries = ", ".join(f"json:COLUMN.{name}" for name in list(value)[:3])
                raise DecodeError(f"a structure, not a member: name one of its entries as a key ({entries})")
            is_path = value.get("bytes") is None
            value = value.get("path") if is_path else value["bytes"]
        if value is None or isinstance(value, bytes):
            return value
        if is_path and isinstance(value, str):
            path = self._resolve(value)
            try:
                return path.read_bytes()
            except OSError as error:
                raise DecodeError(f"{path} cannot be read: {error.strerror}") from error
        return member_of(value)

    def states_of_files(self, extensions: Iterable[str]) -> Iterator[str]:
        """Yield the size and the time of every file that these columns name, "" where there is none, row by row."""
        for extension in sorted({*extensions} & {*self.extensions}):
            for value in self.table[extension]:
                path = value.as_py()
                if isinstance(path, dict):
                    path = path.get("path") if path.get("bytes") is None else None
                elif extension not in self.file_columns:
                    break
                try:
                    status = self._resolve(path).stat() if isinstance(path, str) else None
                except (OSError, ValueError, RuntimeError, DecodeError):
                    status = None
                yield f"{status.st_size} {status.st_mtime_ns}" if status else ""

    def _resolve(self, name: str) -> Path:
        if "://" in name:
            raise DecodeError(
                "a URL: files of a table are read from a disk. Download them first; img2dataset's shards are read as is"
            )
        folder = Path(os.path.abspath(self.folder))
        path = Path(os.path.abspath(folder / name))  # may be a link to anywhere: who made the folder made it
        if not path.is_relative_to(folder):
            path = path.resolve()
            if not path.is_relative_to(folder.resolve()):
                raise DecodeError(f"{path} is not in {self.folder}: set `files` of this source to its folder")
        return path


def _lengths_of_lines(rows: pa.Array) -> pa.Array:
    """Return the lengths of lists of texts that are joined by line breaks."""
    texts = pc.fill_null(pc.binary_length(pc.list_flatten(rows)).cast(pa.int64()), -1).to_numpy() + 1
    sizes = np.bincount(pc.list_parent_indices(rows).to_numpy(), texts, len(rows)).astype(np.int64)
    return pc.if_else(rows.is_valid(), pa.array(sizes - (sizes > 0)), pa.scalar(None, pa.int64()))


def is_table(name: str) -> bool:
    """Return whether a shard is a table, by its name or, of a folder, by what lies in it."""
    return name.lower().endswith(SUFFIXES) or (not is_remote(name) and (Path(name) / STATE).exists())


def open_table(name: str, file_columns: Collection[str] = FILE_COLUMNS, files: str | None = None) -> TableIndex:
    """Open a table, of which an Arrow copy is made if there is none.

    Args:
        files: the folder in which the paths of `file_columns` are; default: the table's own.

    Raises:
        UserError: if it cannot be read.
    """
    if is_remote(name):
        raise UserError(f"{name}: tables are read from a disk; copy it first")
    path = Path(name)
    try:
        arrow, digest, numbers = (*dataset_files(path), []) if path.is_dir() else copy_of_file(path)
        table = open_mapped(arrow)
        if path.is_dir():
            table.validate(full=True)  # an invalid offset would crash the process
        keys = _row_names(table, path.name if path.is_dir() else path.stem)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} cannot be read as a table ({' '.join(str(error).split())[:300]})") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise UserError(f"{name}: two columns have one name, among {', '.join(table.column_names)}")
    columns = tuple(column for column in table.column_names if column != "json")
    folder = Path(files) if files else path.parent if path.is_file() else path
    if path.suffix.lower() in (".csv", ".tsv"):
        _check_header(path, columns, {folder, path.parent})
    for column in ("sample_id", "group_id", "sample_weight"):
        if column in columns and holds_bytes(table[column].type):
            raise UserError(f"{name}: column {column!r} holds bytes, not numbers or texts: write it as one of them")
    for column in columns:
        if column.lower() in ("sample_id", "group_id") and column.lower() not in columns:
            _log.warning("%s: column %r is not read as %s: rename it if that is what it is", name, column, column.lower())
    return TableIndex(name, keys, (*columns, "json"), digest, arrow, frozenset(file_columns), folder, frozenset(numbers))


def _check_header(path: Path, columns: Iterable[str], folders: Iterable[Path]) -> None:
    """Check that the first line of a CSV file names columns.

    Raises:
        UserError: if one of the names is a URL or a file that is there.
    """
    for column in columns:
        if "://" in column or ("." in column and any(os.path.isfile(folder / column) for folder in folders)):
            raise UserError(
                f"{path}: its first line is taken for the names of columns, and {column!r} is a file's: begin it with a line"
                " like image,text"
            )


def refuse_repeated_ids(shards: Iterable[ShardIndex]) -> None:
    """Refuse tables in which two rows have one sample_id. More than `CHECKED_ROWS` rows are not compared: it would take long.

    Args:
        shards: of any kind; only tables, and selected rows of tables, are compared.

    Raises:
        UserError: if a sample_id is that of two rows.
    """
    tables = list({shard.name: shard for shard in shards if "sample_id" in shard.extensions and table_behind(shard)}.values())
    if not tables or sum(map(len, tables)) > CHECKED_ROWS:
        return
    try:
        columns = [_id_column(shard) for shard in tables]
    except pa.ArrowException:
        return  # not ids: reported of each sample when it is read
    all_ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.large_string())
    ids = pc.drop_null(all_ids)
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids).to_pylist()
    value = next(entry["values"] for entry in counts if entry["counts"] > 1 and entry["values"])
    starts = np.cumsum([0, *map(len, tables)])
    places = []
    for position in pc.indices_nonzero(pc.fill_null(pc.equal(all_ids, value), False)).to_pylist()[:2]:
        number = int(np.searchsorted(starts, position, side="right")) - 1
        shard, row = tables[number], position - int(starts[number])
        places.append(f"{shard.name}, row {int(shard.rows[row]) if isinstance(shard, ShardPart) else row}")
    first, second = places
    raise UserError(
        f"{second}: its sample_id {value!r} is that of {first} too; a sample_id is one sample's: what several are about is a"
        " group_id"
    )


def table_behind(shard: ShardIndex) -> TableIndex | None:
    """Return the table whose rows a shard holds, None of a shard of another kind."""
    table = shard.shard if isinstance(shard, ShardPart) else shard
    return table if isinstance(table, TableIndex) else None


def _id_column(shard: ShardIndex) -> pa.ChunkedArray:
    table = table_behind(shard)
    assert table is not None
    column = table._column("sample_id").cast(pa.large_string())
    if "sample_id" in table.numbers:  # 1.0 is 1
        numbers = (None if text is None else parse_number(text) for text in column.to_pylist())
        texts = [None if number is None else str(int(number) if number == int(number) else number) for number in numbers]
        column = pa.chunked_array([texts], pa.large_string())
    return column.take(pa.array(shard.rows)) if isinstance(shard, ShardPart) else column


def _row_names(table: pa.Table, name: str) -> Sequence[str]:
    """Return the names of a table's rows: those of its column of keys, or made of their numbers."""
    for column in ("__key__", "key"):
        if column in table.column_names and not table[column].null_count:
            kind = plain_type(table[column].type)
            if is_text(kind) or Types.is_integer(kind):
                encoded = [str(key).encode() for key in table[column].to_pylist()]
                ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
                return Keys(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)
    return RowKeys(name, len(table))


def _metadata_value(scalar: pa.Scalar) -> Any:
    if scalar.is_valid and Types.is_temporal(scalar.type) and not Types.is_duration(scalar.type):
        return scalar.cast(pa.string()).as_py()  # nanoseconds too
    value = scalar.as_py()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_default(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
