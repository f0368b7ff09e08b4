"""Keeps the blocks that a stage of an embedding table has finished, in files beside its output, so that a killed run goes on.

The blocks are gone once the output is there.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmcontrast.curation.outputs import about_table, write_table
from mmcontrast.data.row_ids import SUMMARY
from mmcontrast.errors import UserError
from mmcontrast.search.table import BLOCK_ROWS, StoredTable
from mmcontrast.strict_json import dumps
from mmcontrast.whole_files import write_json

BEGUN = "begun.json"


class Blocks:
    """The blocks of an output, in the folder `.OUT.blocks` beside it. Each appears when it is whole.

    Args:
        out: the output.
        table: from which it is made.
        options: on which blocks depend.

    Raises:
        UserError: if the folder has blocks of something else, or cannot be written.
    """

    def __init__(self, out: Path, table: StoredTable, options: dict[str, Any]) -> None:
        self.folder = out.with_name(f".{out.name}.blocks")
        state = {"table": about_table(table), "state of the table": _stamps(table), "size of a block": BLOCK_ROWS}
        path, description = self.folder / BEGUN, json.loads(dumps({"options": options} | state))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_json(path, description)
            existing = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): remove {self.folder}") from error
        differing = [name for name in description if existing.get(name) != description[name]]
        if differing:
            raise UserError(
                f"{self.folder} has what an unfinished run wrote, of another {' and '.join(differing)}: give the same as then"
                " to go on, remove that folder to begin again, or choose another output"
            )

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:06d}.parquet"

    def has(self, kind: str, number: int) -> bool:
        return self._path(kind, number).exists()

    def write(self, kind: str, number: int, table: pa.Table, counts: dict[str, Any] | None = None) -> None:
        """Write a block, and its counts."""
        write_table(table.replace_schema_metadata({SUMMARY: dumps(counts or {})}), self._path(kind, number))

    def read(self, kind: str, number: int) -> tuple[pa.Table, dict[str, Any]]:
        """Return a block, and its counts."""
        table = pq.read_table(self._path(kind, number))
        return table.replace_schema_metadata(None), json.loads(table.schema.metadata[SUMMARY])

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _stamps(table: StoredTable) -> list[list[Any]]:
    """Return name, size and time of a table's files: a table that was made anew may have the same manifest."""
    names = [part["name"] for part in table.manifest["parts"]]
    files = [table.folder / f"{name}.{kind}" for name in names for kind in ("safetensors", "parquet")]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
