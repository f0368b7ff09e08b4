"""Embedding data with a model: a table of any number of samples, by one process or by many."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmcontrast.data import ShardDataset, ShardOptions, Shards
from mmcontrast.embedder import identity, load
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, TableSlice, embed_dataset
from mmcontrast.evaluation.embed import MANIFEST
from mmcontrast.training.distributed import end_with_torchrun
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
    """Embeds shards and writes the table, slice by slice; True if it is complete. Slices that are there are not embedded again,
    so what was killed goes on; ranks that torchrun started take every W-th slice each, and need not talk to each other.

    Args:
        name, checkpoint, pretrained, precision, trust_code, width: as `load`.
        shards: as `Embedder.dataset`.
        part: this slice alone.
        slice_rows: about the samples of a slice, that is of what a kill may lose. A table that was begun keeps its own.

    Raises:
        UserError: as `load`; for shards that are not there or have no field of the model's; if `out` holds another table.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if part and world_size > 1:
        raise UserError(f"--part {part.number}/{part.of}: the {world_size} ranks of torchrun already share the slices")
    end_with_torchrun()
    about = about_model(name, checkpoint, pretrained, precision)
    given = ShardOptions.of(shards)
    about |= {"width": width, "shards": given.shown()}
    about["data"] = ShardDataset(given.shards, {}, {}, files=given.files, select=given.select).digest
    begun = TableSlice.number_in(out)
    own = [part] if part else TableSlice.all(out, begun)[rank::world_size] if begun else []
    if not begun and ((out / MANIFEST).exists() or (out.exists() and not out.is_dir())):
        EmbeddingTable.refuse_to_overwrite(out)
    for one in own[:1]:
        one.check(about)
    if begun and all(one.record.exists() for one in own):
        return TableSlice(out, 1, begun).complete()
    if device in (None, "cuda") and world_size > 1 and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    embedder = load(
        name, checkpoint=about["checkpoint"], pretrained=pretrained, device=device, precision=precision,
        trust_code=trust_code, width=width,
    )  # fmt: skip
    dataset = embedder.dataset(shards)
    if not begun and not part:
        own = TableSlice.all(out, slices_of(len(dataset), slice_rows or SLICE_ROWS, world_size))[rank::world_size]
    complete = False
    for one in own[:1]:
        one.check(about)
    with make_progress(rank == 0) as progress:
        for one in own:
            if not one.record.exists():
                embed = partial(
                    embed_dataset, embedder.model, dataset, batch_size=batch_size, num_workers=num_workers,
                    device=embedder.device, progress=progress, label=f"embedding, slice {one.number} of {one.of}",
                    name=str(given.shards),
                )  # fmt: skip
                with embedder.autocast():
                    tables = (embed(rows=rows) for rows in one.pieces(len(dataset)))
                    one.write(tables, len(dataset), about)
            complete = one.complete()
    return complete


def about_model(name: str | Path, checkpoint: str, pretrained: str | None = None, precision: str = "fp32") -> dict[str, Any]:
    """What a table's manifest says of the model that made it.

    Raises:
        UserError: for a run without such a checkpoint.
    """
    return identity(name, checkpoint, pretrained) | {"precision": precision}


def slices_of(samples: int, slice_rows: int, world_size: int) -> int:
    """As many for each rank, of at most `slice_rows` samples, none of them empty."""
    return max(1, min(samples, world_size * math.ceil(samples / (world_size * slice_rows))))
