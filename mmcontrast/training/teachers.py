"""Models that a run learns from: opened, looked through at the door, and run without gradient beside the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmcontrast.components import suggestion
from mmcontrast.data import StoredEmbeddings, TeacherView
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, ImageModality, Modality, TextModality, VectorModality
from mmcontrast.models import ContrastiveModel, StartOptions
from mmcontrast.training.options import StoredTeacherOptions, TeacherOptions
from mmcontrast.types import Batch

KINDS = (ImageModality, TextModality, AudioModality, VectorModality)
Opener = Callable[[StartOptions], ContrastiveModel]


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode without gradient, or embeddings that it once made.

    Attributes:
        name: what it was opened by.
        digest: of its weights; of stored embeddings, which members they are.
        scale: its logit scale.
        view: how it reads samples, by the model's fields.
        model: None: its embeddings are stored.
        fields: its own field for each of the model's.
    """

    name: str
    digest: str
    scale: float
    view: TeacherView
    model: ContrastiveModel | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, str]:
        """Return what checkpoints hold of it."""
        return {"name": self.name, "digest": self.digest}

    def to(self, device: torch.device) -> None:
        if self.model:
            self.model.to(device)

    @torch.no_grad()
    def embed(self, view: Batch, micro_batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """Return unit rows [N, E] of every field, 0 where a sample lacks it.

        Args:
            view: the batch as this teacher reads it, anywhere; its micro-batches are moved to `device` one at a time.
        """
        parts = [self._embed(part.to(device)) for part in view.split(micro_batch_size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _embed(self, view: Batch) -> dict[str, Tensor]:
        rows = {}
        for name, values in view.values.items():
            here = view.present[name]
            if self.model:
                own = self.fields[name]
                alone = Batch({own: values}, {own: here}, view.sample_ids, view.group_ids, [])
                rows[name] = self.model(alone).fields[own].float()
            else:
                rows[name] = values.new_zeros(len(here), values.shape[1])
                rows[name][here] = values[: int(here.sum())]
        return rows


def open_teachers(
    given: Sequence[TeacherOptions | StoredTeacherOptions], scored: Sequence[str], model: ContrastiveModel, opener: Opener
) -> list[Teacher]:
    """Open the teachers of a run.

    Args:
        scored: the fields of the model that the loss scores: every teacher must have them.
        opener: opens a model by its name.

    Raises:
        UserError: for a teacher that cannot be opened, lacks a scored field, or reads another kind of values there.
    """
    return [
        _stored(one, scored, model) if isinstance(one, StoredTeacherOptions) else _opened(one, scored, model, opener)
        for one in given
    ]


def _stored(given: StoredTeacherOptions, scored: Sequence[str], model: ContrastiveModel) -> Teacher:
    for name in given.stored:
        if name not in model.modalities:
            raise UserError(f"train.teacher.stored: no field {name!r}; {suggestion(name, model.modalities)}")
    for name in scored:
        if name not in given.stored:
            raise UserError(f"train.teacher.stored lacks the field {name!r}, which the loss scores: name its member, {name}: …")
    keys = {name: given.stored[name] for name in scored}
    named = ", ".join(f"{name} in {key}" for name, key in keys.items())
    return Teacher(named, named, given.scale, TeacherView({name: StoredEmbeddings() for name in keys}, keys))


def _opened(given: TeacherOptions, scored: Sequence[str], model: ContrastiveModel, opener: Opener) -> Teacher:
    try:
        teacher = opener(given.start)
    except UserError as error:
        raise UserError(f"train.teacher: {str(error).removeprefix('model.start: ')}") from error
    if teacher.hyperbolic is not None:
        raise UserError(f"train.teacher: the scores of {given.model} are hyperbolic, a teacher's are cosines: take another")
    for name, own in given.fields.items():
        if name not in model.modalities:
            raise UserError(f"train.teacher.fields: no field {name!r}; {suggestion(name, model.modalities)}")
        if own not in teacher.modalities:
            raise UserError(
                f"train.teacher.fields.{name}: {given.model} has no field {own!r}; {suggestion(own, teacher.modalities)}"
            )
    fields = {name: given.fields.get(name, name) for name in scored}
    for name, own in fields.items():
        if own not in teacher.modalities:
            raise UserError(
                f"train.teacher: {given.model} has no field {name!r}, which the loss scores; it has"
                f" {', '.join(teacher.modalities)}: say which sees it, fields: {{{name}: …}}, or take another teacher"
            )
        mine, its = _kind(model.modality(name)), _kind(teacher.modality(own))
        if mine is not its:
            raise UserError(
                f"train.teacher: field {own!r} of {given.model} reads {its.__name__}, the model's {name!r} {mine.__name__}:"
                " both read the same members"
            )
    if teacher.pairs and given.scale is None:
        raise UserError(f"train.teacher: {given.model} has a logit scale for each pair of fields: say train.teacher.scale")
    scale = given.scale or float(teacher.log_logit_scale.detach().exp()[0])
    view = TeacherView({name: teacher.modality(own) for name, own in fields.items()})
    digest = teacher.digest()
    return Teacher(given.model, digest, scale, view, teacher.requires_grad_(False).eval(), fields)


def _kind(modality: Modality) -> type[Modality]:
    return next((kind for kind in KINDS if isinstance(modality, kind)), type(modality))
