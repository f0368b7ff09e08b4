"""Embedding tables made by hand."""

from pathlib import Path

import torch
from torch import Tensor

from mmcontrast.evaluation import EmbeddingTable


def write_table(
    folder: Path, fields: dict[str, Tensor], groups: Tensor | None = None, ids: Tensor | None = None, **options
) -> EmbeddingTable:
    """Write rows [N, D] of fields, whose zero rows are absent; ids from 1000 on, which are the groups by default."""
    n = len(next(iter(fields.values())))
    ids = torch.arange(n) + 1000 if ids is None else ids
    present = {field: rows.any(1) for field, rows in fields.items()}
    metadata = [
        {"key": f"k{row}", "caption": f"caption {row}", **{name: v[row] for name, v in options.items()}} for row in range(n)
    ]
    made = EmbeddingTable(fields, present, ids, ids if groups is None else groups, metadata)
    made.write(folder)
    return made
