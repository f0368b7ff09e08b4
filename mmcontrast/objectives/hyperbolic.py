"""Hyperbolic scores, and the entailment of particular samples in the cones of general ones (MERU, arXiv:2304.09172)."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mmcontrast.score import Lorentz

MIN_RADIUS = 0.1  # of the cones' apertures, as in MERU
EDGE = 1e-6  # the distance that cosines keep from ±1, where the slope of their angle is infinite


class Hyperbolic(Lorentz):
    """The score −logit_scale · distance; embeddings are any vectors (tangent at the origin), not unit rows.

    Args:
        curvature: c > 0; a number, or a learnt tensor [].
        general: the field whose samples are more general than those of the others, usually text: a cone at each holds its
            partner, or `entailment` times the angle outside is added to the loss.
        entailment: the weight of that term.
    """

    def __init__(self, curvature: float | Tensor = 1.0, general: str | None = None, entailment: float = 0.2) -> None:
        super().__init__(curvature)
        if not (entailment >= 0 and math.isfinite(entailment)):
            raise ValueError(f"entailment is {entailment}, it must be ≥ 0")
        self.general, self.entailment = general, entailment

    def at(self, curvature: Tensor) -> "Hyperbolic":
        """Return the same score with another curvature."""
        return Hyperbolic(curvature, self.general, self.entailment)

    def check(self, fields: Collection[str]) -> None:
        """Check that the general field is one of the contrasted fields.

        Raises:
            ValueError: if it is not.
        """
        if self.general is not None and self.general not in fields:
            raise ValueError(f"score: general is {self.general!r}, which is none of the fields {', '.join(fields)}")

    def penalty(self, rows: Mapping[str, Tensor]) -> Tensor | None:
        """Return entailment · max(0, angle − aperture) [n] of a term's two fields; None if neither is the general one."""
        if self.general is None or self.general not in rows:
            return None
        vectors = {field: v.to(torch.promote_types(v.dtype, torch.float32)) for field, v in rows.items()}
        general = vectors.pop(self.general)
        (particular,) = vectors.values()
        (x, x_time), (y, y_time) = self.lifted(general), self.lifted(particular)
        c = self.parameter.to(x.device, x.dtype)
        inner = c * ((x * y).sum(-1, keepdim=True) - x_time * y_time)
        length = x.norm(dim=-1, keepdim=True).clamp_min(EDGE)
        cosine = (y_time + x_time * inner) / (length * (inner.square() - 1.0).clamp_min(EDGE).sqrt())
        angle = cosine.clamp(-1.0 + EDGE, 1.0 - EDGE).acos()
        aperture = (2.0 * MIN_RADIUS / (length * c.sqrt())).clamp(-1.0 + EDGE, 1.0 - EDGE).asin()
        return self.entailment * (angle - aperture).clamp_min(0.0).squeeze(-1)
