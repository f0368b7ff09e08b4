"""Check embeddings for NaN and infinity, and for their length, right after they are computed or read."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmcontrast.errors import UserError

LENGTH = 0.01  # by which a unit row's length may differ from 1: in bf16 it does by 0.004


def check_finite(rows: Tensor, name_of: Callable[[int], str]) -> None:
    """Raise an error for the first row of embeddings [N, D] that holds NaN or infinity.

    Args:
        name_of: names a row, for the message.

    Raises:
        UserError: if any is not finite: metrics would silently rank it first, or nowhere.
    """
    finite = torch.isfinite(rows).all(1)
    if not finite.all():
        bad_rows = finite.logical_not().nonzero().squeeze(1).tolist()
        others = f", nor are {len(bad_rows) - 1} others of {len(rows)}" if len(bad_rows) > 1 else ""
        raise UserError(
            f"{name_of(bad_rows[0])}: the embedding is not finite (NaN or infinity){others}: the model's weights are not, or"
            " the towers overflow in this precision; use a sound checkpoint, or fp32"
        )


def check_unit(rows: Tensor, name_of: Callable[[int], str], zero_too: bool = False) -> None:
    """Raise an error for the first row of embeddings [N, D] whose length is not 1.

    Args:
        name_of: names a row, for the message.
        zero_too: a row may be zero, as that of a sample that lacks a field.

    Raises:
        UserError: if any is not: products of such rows are no cosines.
    """
    lengths = rows.float().norm(dim=1)
    wrong = ((lengths - 1).abs() > LENGTH) & ~(zero_too & (lengths == 0))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise UserError(
            f"{name_of(row)}: the embedding's length is {lengths[row]:.4g}, not 1 ({int(wrong.sum())} of {len(rows)} are so):"
            " normalize the rows first, as torch.nn.functional.normalize does"
        )
