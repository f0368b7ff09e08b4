"""An embedding table by slices of its rows, of one process or many, in any order; the last one completes it."""

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
from mmcontrast.evaluation.embed import MANIFEST, EmbeddingTable, write_json


@dataclass(frozen=True)
class TableSlice:
    """One of several slices of a table's rows. When its parts are in the folder, so is its record, a manifest of it alone.

    Attributes:
        number: of the slice, from 1 to `of`.
    """

    folder: Path
    number: int
    of: int

    @classmethod
    def parse(cls, folder: Path, text: str) -> "TableSlice":
        """
        Raises:
            UserError: if the text is not like "3/8".
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        number, of = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= of:
            raise UserError(f"--part {text!r} is not of the form I/N with I from 1 to N, like 3/8")
        return cls(folder, number, of)

    @classmethod
    def all(cls, folder: Path, of: int) -> list["TableSlice"]:
        return [cls(folder, number, of) for number in range(1, of + 1)]

    @staticmethod
    def number_in(folder: Path) -> int | None:
        """Into how many slices the table in a folder is cut; None if there is none yet."""
        record = next(folder.glob(".slice-*-of-*.json"), None)
        return None if record is None else int(record.stem.rpartition("-")[2])

    @property
    def record(self) -> Path:
        return self.folder / f".slice-{self.number:05d}-of-{self.of:05d}.json"

    def rows(self, total: int) -> range:
        """
        Raises:
            UserError: if there are fewer rows than slices.
        """
        if total < self.of:
            raise UserError(f"--part {self.number}/{self.of}: {total} samples cannot make {self.of} slices")
        return range(total * (self.number - 1) // self.of, total * self.number // self.of)

    def pieces(self, total: int) -> Iterator[range]:
        """Its rows, a part's at a time: what is in memory does not grow with a slice."""
        rows = self.rows(total)
        return (rows[start : start + embed.PART_ROWS] for start in range(0, len(rows), embed.PART_ROWS))

    def done(self, about: dict[str, Any]) -> bool:
        """
        Raises:
            UserError: as `check`.
        """
        self.check(about)
        return self.record.exists()

    def check(self, about: dict[str, Any]) -> None:
        """
        Raises:
            UserError: if the folder holds another table, or slices of one.
        """
        if (self.folder / MANIFEST).exists() and not self.record.exists():
            EmbeddingTable.refuse_to_overwrite(self.folder)
        for record in self.folder.glob(".slice-*.json"):
            found = json.loads(record.read_text())
            here = {**about, "slices": self.of}
            for name in here:
                if name in found and found[name] != here[name]:
                    raise UserError(
                        f"{self.folder} holds slices of another table ({name}: {found[name]!r} there, {here[name]!r} here):"
                        " remove it, or choose another folder"
                    )

    def write(self, tables: Iterable[EmbeddingTable], total: int, about: dict[str, Any]) -> None:
        """Its rows as parts of the table of `total` rows, which appear when they are whole.

        Args:
            tables: its rows, one table after the other, all but the last a whole number of parts.
        """
        before = self.all(self.folder, self.of)[: self.number - 1]
        first = sum(ceil(len(other.rows(total)) / embed.PART_ROWS) for other in before)
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest: dict[str, Any] = {"rows": 0, "parts": []}
        with tempfile.TemporaryDirectory(prefix=".slice-", dir=self.folder) as partial:
            for table in tables:
                more = table.write_parts(Path(partial), first + len(manifest["parts"]))
                manifest = more | {"rows": manifest["rows"] + more["rows"], "parts": manifest["parts"] + more["parts"]}
            for file in Path(partial).iterdir():
                os.replace(file, self.folder / file.name)
        write_json(self.record, manifest | about | {"slices": self.of})

    def complete(self) -> bool:
        """Writes the table's manifest if all slices are there; whoever ends last does so, or several the same one."""
        slices = self.all(self.folder, self.of)
        if not all(one.record.exists() for one in slices):
            return False
        manifests = [json.loads(one.record.read_text()) for one in slices]
        rows, parts = sum(one["rows"] for one in manifests), [part for one in manifests for part in one["parts"]]
        write_json(self.folder / MANIFEST, manifests[0] | {"rows": rows, "parts": parts})
        for killed in [path for path in self.folder.glob(".slice-*") if path.is_dir()]:  # what they had begun
            shutil.rmtree(killed, ignore_errors=True)
        return True
