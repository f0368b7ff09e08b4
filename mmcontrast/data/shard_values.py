"""Reads one value of every sample of a shard: its id, or an entry of its json."""

from typing import Any

import numpy as np
import pyarrow as pa

from mmcontrast.data.ids import default_id, id_of, read_json
from mmcontrast.data.keys import entry_of
from mmcontrast.data.parts import ShardPart
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import TableIndex
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError


def ids_of_shard(shard: ShardIndex, identity: str) -> np.ndarray:
    """Return int64 [n], the `sample_id` of every sample of a shard; the default id of those that have none. Reads the json of
    each.

    Args:
        identity: of the shard among all shards, of `identities`.

    Raises:
        UserError: for an id that is neither a whole number nor a text.
    """
    row, ids = 0, np.empty(len(shard), dtype=np.int64)
    column = _table_values(shard, "sample_id")
    has_json = shard.has("json") if column is None and "json" in shard.extensions else None
    try:
        for row in range(len(shard)):
            value = column[row] if column is not None else None
            if has_json is not None and has_json[row]:
                value = read_json(shard.read(row, ["json"])["json"]).get("sample_id")
            if value is None or value == "":
                ids[row] = default_id(identity, shard.identity(row))
            else:
                ids[row] = id_of("sample_id", value, 0)
    except (DecodeError, ValueError, RecursionError) as error:
        raise UserError(f"shard {shard.name}, {shard.describe(row)}: {error}") from error
    return ids


def json_entries(shard: ShardIndex, name: str) -> pa.Array:
    """Return an entry of every sample's json as text, null where it has none."""
    entries: list[bytes | None] = [None] * len(shard)
    column = _table_values(shard, name)
    for row in np.flatnonzero(shard.has("json")).tolist() if "json" in shard.extensions else ():
        try:
            value = column[row] if column is not None else entry_of(read_json(shard.read(row, ["json"])["json"]), name)
        except (DecodeError, ValueError, RecursionError):
            continue  # a damaged json names nothing
        entries[row] = None if value is None else str(value).encode()
    return pa.array(entries, pa.large_binary())


def _table_values(shard: ShardIndex, column: str) -> list[Any] | None:
    """Return a column of a table whose metadata are its columns alone; None of any other shard."""
    table = shard.shard if isinstance(shard, ShardPart) else shard
    if not isinstance(table, TableIndex) or "json" in table.table.column_names or column not in table.table.column_names:
        return None
    values = table.table[column]
    values = values.take(pa.array(shard.rows)) if isinstance(shard, ShardPart) else values
    if pa.types.is_integer(values.type):  # at once
        return values.to_pylist()
    return [table.entry(column, value) for value in values]
