"""Find exact nearest neighbours by inner product: tiles of scores, and a running top k that most of a tile never reaches.

Shapes: Q queries, C candidates, D dimensions, k neighbours; a tile is [R, T].
"""

import torch
from torch import Tensor

ROWS, COLUMNS = 256, 8192  # of a tile; on a GPU sixteen times the rows


@torch.no_grad()
def nearest(queries: Tensor, candidates: Tensor, k: int, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the k candidates with the greatest inner products, exactly, best first; of equal ones the lower index first.

    Args:
        queries, candidates: [Q, D] and [C, D] on one device. Scores are float32, or float64 if both are.
        exclude: int64 [Q], for each query a candidate that does not count (itself, say); −1: none.

    Returns:
        (scores [Q, k], indices int64 [Q, k]) on that device. O((Q + C)·D) memory.

    Raises:
        ValueError: if there are not k candidates for every query; for a row that is not finite.
    """
    for name, rows_of_side in (("queries", queries), ("candidates", candidates)):
        if not (finite := torch.isfinite(rows_of_side).all(1)).all():
            raise ValueError(f"{name}: row {int(finite.logical_not().nonzero()[0])} is not finite (NaN or infinity)")
    excluded = exclude is not None and bool((exclude >= 0).any())
    if not 1 <= k <= len(candidates) - excluded:
        others = " beside the excluded one" if excluded else ""
        raise ValueError(f"k = {k}: it must be from 1 to the {len(candidates) - excluded} candidates{others}")
    dtype = torch.promote_types(torch.promote_types(queries.dtype, candidates.dtype), torch.float32)
    scores = torch.full((len(queries), k), -torch.inf, dtype=dtype, device=queries.device)
    indices = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    height = ROWS if queries.device.type == "cpu" else 16 * ROWS
    for start in range(0, len(candidates), COLUMNS):
        columns = candidates[start : start + COLUMNS].to(dtype).T
        for first in range(0, len(queries), height):
            rows = slice(first, first + height)
            tile = queries[rows].to(dtype) @ columns
            if exclude is not None:
                column = exclude[rows] - start
                rows_with_excluded = ((column >= 0) & (column < tile.shape[1])).nonzero().squeeze(1)
                tile[rows_with_excluded, column[rows_with_excluded]] = -torch.inf
            _merge(scores[rows], indices[rows], tile, start)
    return scores, indices


def _merge(scores: Tensor, indices: Tensor, tile: Tensor, start: int) -> None:
    """Merge a tile [R, T] into the running top k [R, k]. The tile's columns come after all earlier ones, so that ties are lost
    to these."""
    k = scores.shape[1]
    better = (tile.amax(1) > scores[:, -1]).nonzero().squeeze(1)
    if not len(better):
        return
    values, columns = _best(tile if len(better) == len(tile) else tile[better], k)
    values, order = torch.cat([scores[better], values], 1).sort(dim=1, descending=True, stable=True)
    columns = torch.cat([indices[better], columns + start], 1)
    scores[better] = values[:, :k]
    indices[better] = columns.gather(1, order[:, :k])


def _best(tile: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the top k of each row, or all if there are fewer, ordered by index. `topk` does not say which of equal scores it
    takes, so rows where the (k + 1)-th score equals the k-th are sorted completely."""
    values, columns = tile.topk(min(k + 1, tile.shape[1]), dim=1)
    if values.shape[1] > k:
        doubtful = values[:, k - 1] == values[:, k]
        values, columns = values[:, :k], columns[:, :k]
        if doubtful.any():
            sorted_scores, indices = tile[doubtful].sort(dim=1, descending=True, stable=True)
            values[doubtful], columns[doubtful] = sorted_scores[:, :k], indices[:, :k]
    columns, order = columns.sort(dim=1)
    return values.gather(1, order), columns
