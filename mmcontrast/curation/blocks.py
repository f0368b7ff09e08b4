"""What a stage of an embedding table has done so far: a file a block beside its output, so that a run that was killed goes on.

The blocks are gone once the output is there.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmcontrast.curation.outputs import METADATA
from mmcontrast.curation.stage import write_json, write_table
from mmcontrast.errors import UserError
from mmcontrast.search.table import StoredTable
from mmcontrast.strict_json import dumps

BEGUN = "begun.json"


class Blocks:
    """The blocks of an output, in the folder `.OUT.blocks` beside it. Each appears when it is whole.

    Args:
        out: the output.
        begun: all that a block depends on but its number.

    Raises:
        UserError: if the folder has blocks of something else, or cannot be written.
    """

    def __init__(self, out: Path, begun: dict[str, Any]) -> None:
        self.folder = out.with_name(f".{out.name}.blocks")
        path, begun = self.folder / BEGUN, json.loads(dumps(begun))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_json(begun, path)
            there = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): remove {self.folder}") from error
        other = [name for name in begun if there.get(name) != begun[name]]
        if other:
            raise UserError(
                f"{self.folder} has what an unfinished run wrote, of another {' and '.join(other)}: give the same as then to go"
                " on, remove that folder to begin again, or choose another output"
            )

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"

    def has(self, number: int) -> bool:
        return self._path(number).exists()

    def write(self, number: int, table: pa.Table, counts: dict[str, Any]) -> None:
        """Write a block, and what was counted in it."""
        write_table(table.replace_schema_metadata({METADATA: dumps(counts)}), self._path(number))

    def read(self, number: int) -> tuple[pa.Table, dict[str, Any]]:
        """Return a block, and what was counted in it."""
        table = pq.read_table(self._path(number))
        return table.replace_schema_metadata(None), json.loads(table.schema.metadata[METADATA])

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def stamps(table: StoredTable) -> list[list[Any]]:
    """Return name, size and time of the files of a table's vectors: one that was made anew may have the same manifest."""
    files = sorted(table.folder.glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
