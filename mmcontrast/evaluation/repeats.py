"""Finds samples that are equal: rows of a table about one picture, which count as each other's wrong answers."""

import numpy as np
import torch
from torch import Tensor

from mmcontrast.evaluation.embed import EmbeddingTable

ROWS = 16_384  # that are hashed together


def repeats_note(table: EmbeddingTable, split: str, field: str) -> str | None:
    """Return a sentence about the samples of a field whose embedding is, bit for bit, that of a sample of another group; None
    if there are none."""
    present = table.present[field].nonzero().squeeze(1)
    if len(present) < 2:
        return None
    rows, groups = table.fields[field][present], table.group_ids[present].numpy()
    keys = np.concatenate([_hash(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)])
    order = np.lexsort((groups, keys))
    keys, groups = keys[order], groups[order]
    same = keys[1:] == keys[:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    ends = np.append(starts[1:], len(keys)) - 1
    is_of_other = np.repeat(groups[starts] != groups[ends], ends - starts + 1)
    number = int(is_of_other.sum())
    if not number:
        return None
    return (
        f"{split}: {number} of {len(keys)} samples have the {field} of a sample of another group, and each counts as a wrong"
        " answer for the others: give rows about one thing one group_id"
    )


def first_of_repeats(rows: Tensor, groups: Tensor) -> Tensor:
    """Return the positions of rows [N, D], ascending, without those that are, bit for bit, an earlier one of their group."""
    keys = np.concatenate([_hash(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)])
    _, first = np.unique(np.stack([groups.cpu().numpy().astype(np.uint64), keys], 1), axis=0, return_index=True)
    return torch.from_numpy(np.sort(first))


def _hash(rows: Tensor) -> np.ndarray:
    """Return a number of each row [N, D], the same for rows that are equal bit for bit."""
    bits = rows.float().cpu().contiguous().numpy().view(np.uint32).astype(np.uint64)
    factors = np.random.default_rng(0).integers(1, 2**63, bits.shape[1], dtype=np.uint64) | np.uint64(1)
    return (bits * factors).sum(1, dtype=np.uint64)
