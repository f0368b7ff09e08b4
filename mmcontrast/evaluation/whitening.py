"""Whitening: rows whose dimensions are uncorrelated and of one variance, then of unit length (Su et al., arXiv:2103.15316)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.errors import UserError


@dataclass(frozen=True)
class Whitening:
    """A map of rows [N, D] to unit rows [N, K]: (row − mean) · matrix, normalized.

    Attributes:
        mean: [D].
        matrix: [D, K].
    """

    mean: Tensor
    matrix: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return F.normalize((rows - self.mean) @ self.matrix, dim=1)


@torch.no_grad()
def whiten(
    rows: Tensor, *, kind: Literal["pca", "zca"] = "pca", components: int | None = None, epsilon: float = 1e-3
) -> Whitening:
    """Fit the mean and the matrix to rows [N, D]: U (Λ + ε λ̄)^{−1/2}, of the covariance U Λ Uᵀ with mean eigenvalue λ̄.
    Rows that are to be compared take the same matrix: for retrieval between two fields, fit it to the rows of both.

    Args:
        kind: "pca" gives the components themselves; "zca" rotates them back, so that rows stay close to the originals.
        components: K, those with the most variance; default: all. With "zca" the others are left out, and K stays D.
        epsilon: ε, shrinks the weight of dimensions with next to no variance.

    Raises:
        UserError: for invalid options, and for rows without any variance.
    """
    dim = rows.shape[1]
    number = dim if components is None else components
    if kind not in ("pca", "zca") or not 1 <= number <= dim or epsilon < 0:
        raise UserError(
            f"whitening {kind!r} with {number} components and epsilon {epsilon}: it is pca or zca, with 1 to {dim} components, "
            "and epsilon at least 0"
        )
    centred = rows.double() - rows.double().mean(0)
    eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(rows)))
    variances = eigenvalues.clamp(min=0) + epsilon * eigenvalues.mean()
    kept = slice(dim - number, dim)  # eigenvalues ascend
    if not float(variances[kept].min()) > torch.finfo(torch.float64).eps * float(eigenvalues[-1]):
        raise UserError(
            f"whitening: {len(rows)} rows have no variance in some of {number} components: give fewer, or an epsilon"
        )
    matrix = vectors[:, kept] * variances[kept].rsqrt()
    matrix = matrix @ vectors[:, kept].T if kind == "zca" else matrix.flip(1)
    return Whitening(rows.double().mean(0).to(rows.dtype), matrix.to(rows.dtype))
