"""Percentile intervals by the bootstrap (Efron, 1979): samples are drawn again with replacement, as counts.

Shapes: N samples, B resamples, M statistics. A statistic is a function of weights [B, N], how often each resample has each
sample, so that nothing is copied; `Estimate` is one with its value. Weights depend on N, the seed and the clusters alone: all
statistics of the same samples see the same resamples, on every device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**22  # weights that exist at a time
Statistic = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A statistic of samples: its value, and the function that computes it for resamples.

    Attributes:
        value: of the samples themselves.
        statistic: float64 weights [B, N] → [B].
        number: N.
        device: of the weights.
    """

    value: float
    statistic: Statistic
    number: int
    device: torch.device

    @classmethod
    def of(cls, statistic: Statistic, number: int, device: torch.device) -> "Estimate":
        """Return the estimate whose value is the statistic with every sample once."""
        once = torch.ones(1, number, dtype=torch.float64, device=device)
        return cls(statistic(once).item() if number else float("nan"), statistic, number, device)

    @classmethod
    def of_mean(cls, values: Tensor) -> "Estimate":
        """Return the estimate of the mean of values [N], one a sample. For a statistic that is no mean, give its value plus
        each sample's influence on it, the first-order (Hájek) projection."""
        values = values.double()
        return cls.of(lambda weights: means(values[:, None], weights).squeeze(1), len(values), values.device)


def intervals(
    estimates: Sequence[Estimate], *, clusters: Tensor | None = None, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return (low, high), float64 [M] on the CPU, of M estimates over the same samples.

    Args:
        clusters: int64 [N], any numbers: samples of one cluster are drawn together.

    Raises:
        ValueError: if they are not of the same samples.
    """
    if len({(estimate.number, estimate.device) for estimate in estimates}) > 1:
        numbers = sorted(estimate.number for estimate in estimates)
        raise ValueError(f"estimates over {numbers} samples: give those of the same samples")
    number, device = (estimates[0].number, estimates[0].device) if estimates else (0, torch.device("cpu"))
    blocks = weights(number, clusters, resamples, seed, device)
    values = [torch.stack([estimate.statistic(block) for estimate in estimates], 1) for block in blocks]
    return _percentiles(values, len(estimates), level)


def mean_interval(
    values: Tensor, resamples: int = 1000, seed: int = 0, *, clusters: Tensor | None = None, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return (low, high), float64 [M] on the CPU, of the means of values [N, M]; NaN for no sample."""
    rows = values.double()
    blocks = weights(len(rows), clusters, resamples, seed, rows.device)
    return _percentiles([means(rows, block) for block in blocks], rows.shape[1], level)


def quantile_interval(
    values: Tensor,
    q: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
    *,
    clusters: Tensor | None = None,
    level: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Return (low, high), float64 [M] on the CPU, of a quantile of values [N, M], the median by default; linear between two
    values, as `torch.quantile`."""
    ordered, order = values.double().sort(dim=0)

    def quantiles(weights: Tensor) -> Tensor:
        columns = []
        for column, order_of_column in zip(ordered.T, order.T, strict=True):
            below = weights[:, order_of_column].cumsum(1)  # how many of the resample are not above each value
            position = q * (below[:, -1:] - 1)
            bounds = torch.cat([position.floor(), position.ceil()], 1) + 1
            first, second = column[torch.searchsorted(below, bounds)].unbind(1)
            columns.append(first.lerp(second, position.frac().squeeze(1)))
        return torch.stack(columns, 1)

    blocks = weights(len(values), clusters, resamples, seed, values.device)
    return _percentiles([quantiles(block) for block in blocks], values.shape[1], level)


def weights(
    number: int, clusters: Tensor | None, resamples: int, seed: int, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Yield how often each sample is drawn, float64 [b, N], in blocks of all B resamples. Of clusters, draw as many as there
    are."""
    if not number:
        return
    cluster_of_sample = None if clusters is None else clusters.cpu().unique(return_inverse=True)[1]
    units = number if cluster_of_sample is None else int(cluster_of_sample.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    height = max(1, BLOCK // max(units, number))
    for start in range(0, resamples, height):
        rows = min(height, resamples - start)
        drawn = torch.randint(units, (rows, units), generator=generator)
        drawn += torch.arange(rows)[:, None] * units
        counts = drawn.flatten().bincount(minlength=rows * units).view(rows, units)
        yield (counts if cluster_of_sample is None else counts[:, cluster_of_sample]).to(device, torch.float64)


def means(values: Tensor, weights: Tensor) -> Tensor:
    """Return weighted means [B, M] of values [N, M]."""
    return weights @ values / weights.sum(1, keepdim=True)


def _percentiles(values: Sequence[Tensor], number: int, level: float) -> tuple[Tensor, Tensor]:
    """Return (low, high) percentiles [M] of blocks of statistics [b, M]."""
    if not values:
        return torch.full((number,), torch.nan, dtype=torch.float64), torch.full((number,), torch.nan, dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(list(values)).cpu().quantile(tails, dim=0)
    return low, high
