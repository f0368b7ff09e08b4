"""Links: what stands between the product of two rows and their score, z = scale · φ(x·y; θ) + bias."""

import math
from typing import Protocol

import torch
from torch import Tensor

FARTHEST = math.asinh(2.0**15)  # √c‖v‖ of a point: beyond, products overflow in fp32 (MERU's bound)


class Link(Protocol):
    """An elementwise function φ of products, with one parameter θ [], and how rows are prepared for the product."""

    parameter: Tensor

    def rows(self, x: Tensor, columns: bool) -> Tensor:
        """Return x [N, D] as the product wants them, of the anchors' or of the columns' side. Differentiable."""

    def value(self, product: Tensor) -> Tensor:
        """Return φ. Differentiable by the product and the parameter."""

    def slopes(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂φ/∂product and ∂φ/∂θ."""


class Lorentz:
    """Negative distance in the hyperboloid model of hyperbolic space (MERU, arXiv:2304.09172): −acosh(−c ⟨x, y⟩) / √c.

    Embeddings v are tangent vectors at the origin, any vectors, which the exponential map lifts: x₀ = sinh(√c‖v‖) v / (√c‖v‖),
    x_t = √(1/c + ‖x₀‖²), ⟨x, y⟩ = x₀·y₀ − x_t y_t. Where two points meet the slope is taken as 0. √c‖v‖ counts as 11.09 at
    most.

    Args:
        curvature: c > 0, a number or a learnt tensor []; whoever learns it keeps it above 0.
    """

    def __init__(self, curvature: float | Tensor = 1.0) -> None:
        if isinstance(curvature, Tensor):  # its value is not looked at: that would wait for the device
            fits, self.parameter = not curvature.dim(), curvature
        else:
            fits, self.parameter = 0 < float(curvature) < math.inf, torch.tensor(float(curvature), dtype=torch.float64)
        if not fits:
            raise ValueError(f"curvature is {curvature}, it must be one number above 0")

    def lifted(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the point above tangent vectors [N, D]: its place in space [N, D], and in time [N, 1]."""
        c = self.parameter.to(v.device, v.dtype)
        length = v.square().sum(-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny).sqrt() * c.sqrt()
        space = v * (torch.sinh(length.clamp_max(FARTHEST)) / length)
        return space, (1.0 / c + space.square().sum(-1, keepdim=True)).sqrt()

    def rows(self, x: Tensor, columns: bool) -> Tensor:
        space, time = self.lifted(x.to(torch.promote_types(x.dtype, torch.float32)))
        return torch.cat([space, -time if columns else time], -1)

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the scores −distance [N, M] of tangent vectors [N, D] and [M, D], all at once."""
        return self.value(self.rows(x, columns=False) @ self.rows(y, columns=True).T)

    def value(self, product: Tensor) -> Tensor:
        c = self.parameter.to(product.device, product.dtype)
        u = -c * product
        apart = u > 1.0
        return -torch.acosh(torch.where(apart, u, 2.0)).where(apart, 0.0) / c.sqrt()

    def slopes(self, product: Tensor) -> tuple[Tensor, Tensor]:
        c = self.parameter.detach().to(product.device, product.dtype)
        u = -c * product
        apart = u > 1.0
        safe = torch.where(apart, u, 2.0)
        steep = 1.0 / (safe.square() - 1.0).sqrt()
        by_c = torch.acosh(safe) / (2.0 * c * c.sqrt()) + product * steep / c.sqrt()
        return (c.sqrt() * steep).where(apart, 0.0), by_c.where(apart, 0.0)
