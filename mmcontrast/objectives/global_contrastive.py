"""Global contrastive losses, which estimate each anchor's mean over negatives from all of its visits, not from one batch."""

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.objectives.sample_table import SampleTable
from mmcontrast.score import Direction, LogSumExp
from mmcontrast.score.ranks import Everyone

Temperature = Literal["learnable", "constant", "individual"]


class GlobalContrastive(Objective):
    """The loss τ (ρ + log(ε + u)), where u is a running mean of ℓ = mean_neg e^{z − p}, kept for every sample and direction:
    u ← (1 − γ) u + γ ℓ, and ℓ on the first visit. Its gradient is the estimator's, τ ∂ℓ / (ε + u) and (ρ + log(ε + u)) ∂τ;
    small batches then have almost the gradients of large ones. SogCLR (arXiv:2202.12387), iSogCLR (2305.11965), FastCLIP
    (2407.01445).

    It needs sample ids. Its memory of S samples is 8 S bytes and 4 S for each direction (individual temperatures: 12 S), up to
    four times that as a hash table, in its `state_dict`; the same on every rank, unless `table.divide` gives each rank a share.
    Call it in training mode; evaluation does not change the memory.

    Args:
        gamma: the weight of the newest visit, in (0, 1], after the first `decay` of training. Until then it falls from 1 on
            a cosine, as `progress` says.
        temperature: "learnable": one τ, 1 / logit scale, as the model learns it (FastCLIP v3); "constant": the same without
            gradient; "individual": one for every sample and direction, which starts there (iSogCLR).
        rho: determines where τ settles: the KL divergence, in nats, of the negatives' weights e^z from uniform. It
            must be less than the logarithm of the number of samples that look alike.
        epsilon: the ε in the loss.
        temperature_lr, temperature_momentum, temperature_range: of individual ones.
    """

    reductions = (LogSumExp(),)
    stateful: ClassVar[bool] = True

    def __init__(
        self,
        gamma: float = 0.2,
        temperature: Temperature = "learnable",
        rho: float = 6.5,
        epsilon: float = 1e-14,
        decay: float = 0.5,
        temperature_lr: float = 0.01,
        temperature_momentum: float = 0.9,
        temperature_range: tuple[float, float] = (0.01, 1.0),
    ) -> None:
        super().__init__()
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}, it must be in (0, 1]")
        if temperature not in ("learnable", "constant", "individual"):
            raise ValueError(f'temperature is {temperature!r}, it must be "learnable", "constant" or "individual"')
        if not (math.isfinite(rho) and epsilon > 0 and temperature_lr > 0):
            raise ValueError(f"rho is {rho}, epsilon {epsilon}, temperature_lr {temperature_lr}: finite, the others > 0")
        if not (0 <= decay <= 1 and 0 <= temperature_momentum < 1):
            raise ValueError(f"decay is {decay}, temperature_momentum {temperature_momentum}: in [0, 1] and [0, 1)")
        low, high = temperature_range
        if not 0 < low <= high:
            raise ValueError(f"temperature_range is {list(temperature_range)}: two numbers, 0 < lowest ≤ highest")
        self.last_gamma, self.temperature, self.rho, self.epsilon, self.decay = gamma, temperature, rho, epsilon, decay
        self.temperature_lr, self.temperature_momentum = temperature_lr, temperature_momentum
        self.lowest, self.highest = low, high
        self.table = SampleTable()
        self._temperatures: dict[str, Tensor] = {}  # of the anchors of the current forward

    @property
    def gamma(self) -> float:
        """Return γ at the current progress."""
        done = min(1.0, self.progress / self.decay) if self.decay else 1.0
        return self.last_gamma + (1 - self.last_gamma) * 0.5 * (1 + math.cos(math.pi * done))

    def anchor_scale(self, name: str, scale: Tensor, sample_ids: Tensor | None, everyone: Everyone) -> Tensor:
        no_gradient = 0.0 * scale  # the model's scale takes part in every step, as data parallelism expects
        if self.temperature == "learnable":
            return scale
        if self.temperature == "constant":
            return scale.detach() + no_gradient
        ids = _required(sample_ids)
        stored = self.table.read(ids, f"{name}/tau", everyone).to(scale.dtype)
        tau = torch.where(stored.isnan(), (1.0 / scale.detach()).clamp(self.lowest, self.highest), stored)
        self._temperatures[name] = tau.requires_grad_(torch.is_grad_enabled())
        return 1.0 / tau + no_gradient

    def forward(self, d: Direction) -> Tensor:
        ids, has_negatives, gamma = _required(d.sample_ids), d.num_negatives > 0, self.gamma
        count = d.num_negatives.clamp(min=1).to(d.positives.dtype)
        log_mean = torch.where(has_negatives, d[LogSumExp()], 0.0) - d.positives - count.log()
        new = log_mean.detach()
        old = self.table.read(ids, f"{d.name}/log_u", d.everyone).to(new.dtype)
        mixed = torch.logaddexp(old + (math.log1p(-gamma) if gamma < 1 else -math.inf), new + math.log(gamma))
        log_u = torch.where(old.isnan(), new, mixed)
        log_total = torch.logaddexp(log_u, torch.full_like(log_u, math.log(self.epsilon)))
        share = (log_mean - log_total).exp()
        tau = 1.0 / d.scale
        loss = tau * (self.rho + log_total) + tau.detach() * (share - share.detach())
        if self.training and torch.is_grad_enabled():
            self._remember(d.everyone, ids, f"{d.name}/log_u", torch.where(has_negatives, log_u, torch.nan))
            if d.name in self._temperatures and loss.requires_grad:
                upstream: list[Tensor] = []
                loss.register_hook(upstream.append)
                temperatures = self._temperatures.pop(d.name)
                temperatures.register_hook(partial(self._descend, d.everyone, ids, d.name, temperatures.detach(), upstream))
        return torch.where(has_negatives, loss, 0.0)

    def _descend(
        self, everyone: Everyone, ids: Tensor, name: str, tau: Tensor, upstream: list[Tensor], grad: Tensor
    ) -> None:  # takes no tensor of the graph, which would then never be freed
        """Update the individual temperatures by the gradient of each anchor's own loss."""
        grad = (grad / upstream.pop()).clamp(-5.0, 5.0)
        moment = self.table.read(ids, f"{name}/moment", everyone).to(grad.dtype).nan_to_num()
        moment = self.temperature_momentum * moment + (1 - self.temperature_momentum) * grad
        self._remember(everyone, ids, f"{name}/moment", moment)
        self._remember(everyone, ids, f"{name}/tau", (tau - self.temperature_lr * moment).clamp(self.lowest, self.highest))

    @torch.no_grad()
    def _remember(self, everyone: Everyone, ids: Tensor, column: str, values: Tensor) -> None:
        """Store the values of all ranks' anchors, but for those that are not finite."""
        ids, values = everyone(ids), everyone(values)
        finite = values.isfinite()
        self.table.write(ids[finite], column, values[finite])


def _required(sample_ids: Tensor | None) -> Tensor:
    """Return the sample ids.

    Raises:
        ValueError: if there are none.
    """
    if sample_ids is None:
        raise ValueError("objective global keeps a running estimate for every sample: pass sample_ids, unique and stable")
    return sample_ids
