"""The model: fields → towers → projections → embeddings, with the logit scale and bias of the scores."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmcontrast.errors import UserError
from mmcontrast.modalities import Modality
from mmcontrast.models.base import Origin, Tower
from mmcontrast.models.hyperbolic import TangentSpace
from mmcontrast.models.options import ScoreOptions
from mmcontrast.types import Batch


@dataclass(frozen=True)
class Embeddings:
    """What the model makes of a batch.

    Attributes:
        fields: per field, unit rows [N, D], or tangent vectors of a hyperbolic model; zero where the sample lacks the field.
        logit_scale: scalar, 1/τ; or one for each pair of fields. logit_bias: scalar, or None.
        curvature: scalar of a hyperbolic model; None: scores are cosines.
    """

    fields: dict[str, Tensor]
    logit_scale: Tensor | dict[tuple[str, str], Tensor]
    logit_bias: Tensor | None
    curvature: Tensor | None = None


torch.export.register_dataclass(Embeddings)  # sharded data parallelism looks for the tensors in what a model returns


class ContrastiveModel(nn.Module):
    """Any number of fields, each with a modality and a tower; fields may share a tower, with its projection.

    Args:
        modalities: per field.
        towers: by name.
        tower_of: per field, the name of its tower.
        embed_dim: D.
        projection: "linear", "mlp" (one hidden layer of the tower's width, GELU), or "none" for towers whose features already
            are of D numbers; one for all towers, or by name, "linear" for the others.
        logit_scale, logit_bias: initial values; the scale is learnt as its logarithm, a bias of None is not learnt.
        max_logit_scale: `clamp_logit_scale` keeps the scale in [1, this] (CLIP clamps at 100).
        scale_per_pair: each pair of fields learns a scale of its own.
        score: of hyperbolic distances; None: scores are cosines.

    Attributes:
        origin: where it came from, set by what made or opened it.
    """

    origin: Origin | None = None

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        towers: Mapping[str, Tower],
        tower_of: Mapping[str, str],
        embed_dim: int,
        projection: str | Mapping[str, str] = "linear",
        logit_scale: float = 1 / 0.07,
        logit_bias: float | None = None,
        max_logit_scale: float = 100.0,
        scale_per_pair: bool = False,
        score: ScoreOptions | None = None,
    ) -> None:
        super().__init__()
        self.modalities, self.towers, self.tower_of = nn.ModuleDict(modalities), nn.ModuleDict(towers), dict(tower_of)
        self.projections = nn.ModuleDict({name: _head(name, t.width, embed_dim, projection) for name, t in towers.items()})
        self.embed_dim, self.max_logit_scale = embed_dim, max_logit_scale
        self.locked: list[nn.Module] = []  # modules that never train
        self.fixed: list[nn.Module] = []  # batch norms of a start, whose statistics stay
        self.reduced_once = False  # in shards: gradients stay whole on each rank until the last part of a step
        self.of_start: frozenset[str] = frozenset()  # tensors that checkpoints leave out: those of `model.start`, which stay
        self.start_digest = ""
        # shape [1]: sharded data parallelism refuses parameters without a dimension
        self.pairs = list(combinations(modalities, 2)) if scale_per_pair else []
        self.log_logit_scale = nn.Parameter(torch.full((len(self.pairs) or 1,), math.log(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor([float(logit_bias)]))
        self.score, self.hyperbolic = score, None
        if score is not None:
            self.hyperbolic = TangentSpace(towers, embed_dim, score.curvature, score.learn_curvature)

    def keep_start(self, names: Iterable[str]) -> None:
        """Leave tensors of a start, which nothing changes, out of checkpoints; these hold a digest of them instead."""
        self.of_start = frozenset(names)
        self.start_digest = self.digest(self.of_start)

    def digest(self, names: Iterable[str] | None = None) -> str:
        """Return a digest of some tensors, by default of all."""
        tensors, digest = self.state_dict(), hashlib.sha256()
        for name in sorted(tensors if names is None else names):
            digest.update(tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def narrow(self, width: int) -> None:
        """Make embeddings of their first numbers alone, of unit length again, from now on: a Matryoshka model's prefix.

        Raises:
            UserError: for a width that they have not; for a hyperbolic model, whose prefixes mean nothing.
        """
        if self.hyperbolic is not None:
            raise UserError(f"width={width}: the model's scores are hyperbolic, and no prefix of its embeddings has some")
        if not 1 <= width <= self.embed_dim:
            raise UserError(f"width={width}: the model's embeddings have {self.embed_dim} numbers")
        self.embed_dim = width

    def tower(self, name: str) -> Tower:
        tower = self.towers[name]
        assert isinstance(tower, Tower)
        return tower

    def train(self, mode: bool = True) -> "ContrastiveModel":
        super().train(mode)
        for module in (*self.locked, *self.fixed):
            module.eval()
        return self

    def modality(self, field: str) -> Modality:
        modality = self.modalities[field]
        assert isinstance(modality, Modality)
        return modality

    def encode(self, field: str, values: Tensor) -> Tensor:
        """Unit embeddings [P, D] of P collated values of one field, of a hyperbolic model tangent vectors; at least fp32,
        whatever the towers computed in."""
        return self._projected(field, self.towers[self.tower_of[field]](self.modalities[field](values)))

    def _projected(self, field: str, features: Tensor) -> Tensor:
        tower = self.tower_of[field]
        projected = self.projections[tower](features)
        if projected.shape[1] > self.embed_dim:  # a prefix is asked for
            projected = projected[:, : self.embed_dim]
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return F.normalize(projected, dim=1) if self.hyperbolic is None else self.hyperbolic.tangents(tower, projected)

    def is_locked(self, tower: str) -> bool:
        """Return whether a tower makes the same of a value at all times."""
        learning = any(parameter.requires_grad for parameter in self.towers[tower].parameters())
        return not learning and not self.towers[tower].training

    def _kept(self, name: str, field: str, values: Tensor, features: dict[str, Tensor]) -> Tensor:
        """`encode`, with what a locked tower makes taken from `features`, or put there. It draws no random numbers of the
        others', so that these are the same either way."""
        tower = self.tower_of[field]
        if not self.is_locked(tower):
            return self.encode(field, values)
        if name not in features:
            with torch.random.fork_rng([values.device] if values.device.type == "cuda" else []):
                features[name] = self.towers[tower](self.modalities[field](values))
        return self._projected(field, features[name])

    def forward(self, batch: Batch, features: dict[str, Tensor] | None = None) -> Embeddings:
        """
        Args:
            features: of a batch that is embedded again: what locked towers have made of its fields, kept by the first time.
        """
        fields = {}
        for name, values in batch.values.items():
            field, here = batch.encoded_as.get(name, name), batch.present[name]
            with self._as_it_counts(field, len(values), here):
                embeddings = self.encode(field, values) if features is None else self._kept(name, field, values, features)
            if len(values) == len(batch):
                fields[name] = embeddings * here.unsqueeze(1)
            else:
                blank = embeddings.new_zeros(len(batch), self.embed_dim) + 0 * embeddings[:1]
                fields[name] = blank.masked_scatter(here.unsqueeze(1), embeddings) if here.any() else blank
        bias = None if self.logit_bias is None else self.logit_bias.squeeze(0)
        scale = self.log_logit_scale.exp()
        scales = dict(zip(self.pairs, scale, strict=True)) if self.pairs else scale.squeeze(0)
        return Embeddings(fields, scales, bias, None if self.hyperbolic is None else self.hyperbolic.curvature)

    def _as_it_counts(self, field: str, rows: int, here: Tensor) -> AbstractContextManager[None]:
        """In training, what stands for a field that nobody has takes part in the step, but is computed as in evaluation: batch
        norms learn nothing of it. A row that is alone has no statistics of its own: it gets the running ones."""
        if not self.training or rows > 1:
            return nullcontext()
        tower = self.tower_of[field]
        parts = [*self.towers[tower].modules(), *self.projections[tower].modules()]
        return evaluating(module for module in parts if not here.any() or isinstance(module, _BatchNorm))

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep it in its range; of a hyperbolic model the curvature and the lengths too."""
        if self.hyperbolic is not None:
            self.hyperbolic.clamp()
        self.log_logit_scale.clamp_(0.0, math.log(self.max_logit_scale))


def assembled(
    modalities: Mapping[str, Modality], towers: Mapping[str, Tower], log_scale: Tensor | None = None, bias: Tensor | None = None
) -> ContrastiveModel:
    """Return the model of fields with a tower each, in fp32, in evaluation mode. Each tower is tried on a blank sample, which
    also says how many features it has.

    Args:
        log_scale, bias: of the logits, exp(log_scale) · cosine + bias; default: a scale of 1, no bias. A scale above 100 may
            stay what it is.
    """
    for field, tower in towers.items():
        tower.float().eval()
        blank = modalities[field].collate([modalities[field].blank()])
        with torch.no_grad():
            tower.width = tower(modalities[field](blank)).shape[1]
    dim, largest = next(iter(towers.values())).width, 100.0 if log_scale is None else max(100.0, log_scale.exp().item())
    model = ContrastiveModel(modalities, towers, {f: f for f in towers}, dim, "none", max_logit_scale=largest)
    with torch.no_grad():
        model.log_logit_scale.copy_(torch.zeros(1) if log_scale is None else log_scale.view(1))
    model.logit_bias = None if bias is None else nn.Parameter(bias.detach().float().view(1))
    return model.eval()


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Some modules in evaluation mode, and afterwards as they were. Norms compute with a copy of their running statistics: a
    later forward may change these before the backward."""
    training = [module for module in modules if module.training]
    running = [(m, name, m._buffers[name]) for m in training for name in ("running_mean", "running_var") if name in m._buffers]
    for module in training:
        module.training = False
    for module, name, statistic in running:
        module._buffers[name] = None if statistic is None else statistic.clone()
    try:
        yield
    finally:
        for module, name, statistic in running:
            module._buffers[name] = statistic
        for module in training:
            module.training = True


def _head(tower: str, width: int, embed_dim: int, projection: str | Mapping[str, str]) -> nn.Module:
    kind = projection if isinstance(projection, str) else projection.get(tower, "linear")
    if kind == "none":
        if width != embed_dim:
            raise UserError(f"model.projection is none, but tower {tower!r} has {width} features, not embed_dim={embed_dim}")
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=False)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embed_dim, bias=False))
