"""Sample ids that are the numbers of a table's rows: what names samples by them holds for that very file alone."""

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import RowKeys, table_behind
from mmcontrast.errors import UserError

VECTORS = "<vectors>"  # in place of a table's name: vectors whose rows have no ids but their numbers
SUMMARY = b"mmcontrast"  # metadata of a Parquet file: what made it, as JSON


def row_ids(shards: Iterable[ShardIndex]) -> dict[str, str]:
    """Return the digest of each table whose samples have neither a sample_id nor a key, by the name of its file."""
    tables = (table for table in map(table_behind, shards) if table is not None)
    numbered = (table for table in tables if isinstance(table.keys, RowKeys) and "sample_id" not in table.extensions)
    return {Path(table.name).name: table.digest for table in numbered}


def refuse_other_rows(source: str | Path, shards: Iterable[ShardIndex], option: str) -> None:
    """Check that what names samples by the numbers of rows was made of the tables as they are now.

    Args:
        source: a file, or a folder of files, that `mmcontrast data score`, `mine` and the like wrote; others are not checked.

    Raises:
        UserError: for a table that has changed since, and for samples that have ids.
    """
    path = Path(source)
    file = next(iter(sorted(path.glob("*.parquet"))), path) if path.is_dir() else path
    try:
        written = json.loads(pq.read_metadata(file).metadata[SUMMARY])["table"]["row_ids"]
    except (KeyError, TypeError, ValueError, OSError, pa.ArrowException):
        return
    shards = list(shards)
    if VECTORS in written and len(row_ids(shards)) < len({shard.name for shard in shards}):
        raise UserError(
            f"{option}: {source} was made of vectors that are known by the numbers of their rows, and these samples have ids of"
            " their own: make the table again, with mmcontrast data table --metadata and a column sample_id"
        )
    for name, digest in row_ids(shards).items():
        if written.get(name, digest) != digest:
            raise UserError(
                f"{option}: {source} was made of {name} as it was before: its samples have no sample_id, so they are known by"
                " their rows, which may be others now. Embed again, or give the table a column sample_id"
            )
