"""Embedding tables: the embeddings of a data set by a model, in memory and on disk."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcontrast.data import MixtureDataset, ShardDataset, all_batches
from mmcontrast.errors import UserError
from mmcontrast.evaluation.finite import check_finite, check_unit
from mmcontrast.modalities import TextModality
from mmcontrast.models import ContrastiveModel
from mmcontrast.permissions import open_to_others
from mmcontrast.score import Lorentz
from mmcontrast.strict_json import dumps
from mmcontrast.types import ABSENT, Batch
from mmcontrast.whole_files import write_json

PART_ROWS, GROUP_ROWS = 100_000, 4096  # rows of a part, and of a Parquet row group, which is read to look up one row
MANIFEST = "manifest.json"
logger = logging.getLogger("mmcontrast")


@dataclass
class EmbeddingTable:
    """The embeddings of N samples.

    Attributes:
        fields: per field, unit rows float32 [N, D], or tangent vectors of a hyperbolic model; zero where absent.
        present: per field, bool [N].
        sample_ids, group_ids: int64 [N].
        metadata: N dictionaries, each with the sample's `key`.
        curvature: of a hyperbolic model; None: embeddings are compared by cosines.
    """

    fields: dict[str, Tensor]
    present: dict[str, Tensor]
    sample_ids: Tensor
    group_ids: Tensor
    metadata: list[dict[str, Any]]
    curvature: float | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def distances(self) -> Lorentz | None:
        """Return the function that maps inner products of `compared` rows to scores, −distance; None: they are the scores."""
        return None if self.curvature is None else Lorentz(self.curvature)

    def compared(self, rows: Tensor, columns: bool = False) -> Tensor:
        """Return embeddings [..., D] as they are to be multiplied: the greater the product of a query's row and a candidate's
        (`columns`), the better it fits. Of a hyperbolic model float64 points of the hyperboloid, [..., D + 1]."""
        return rows if self.distances is None else self.distances.rows(rows.double(), columns)

    def prefix(self, width: int) -> "EmbeddingTable":
        """Return the table of the first `width` numbers of all embeddings, normalized again."""
        assert self.curvature is None
        return replace(self, fields={field: F.normalize(rows[:, :width], dim=1) for field, rows in self.fields.items()})

    def first(self, number: int) -> "EmbeddingTable":
        """Return the first `number` samples."""
        return EmbeddingTable(
            {field: rows[:number] for field, rows in self.fields.items()},
            {field: present[:number] for field, present in self.present.items()},
            self.sample_ids[:number],
            self.group_ids[:number],
            self.metadata[:number],
            self.curvature,
        )

    def write(self, folder: Path | str, description: dict[str, Any] | None = None) -> None:
        """Write `part-00000.safetensors` (one tensor a field, `present.<field>`), `part-00000.parquet` (key, sample_id,
        group_id, metadata as JSON) and so on, and last `manifest.json`, which also holds `description`.

        Raises:
            UserError: if the folder already holds a table.
        """
        folder = Path(folder)
        self.refuse_to_overwrite(folder)
        self.check_shapes(str(folder))
        if self.curvature is None:
            self._check_rows(str(folder), check_unit)
        folder.mkdir(parents=True, exist_ok=True)
        manifest = self.write_parts(folder)
        write_json(folder / MANIFEST, manifest | (description or {}))  # last: a table with a manifest is complete

    def write_parts(self, folder: Path, first: int = 0) -> dict[str, Any]:
        """Write the parts, numbered from `first`, and return the manifest."""
        parts = []
        for number, start in enumerate(range(0, max(len(self), 1), PART_ROWS), first):
            rows, name = slice(start, start + PART_ROWS), f"part-{number:05d}"
            tensors = {field: values[rows].float().contiguous() for field, values in self.fields.items()}
            tensors |= {f"present.{field}": present[rows].clone() for field, present in self.present.items()}
            save_file(tensors, folder / f"{name}.safetensors")
            open_to_others(folder / f"{name}.safetensors")
            columns = {
                "key": [entry.get("key") for entry in self.metadata[rows]],
                "sample_id": self.sample_ids[rows].tolist(),
                "group_id": self.group_ids[rows].tolist(),
                "metadata": [dumps(entry, ensure_ascii=False) for entry in self.metadata[rows]],
            }
            pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=GROUP_ROWS)
            parts.append({"name": name, "rows": len(columns["key"])})
        return {
            "format": f"mmcontrast embedding table {1 if self.curvature is None else 2}",
            "rows": len(self),
            "parts": parts,
            "fields": list(self.fields),
            "dim": next(iter(self.fields.values())).shape[1],
            "dtype": "float32",
        } | ({} if self.curvature is None else {"curvature": self.curvature})

    @staticmethod
    def refuse_to_overwrite(folder: Path) -> None:
        if (folder / MANIFEST).exists() or next(folder.glob(".slice-*.json"), None):
            raise UserError(f"{folder} already holds an embedding table, or slices of one: remove it, or choose another folder")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        refuse_other_parts(folder)

    @classmethod
    def read(cls, folder: Path | str) -> "EmbeddingTable":
        """Read a table from its folder.

        Raises:
            UserError: if the folder holds no complete table, or one with embeddings that are not finite.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise UserError(f"{folder} holds no complete embedding table (no {MANIFEST})")
        manifest = json.loads((folder / MANIFEST).read_text())
        tensors = [load_file(folder / f"{part['name']}.safetensors") for part in manifest["parts"]]
        rows = pa.concat_tables([pq.read_table(folder / f"{part['name']}.parquet") for part in manifest["parts"]])
        table = cls(
            {field: torch.cat([part[field] for part in tensors]) for field in manifest["fields"]},
            {field: torch.cat([part[f"present.{field}"] for part in tensors]) for field in manifest["fields"]},
            torch.tensor(rows["sample_id"].to_pylist()),
            torch.tensor(rows["group_id"].to_pylist()),
            [json.loads(entry) for entry in rows["metadata"].to_pylist()],
            manifest.get("curvature"),
        )
        table.check_finite(str(folder))
        return table

    def check_shapes(self, name: str) -> None:
        """Check that all fields have a row a sample, and rows of one width.

        Raises:
            UserError: for the first field that does not.
        """
        width = next(iter(self.fields.values())).shape[1]
        for field, rows in self.fields.items():
            if rows.shape != (len(self), width) or len(self.present[field]) != len(self):
                raise UserError(
                    f"{name}, field {field!r}: embeddings {list(rows.shape)} and {len(self.present[field])} marks of presence,"
                    f" where there are {len(self)} samples of {width} numbers"
                )

    def check_finite(self, name: str, position_of: Callable[[int], str] = lambda row: f"row {row}") -> None:
        """Check that all embeddings are finite, and of length 1 unless they are hyperbolic.

        Args:
            name: of the table or the split.
            position_of: describes where a row of the table comes from, for the message.

        Raises:
            UserError: for the first sample and field whose embedding is not.
        """

        self._check_rows(name, check_finite, position_of)
        if self.curvature is None:
            self._check_rows(name, check_unit, position_of)

    def _check_rows(
        self, name: str, check: Callable[..., None], position_of: Callable[[int], str] = lambda row: f"row {row}"
    ) -> None:
        def row_name(field: str, present_rows: Tensor, number: int) -> str:
            row = int(present_rows[number])
            key = self.metadata[row].get("key") if row < len(self.metadata) else None
            return f"{name}, field {field!r}, {position_of(row)}, sample {key!r} (sample_id {int(self.sample_ids[row])})"

        for field, rows in self.fields.items():
            present_rows = self.present[field].nonzero().squeeze(1)
            check(rows[present_rows], partial(row_name, field, present_rows))


def refuse_other_parts(folder: Path) -> None:
    """Check that a folder has no files of something else under the names of a table's parts.

    Raises:
        UserError: if it has.
    """
    for path in [*folder.glob("part-*.parquet"), *folder.glob("part-*.safetensors")]:
        if not is_part(path):
            raise UserError(f"{path} is of something else, and a table would replace it: choose another folder")


def is_part(path: Path) -> bool:
    """Return whether a file is a part of an embedding table, perhaps of one that was interrupted."""
    try:
        if path.suffix == ".parquet":
            return pq.read_schema(path).names == ["key", "sample_id", "group_id", "metadata"]
        with safe_open(path, "pt") as file:
            return any(name.startswith("present.") for name in file.keys())  # noqa: SIM118 - no mapping
    except (OSError, pa.ArrowException, SafetensorError):
        return False


@torch.no_grad()
def embed_dataset(
    model: ContrastiveModel,
    dataset: ShardDataset | MixtureDataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    label: str = "embedding",
    rows: range | None = None,
    name: str = "",
) -> EmbeddingTable:
    """Embed every sample of a data set, or those of `rows`, in order. The model is put in evaluation mode and left as it was.

    Args:
        name: of the data, for messages: a split.

    Raises:
        UserError: for data without samples, a sample that cannot be decoded, an embedding that is not finite.
    """
    if not len(dataset):
        raise UserError(f"{name or 'data'}: there are no samples to embed")
    positions = range(len(dataset)) if rows is None else rows
    was_training = model.training
    model.eval()
    task = progress.add_task(label, total=len(positions), note="") if progress else None
    columns: dict[str, list[Any]] = {"sample_ids": [], "group_ids": [], "metadata": []}
    fields: dict[str, list[Tensor]] = {field: [] for field in dataset.modalities}
    present: dict[str, list[Tensor]] = {field: [] for field in dataset.modalities}
    undecodable: list[dict[str, str]] = []
    curvature: float | None = None
    for batch in all_batches(dataset, batch_size, num_workers, rows):
        embeddings = model(batch.to(torch.device(device)))
        batch_table = EmbeddingTable(
            {field: embeddings.fields[field].float().cpu() for field in fields},
            batch.present, batch.sample_ids, batch.group_ids, batch.metadata,
            curvature := None if embeddings.curvature is None else float(embeddings.curvature),
        )  # fmt: skip
        num_done = len(columns["metadata"])
        batch_table.check_finite(name or label, lambda row, num_done=num_done: dataset.shard_name(positions[num_done + row]))  # type: ignore[misc]
        for field in fields:
            fields[field].append(batch_table.fields[field])
            present[field].append(batch.present[field])
        columns["sample_ids"].append(batch.sample_ids)
        columns["group_ids"].append(batch.group_ids)
        columns["metadata"].extend(batch.metadata)
        undecodable += batch.replaced
        if progress and task is not None:
            progress.advance(task, len(batch))
    if progress and task is not None:
        progress.remove_task(task)
    model.train(was_training)
    if undecodable:
        ratio = f"{len(undecodable)} of {len(positions)} samples"
        logger.warning("%s: %s cannot be decoded and are left out, as %s", name or label, ratio, undecodable[0]["error"])
    return EmbeddingTable(
        {field: torch.cat(parts) for field, parts in fields.items()},
        {field: torch.cat(parts) for field, parts in present.items()},
        torch.cat(columns["sample_ids"]),
        torch.cat(columns["group_ids"]),
        columns["metadata"],
        curvature,
    )


def embed_together(model: ContrastiveModel, dataset: ShardDataset, group: dist.ProcessGroup, **options: Any) -> EmbeddingTable:
    """Embed a data set with all ranks of a group, as `embed_dataset`: each embeds its share, in the same number of batches. The
    first returns the complete table, the others their share."""
    rank, world_size, n = dist.get_rank(group), dist.get_world_size(group), len(dataset)
    start, stop = n * rank // world_size, n * (rank + 1) // world_size
    share = range(start, start + math.ceil(n / world_size))  # of the same length on every rank: it may overlap the next
    own_table = embed_dataset(model, dataset, rows=share, **options).first(stop - start)
    tables: list[Any] | None = None if rank else [None] * world_size
    dist.gather_object(own_table, tables, group_dst=0, group=group)
    return joined(tables) if tables else own_table


def joined(tables: Sequence[EmbeddingTable]) -> EmbeddingTable:
    """Concatenate tables."""
    return EmbeddingTable(
        {field: torch.cat([table.fields[field] for table in tables]) for field in tables[0].fields},
        {field: torch.cat([table.present[field] for table in tables]) for field in tables[0].present},
        torch.cat([table.sample_ids for table in tables]),
        torch.cat([table.group_ids for table in tables]),
        [entry for table in tables for entry in table.metadata],
        tables[0].curvature,
    )


@torch.no_grad()
def embed_texts(model: ContrastiveModel, field: str, texts: Iterable[str], device: torch.device | str = "cpu") -> Tensor:
    """Return embeddings [N, D] of prompts, read by a text field's modality and tower, in evaluation mode.

    Raises:
        UserError: for an embedding that is not finite.
    """
    modality, texts = model.modality(field), list(texts)
    assert isinstance(modality, TextModality)
    batch = modality.collate([modality.tokens(text) for text in texts])
    was_training = model.training
    model.eval()
    no_ids = torch.full((len(batch),), ABSENT)
    prompts = Batch({field: batch}, {field: no_ids == ABSENT}, no_ids, no_ids, [{}] * len(batch))
    embeddings = model(prompts.to(torch.device(device))).fields[field].float().cpu()
    check_finite(embeddings, lambda row: f"field {field!r}, text {texts[row][:60]!r}")
    model.train(was_training)
    return embeddings
