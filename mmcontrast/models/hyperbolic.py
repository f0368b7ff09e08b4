"""The further parameters of a model with hyperbolic scores: the curvature, and the length of each tower's embeddings."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

RANGE = 10.0  # the curvature stays within this factor of its initial value


class TangentSpace(nn.Module):
    """Embeddings as tangent vectors at the origin of hyperbolic space, α · projection (MERU, arXiv:2304.09172): α, one for each
    tower, is initialized to 1/√D, so that rows of D numbers of about unit variance have about unit length.

    Args:
        towers: their names.
        embed_dim: D.
        curvature: the initial c > 0.
        learn_curvature: False: it stays fixed.

    Attributes:
        of_start: whether curvature and lengths come from a start.
    """

    of_start = False

    def __init__(self, towers: Iterable[str], embed_dim: int, curvature: float, learn_curvature: bool) -> None:
        super().__init__()
        start = math.log(curvature)
        self.bounds = start - math.log(RANGE), start + math.log(RANGE)
        # shape [1], as the logit scale's: sharded data parallelism refuses parameters without a dimension
        self.log_curvature = nn.Parameter(torch.full((1,), start), requires_grad=learn_curvature)
        self.log_scale = -0.5 * math.log(embed_dim)
        self.log_scales = nn.ParameterDict()
        self.add(towers)

    def add(self, towers: Iterable[str]) -> None:
        """Add towers, with the initial length."""
        for name in towers:
            self.log_scales[name] = nn.Parameter(torch.full((1,), self.log_scale))

    @torch.no_grad()
    def begin_with(self, towers: Iterable[str], start: "TangentSpace | None") -> None:
        """Add the towers of a start; if it is hyperbolic, take over their lengths, its curvature and its range."""
        self.add(towers)
        if start is not None:
            self.of_start, self.bounds = True, start.bounds
            self.log_curvature.copy_(start.log_curvature)
            for name in towers:
                self.log_scales[name].copy_(start.log_scales[name])

    @property
    def curvature(self) -> Tensor:
        """Return c [], with gradient."""
        return self.log_curvature.exp().squeeze(0)

    def tangents(self, tower: str, projected: Tensor) -> Tensor:
        """Return the embeddings [N, D] of a tower's projections [N, D]."""
        return projected * self.log_scales[tower].exp().to(projected.dtype)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the curvature in its range, and every α at 1 or below."""
        self.log_curvature.clamp_(*self.bounds)
        for log_scale in self.log_scales.values():
            log_scale.clamp_(max=0.0)
