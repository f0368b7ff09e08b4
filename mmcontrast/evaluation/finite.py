"""The check that every embedding passes right after it was made or read."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmcontrast.errors import UserError


def check_finite(rows: Tensor, name_of: Callable[[int], str]) -> None:
    """Raise an error for the first row of embeddings [N, D] that holds NaN or infinity.

    Args:
        name_of: names a row, for the message.

    Raises:
        UserError: if any is not finite: metrics would rank it first, or nowhere, without a word.
    """
    finite = torch.isfinite(rows).all(1)
    if not finite.all():
        bad = finite.logical_not().nonzero().squeeze(1).tolist()
        others = f", nor are {len(bad) - 1} others of {len(rows)}" if len(bad) > 1 else ""
        raise UserError(
            f"{name_of(bad[0])}: the embedding is not finite (NaN or infinity){others}: the model's weights are not, or the"
            " towers overflow in this precision; use a sound checkpoint, or fp32"
        )
