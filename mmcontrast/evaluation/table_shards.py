"""Write an embedding table in slices of its rows, by one process or many, in any order; the last one completes it."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from mmcontrast.errors import UserError
from mmcontrast.evaluation import embed
from mmcontrast.evaluation.embed import MANIFEST, EmbeddingTable
from mmcontrast.whole_files import write_json


@dataclass(frozen=True)
class TableSlice:
    """One of several slices of a table's rows. Its record, a manifest of the slice alone, is written after its parts.

    Attributes:
        number: of the slice, from 1 to `of`.
        of: the number of slices.
    """

    folder: Path
    number: int
    of: int

    @classmethod
    def parse(cls, folder: Path, text: str) -> "TableSlice":
        """Parse a slice as "3/8".

        Raises:
            UserError: for another form.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count:
            raise UserError(f"--part {text!r} is not of the form I/N with I from 1 to N, like 3/8")
        return cls(folder, number, count)

    @classmethod
    def all(cls, folder: Path, count: int) -> list["TableSlice"]:
        return [cls(folder, number, count) for number in range(1, count + 1)]

    @staticmethod
    def number_in(folder: Path) -> int | None:
        """Return the number of slices of the table in a folder; None if there is none yet."""
        record = next(folder.glob(".slice-*-of-*.json"), None)
        return None if record is None else int(record.stem.rpartition("-")[2])

    @property
    def record(self) -> Path:
        return self.folder / f".slice-{self.number:05d}-of-{self.of:05d}.json"

    def rows(self, total: int) -> range:
        """Return the slice's rows of a table of `total` rows.

        Raises:
            UserError: if there are fewer rows than slices.
        """
        if total < self.of:
            raise UserError(f"--part {self.number}/{self.of}: {total} samples cannot make {self.of} slices")
        return range(total * (self.number - 1) // self.of, total * self.number // self.of)

    def pieces(self, total: int) -> Iterator[range]:
        """Yield the slice's rows one part at a time, so that memory does not grow with the slice."""
        rows = self.rows(total)
        return (rows[start : start + embed.PART_ROWS] for start in range(0, len(rows), embed.PART_ROWS))

    def done(self, description: dict[str, Any]) -> bool:
        """Return whether the slice is written.

        Raises:
            UserError: as `check`.
        """
        self.check(description)
        return self.record.exists()

    def check(self, description: dict[str, Any]) -> None:
        """Check that the slice belongs to the table in the folder.

        Raises:
            UserError: if the folder holds another table, or slices of one.
        """
        if (self.folder / MANIFEST).exists() and not self.record.exists():
            EmbeddingTable.refuse_to_overwrite(self.folder)
        for record in self.folder.glob(".slice-*.json"):
            found = json.loads(record.read_text())
            expected = {**description, "slices": self.of}
            for name in expected:
                if name in found and found[name] != expected[name]:
                    raise UserError(
                        f"{self.folder} holds slices of another table ({name}: {found[name]!r} there, {expected[name]!r} here):"
                        " remove it, or choose another folder"
                    )

    def write(self, tables: Iterable[EmbeddingTable], total: int, description: dict[str, Any]) -> None:
        """Write the slice's rows as parts of the table of `total` rows; they appear when all are complete.

        Args:
            tables: the rows, in order; each but the last is a whole number of parts.
        """
        previous_slices = self.all(self.folder, self.of)[: self.number - 1]
        first = sum(ceil(len(earlier.rows(total)) / embed.PART_ROWS) for earlier in previous_slices)
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest: dict[str, Any] = {"rows": 0, "parts": []}
        with tempfile.TemporaryDirectory(prefix=".slice-", dir=self.folder) as partial:
            for table in tables:
                added = table.write_parts(Path(partial), first + len(manifest["parts"]))
                manifest["rows"] += added["rows"]
                manifest = added | {"rows": manifest["rows"], "parts": manifest["parts"] + added["parts"]}
            for file in Path(partial).iterdir():
                os.replace(file, self.folder / file.name)
        write_json(self.record, manifest | description | {"slices": self.of})

    def complete(self) -> bool:
        """Write the table's manifest if all slices are there, and return whether they are. The last process does so; several
        may write the same one."""
        records = [part.record for part in self.all(self.folder, self.of)]
        if not all(record.exists() for record in records):
            return False
        manifests = [json.loads(record.read_text()) for record in records]
        rows = sum(manifest["rows"] for manifest in manifests)
        parts = [part for manifest in manifests for part in manifest["parts"]]
        write_json(self.folder / MANIFEST, manifests[0] | {"rows": rows, "parts": parts})
        for leftover in [path for path in self.folder.glob(".slice-*") if path.is_dir()]:  # of processes that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        return True
