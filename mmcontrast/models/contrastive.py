"""The model: fields → towers → projections → embeddings, with a logit scale and bias."""

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
    """The output of the model for a batch.

    Attributes:
        fields: per field, unit rows [N, D], or tangent vectors of a hyperbolic model; zero where the sample lacks the field.
        logit_scale: scalar, 1/τ; or one for each pair of fields. logit_bias: scalar, or None.
        curvature: scalar of a hyperbolic model; None: scores are cosines.
    """

    fields: dict[str, Tensor]
    logit_scale: Tensor | dict[tuple[str, str], Tensor]
    logit_bias: Tensor | None
    curvature: Tensor | None = None


torch.export.register_dataclass(Embeddings)  # sharded data parallelism looks for tensors in a model's output


class ContrastiveModel(nn.Module):
    """A model of any number of fields, each with a modality and a tower; fields may share a tower and its projection.

    Args:
        modalities: per field.
        towers: by name.
        tower_of: per field, the name of its tower.
        embed_dim: D.
        projection: "linear", "mlp" (one hidden layer of the tower's width, GELU), or "none" for towers whose features already
            have D numbers; one for all towers, or by name, "linear" for the others.
        logit_scale, logit_bias: initial values; the scale is learnt as its logarithm; None: no bias.
        max_logit_scale: `clamp_logit_scale` keeps the scale in [1, max_logit_scale] (CLIP clamps at 100).
        scale_per_pair: learn a scale for each pair of fields.
        score: of hyperbolic distances; None: scores are cosines.

    Attributes:
        origin: where it came from, set by the function that made or opened it.
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
        if logit_scale > max_logit_scale:
            raise UserError(f"logit_scale={logit_scale:g} is above max_logit_scale={max_logit_scale:g}: raise that too")
        self.modalities, self.towers, self.tower_of = nn.ModuleDict(modalities), nn.ModuleDict(towers), dict(tower_of)
        self.projections = nn.ModuleDict(
            {name: _make_projection(name, tower.width, embed_dim, projection) for name, tower in towers.items()}
        )
        self.embed_dim, self.max_logit_scale = embed_dim, max_logit_scale
        self.locked: list[nn.Module] = []  # modules that never train
        self.fixed: list[nn.Module] = []  # batch norms of a start, whose statistics stay
        self.reduced_once = False  # with shards: gradients stay whole on each rank until the last part of a step
        self.of_start: frozenset[str] = frozenset()  # unchanged tensors of `model.start`, which checkpoints leave out
        self.start_digest = ""
        # shape [1]: sharded data parallelism refuses parameters without a dimension
        self.pairs = list(combinations(modalities, 2)) if scale_per_pair else []
        self.log_logit_scale = nn.Parameter(torch.full((len(self.pairs) or 1,), math.log(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor([float(logit_bias)]))
        self.score, self.hyperbolic = score, None
        if score is not None:
            self.hyperbolic = TangentSpace(towers, embed_dim, score.curvature, score.learn_curvature)

    def keep_start(self, names: Iterable[str]) -> None:
        """Leave unchanged tensors of a start out of checkpoints, which have their digest instead."""
        self.of_start = frozenset(names)
        self.start_digest = self.digest(self.of_start)

    def digest(self, names: Iterable[str] | None = None) -> str:
        """Return a digest of some tensors, by default of all."""
        tensors, digest = self.state_dict(), hashlib.sha256()
        for name in sorted(tensors if names is None else names):
            digest.update(tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def narrow(self, width: int) -> None:
        """Cut embeddings to their first numbers, normalized again, from now on: a Matryoshka model's prefix.

        Raises:
            UserError: for a width that embeddings do not have; for a hyperbolic model, whose prefixes mean nothing.
        """
        if self.hyperbolic is not None:
            raise UserError(f"width={width}: the model's scores are hyperbolic, and no prefix of its embeddings has some")
        if not 1 <= width <= self.embed_dim:
            raise UserError(f"width={width}: the model's embeddings have {self.embed_dim} numbers")
        self.embed_dim = width

    def tower(self, name: str) -> Tower:
        """Return a tower by its name."""
        tower = self.towers[name]
        assert isinstance(tower, Tower)
        return tower

    def train(self, mode: bool = True) -> "ContrastiveModel":
        """Set training mode, but keep locked modules and fixed batch norms in evaluation mode."""
        super().train(mode)
        for module in (*self.locked, *self.fixed):
            module.eval()
        return self

    def modality(self, field: str) -> Modality:
        """Return the modality of a field."""
        modality = self.modalities[field]
        assert isinstance(modality, Modality)
        return modality

    def encode(self, field: str, values: Tensor) -> Tensor:
        """Return the unit embeddings [P, D] of P collated values of one field (tangent vectors for a hyperbolic model), in at
        least fp32, whatever the towers compute in."""
        return self._project(field, self._features(field, values))

    def _features(self, field: str, values: Tensor) -> Tensor:
        """Return what a field's tower makes of its values. An error gets a note of which tower it is, and what it was given."""
        name = self.tower_of[field]
        try:
            features: Tensor = self.towers[name](self.modalities[field](values))
        except Exception as error:
            error.add_note(f"in tower {name!r}, given field {field!r} as {list(values.shape)} of {values.dtype}")
            raise
        return features

    def _project(self, field: str, features: Tensor) -> Tensor:
        """Return the embeddings of a field's features."""
        tower = self.tower_of[field]
        projected = self.projections[tower](features)
        if projected.shape[1] > self.embed_dim:  # after `narrow`
            projected = projected[:, : self.embed_dim]
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return F.normalize(projected, dim=1) if self.hyperbolic is None else self.hyperbolic.tangents(tower, projected)

    def is_locked(self, tower: str) -> bool:
        """Return whether a tower never changes: no parameter is trainable, and it is in evaluation mode."""
        trainable = any(parameter.requires_grad for parameter in self.towers[tower].parameters())
        return not trainable and not self.towers[tower].training

    def _encode_cached(self, name: str, field: str, values: Tensor, features: dict[str, Tensor]) -> Tensor:
        """Return `encode` of values, with the features of a locked tower taken from `features`, or stored in it. It leaves the
        random state unchanged, so that the other towers draw the same numbers either way."""
        tower = self.tower_of[field]
        if not self.is_locked(tower):
            return self.encode(field, values)
        if name not in features:
            with torch.random.fork_rng([values.device] if values.device.type == "cuda" else []):
                features[name] = self._features(field, values)
        return self._project(field, features[name])

    def forward(self, batch: Batch, features: dict[str, Tensor] | None = None) -> Embeddings:
        """Embed a batch.

        Args:
            features: a cache of locked towers' features, filled by the first forward of a batch that is embedded again.
        """
        fields = {}
        for name, values in batch.values.items():
            field, present = batch.encoded_as.get(name, name), batch.present[name]
            with self._without_statistics(field, len(values), present):
                embeddings = (
                    self.encode(field, values) if features is None else self._encode_cached(name, field, values, features)
                )
            if len(values) == len(batch):
                fields[name] = embeddings * present.unsqueeze(1)
            else:
                blank = embeddings.new_zeros(len(batch), self.embed_dim) + 0 * embeddings[:1]
                fields[name] = blank.masked_scatter(present.unsqueeze(1), embeddings) if present.any() else blank
        bias = None if self.logit_bias is None else self.logit_bias.squeeze(0)
        scale = self.log_logit_scale.exp()
        scales = dict(zip(self.pairs, scale, strict=True)) if self.pairs else scale.squeeze(0)
        return Embeddings(fields, scales, bias, None if self.hyperbolic is None else self.hyperbolic.curvature)

    def _without_statistics(self, field: str, rows: int, present: Tensor) -> AbstractContextManager[None]:
        """Return a context for encoding a single row in training: batch norms use their running statistics, as one row has
        none. If the row is a placeholder for a field that no sample has, all modules are in evaluation mode."""
        if not self.training or rows > 1:
            return nullcontext()
        tower = self.tower_of[field]
        parts = [*self.towers[tower].modules(), *self.projections[tower].modules()]
        return evaluating(module for module in parts if not present.any() or isinstance(module, _BatchNorm))

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp the logit scale to its range, and the curvature and lengths of a hyperbolic model to theirs."""
        if self.hyperbolic is not None:
            self.hyperbolic.clamp()
        self.log_logit_scale.clamp_(0.0, math.log(self.max_logit_scale))


def assembled(
    modalities: Mapping[str, Modality], towers: Mapping[str, Tower], log_scale: Tensor | None = None, bias: Tensor | None = None
) -> ContrastiveModel:
    """Return a model of fields with one tower each, in fp32, in evaluation mode. Each tower is run on a blank sample, which
    also shows how many features it has.

    Args:
        log_scale, bias: of the logits, exp(log_scale) · cosine + bias; default: a scale of 1, no bias. A scale above 100
            raises max_logit_scale.
    """
    for field, tower in towers.items():
        tower.float().eval()
        blank = modalities[field].collate([modalities[field].blank()])
        with torch.no_grad():
            tower.width = tower(modalities[field](blank)).shape[1]
    embed_dim = next(iter(towers.values())).width
    max_scale = 100.0 if log_scale is None else max(100.0, log_scale.exp().item())
    model = ContrastiveModel(
        modalities, towers, {field: field for field in towers}, embed_dim, "none", max_logit_scale=max_scale
    )
    with torch.no_grad():
        model.log_logit_scale.copy_(torch.zeros(1) if log_scale is None else log_scale.view(1))
    model.logit_bias = None if bias is None else nn.Parameter(bias.detach().float().view(1))
    return model.eval()


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules in evaluation mode within it. Norms compute with a copy of their running statistics, which a later forward
    may change before the backward."""
    training = [module for module in modules if module.training]
    names = ("running_mean", "running_var")
    running = [(module, name, module._buffers[name]) for module in training for name in names if name in module._buffers]
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


def _make_projection(tower: str, width: int, embed_dim: int, projection: str | Mapping[str, str]) -> nn.Module:
    """Return the projection from a tower's features to embeddings."""
    kind = projection if isinstance(projection, str) else projection.get(tower, "linear")
    if kind == "none":
        if width != embed_dim:
            raise UserError(f"model.projection is none, but tower {tower!r} has {width} features, not embed_dim={embed_dim}")
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=False)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embed_dim, bias=False))
