"""Links: functions φ between the product of two rows and their score, z = scale · φ(x·y; θ) + bias."""

import math
from typing import Protocol

import torch
from torch import Tensor

FARTHEST = math.asinh(2.0**15)  # the largest √c‖v‖ of a point: beyond it products overflow in fp32 (MERU's bound)


class Link(Protocol):
    """An elementwise function φ of products, with one parameter θ [], and how rows are prepared for the product."""

    parameter: Tensor

    def rows(self, x: Tensor, columns: bool) -> Tensor:
        """Return x [N, D] prepared for the product, as anchors or as columns. Differentiable."""

    def value(self, product: Tensor) -> Tensor:
        """Return φ. Differentiable by the product and the parameter."""

    def slopes(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂φ/∂product and ∂φ/∂θ."""


class Lorentz:
    """The negative distance in the hyperboloid model of hyperbolic space (MERU, arXiv:2304.09172): −acosh(−c ⟨x, y⟩) / √c.

    Embeddings v are tangent vectors at the origin, any vectors, which the exponential map lifts: x₀ = sinh(√c‖v‖) v / (√c‖v‖),
    x_t = √(1/c + ‖x₀‖²), ⟨x, y⟩ = x₀·y₀ − x_t y_t. The slope at distance 0 is 0. √c‖v‖ is at most 11.09.

    Args:
        curvature: c > 0, a number or a learnt tensor [], which must stay above 0.
    """

    def __init__(self, curvature: float | Tensor = 1.0) -> None:
        if isinstance(curvature, Tensor):  # its value is not checked: that would wait for the device
            valid, self.parameter = not curvature.dim(), curvature
        else:
            valid, self.parameter = 0 < float(curvature) < math.inf, torch.tensor(float(curvature), dtype=torch.float64)
        if not valid:
            raise ValueError(f"curvature is {curvature}, it must be one number above 0")

    def lifted(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points of tangent vectors [N, D]: their space [N, D] and time [N, 1] coordinates."""
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
        distinct = u > 1.0
        return -torch.acosh(torch.where(distinct, u, 2.0)).where(distinct, 0.0) / c.sqrt()

    def slopes(self, product: Tensor) -> tuple[Tensor, Tensor]:
        c = self.parameter.detach().to(product.device, product.dtype)
        u = -c * product
        distinct = u > 1.0
        safe = torch.where(distinct, u, 2.0)
        slope = 1.0 / (safe.square() - 1.0).sqrt()
        by_c = torch.acosh(safe) / (2.0 * c * c.sqrt()) + product * slope / c.sqrt()
        return (c.sqrt() * slope).where(distinct, 0.0), by_c.where(distinct, 0.0)
