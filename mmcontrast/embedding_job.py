"""Embed data with a model into a table of any number of samples, by one process or by many."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmcontrast.data import ShardDataset, ShardOptions, Shards
from mmcontrast.data.files import tell_of_newer
from mmcontrast.data.row_ids import row_ids
from mmcontrast.embedder import identity, load
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, TableSlice, embed_dataset
from mmcontrast.evaluation.embed import MANIFEST, refuse_other_parts
from mmcontrast.modalities import TextModality
from mmcontrast.training.distributed import end_with_torchrun, rank_of_launcher
from mmcontrast.training.log import make_progress

SLICE_ROWS = 50_000  # samples


def embed_shards(
    name: str | Path,
    shards: Shards,
    out: Path,
    *,
    part: TableSlice | None = None,
    checkpoint: str = "last",
    pretrained: str | None = None,
    device: str | None = None,
    precision: str = "fp32",
    batch_size: int = 256,
    num_workers: int = 0,
    slice_rows: int | None = None,
    trust_code: bool = False,
    width: int | None = None,
) -> bool:
    """Embed shards and write the table, slice by slice; return whether it is complete. Existing slices are not embedded again,
    so a killed job can be continued; ranks of torchrun take every W-th slice each, without communication.

    Args:
        name, checkpoint, pretrained, precision, trust_code, width: as `load`.
        shards: as `Embedder.dataset`.
        part: embed only this slice.
        slice_rows: samples of a slice, approximately: a kill loses at most one slice. A table that was begun keeps its slices.

    Raises:
        UserError: as `load`; for missing shards, or without a field of the model's; if `out` holds another table.
    """
    rank, world_size = rank_of_launcher()
    if part and world_size > 1:
        raise UserError(f"--part {part.number}/{part.of}: the {world_size} ranks of torchrun already share the slices")
    end_with_torchrun()
    options = ShardOptions.of(shards)
    description = about_table(name, options, checkpoint, pretrained, precision, width)
    samples = ShardDataset(options.shards, {}, {}, files=options.files, select=options.select)
    description["data"] = samples.digest
    if rows := row_ids(samples.shards):
        description["row_ids"] = rows
    num_slices = TableSlice.number_in(out)
    own_slices = [] if part is None else [part]
    if num_slices and part is None:
        own_slices = TableSlice.all(out, num_slices)[rank::world_size]
    if not num_slices:  # another rank may write its first slice at this moment
        refuse_other_parts(out)
    if not num_slices and ((out / MANIFEST).exists() or (out.exists() and not out.is_dir())):
        EmbeddingTable.refuse_to_overwrite(out)
    for table_slice in own_slices[:1]:
        table_slice.check(description)
    if made := [table_slice.record.stat().st_mtime for table_slice in own_slices if table_slice.record.exists()]:
        tell_of_newer(((shard.name, min(made)) for shard in samples.shards), out)
    if num_slices and all(table_slice.record.exists() for table_slice in own_slices):
        return TableSlice(out, 1, num_slices).complete()
    if device in (None, "cuda") and world_size > 1 and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    embedder = load(
        name, checkpoint=description["checkpoint"], pretrained=pretrained, device=device, precision=precision,
        trust_code=trust_code, width=width,
    )  # fmt: skip
    dataset = embedder.dataset(shards)
    if not num_slices and not part:
        own_slices = TableSlice.all(out, slices_of(len(dataset), slice_rows or SLICE_ROWS, world_size))[rank::world_size]
    complete = False
    for table_slice in own_slices[:1]:
        table_slice.check(description)
    description["texts"] = [field for field, modality in dataset.modalities.items() if isinstance(modality, TextModality)]
    with make_progress(rank == 0) as progress:
        for table_slice in own_slices:
            if not table_slice.record.exists():
                embed = partial(
                    embed_dataset, embedder.model, dataset, batch_size=batch_size, num_workers=num_workers,
                    device=embedder.device, progress=progress, name=str(options.shards),
                    label=f"embedding, slice {table_slice.number} of {table_slice.of}",
                )  # fmt: skip
                with embedder.autocast():
                    tables = (embed(rows=rows) for rows in table_slice.pieces(len(dataset)))
                    table_slice.write(tables, len(dataset), description)
            complete = table_slice.complete()
    return complete


def about_table(
    name: str | Path, shards: ShardOptions, checkpoint: str, pretrained: str | None, precision: str, width: int | None
) -> dict[str, Any]:
    """Return what a table's manifest says of its model and its shards, without opening them.

    Raises:
        UserError: for a run without such a checkpoint.
    """
    about = identity(name, checkpoint, pretrained) | {"precision": precision}
    return about | {"width": width, "shards": shards.shown()}


def slices_of(samples: int, slice_rows: int, world_size: int) -> int:
    """Return a number of slices: as many for each rank, of at most `slice_rows` samples, none of them empty."""
    return max(1, min(samples, world_size * math.ceil(samples / (world_size * slice_rows))))
