"""Open and check the teachers of a run, and embed batches with them, without gradient."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    """A model in evaluation mode without gradient, or its stored embeddings.

    Attributes:
        name: the name that it was opened by.
        digest: of its weights; of stored embeddings, the names of their members.
        scale: its logit scale.
        view: how it reads samples, by the model's fields.
        model: None: its embeddings are stored.
        fields: the teacher's field for each of the model's.
    """

    name: str
    digest: str
    scale: float
    view: TeacherView
    model: ContrastiveModel | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def identity(self) -> dict[str, str]:
        """Return its name and digest, which checkpoints hold."""
        return {"name": self.name, "digest": self.digest}

    def to(self, device: torch.device) -> None:
        """Move its model to a device, if it has one."""
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
            present = view.present[name]
            if self.model:
                field = self.fields[name]
                batch = Batch({field: values}, {field: present}, view.sample_ids, view.group_ids, [])
                rows[name] = self.model(batch).fields[field].float()
            else:
                rows[name] = values.new_zeros(len(present), values.shape[1])
                rows[name][present] = values[: int(present.sum())]
        return rows


def open_teachers(
    teachers: Sequence[TeacherOptions | StoredTeacherOptions], scored: Sequence[str], model: ContrastiveModel, opener: Opener
) -> list[Teacher]:
    """Open the teachers of a run.

    Args:
        scored: the fields of the model that the loss scores: every teacher must have them.
        opener: opens a model by its name.

    Raises:
        UserError: for a teacher that cannot be opened, lacks a scored field, or reads another kind of values there.
    """
    return [
        _make_stored(options, scored, model)
        if isinstance(options, StoredTeacherOptions)
        else _open(options, scored, model, opener)
        for options in teachers
    ]


def _make_stored(options: StoredTeacherOptions, scored: Sequence[str], model: ContrastiveModel) -> Teacher:
    """Return a teacher whose embeddings are stored in the shards."""
    for name in options.stored:
        if name not in model.modalities:
            raise UserError(f"train.teacher.stored: no field {name!r}; {suggestion(name, model.modalities)}")
    for name in scored:
        if name not in options.stored:
            raise UserError(f"train.teacher.stored lacks the field {name!r}, which the loss scores: name its member, {name}: …")
    keys = {name: options.stored[name] for name in scored}
    members = ", ".join(f"{name} in {key}" for name, key in keys.items())
    return Teacher(members, members, options.scale, TeacherView({name: StoredEmbeddings() for name in keys}, keys))


def _open(options: TeacherOptions, scored: Sequence[str], model: ContrastiveModel, opener: Opener) -> Teacher:
    """Open a teacher's model, and check that it reads every scored field."""
    try:
        teacher = opener(options.start)
    except UserError as error:
        raise UserError(f"train.teacher: {str(error).removeprefix('model.start: ')}") from error
    if teacher.hyperbolic is not None:
        raise UserError(f"train.teacher: the scores of {options.model} are hyperbolic, a teacher's are cosines: take another")
    for name, field in options.fields.items():
        if name not in model.modalities:
            raise UserError(f"train.teacher.fields: no field {name!r}; {suggestion(name, model.modalities)}")
        if field not in teacher.modalities:
            raise UserError(
                f"train.teacher.fields.{name}: {options.model} has no field {field!r}; {suggestion(field, teacher.modalities)}"
            )
    fields = {name: options.fields.get(name, name) for name in scored}
    for name, field in fields.items():
        if field not in teacher.modalities:
            raise UserError(
                f"train.teacher: {options.model} has no field {name!r}, which the loss scores; it has"
                f" {', '.join(teacher.modalities)}: say which sees it, fields: {{{name}: …}}, or take another teacher"
            )
        kind, teacher_kind = _kind(model.modality(name)), _kind(teacher.modality(field))
        if kind is not teacher_kind:
            raise UserError(
                f"train.teacher: field {field!r} of {options.model} reads {teacher_kind.__name__}, the model's {name!r}"
                f" {kind.__name__}: both read the same members"
            )
    if teacher.pairs and options.scale is None:
        raise UserError(f"train.teacher: {options.model} has a logit scale for each pair of fields: say train.teacher.scale")
    scale = options.scale or float(teacher.log_logit_scale.detach().exp()[0])
    view = TeacherView({name: teacher.modality(field) for name, field in fields.items()})
    digest = teacher.digest()
    return Teacher(options.model, digest, scale, view, teacher.requires_grad_(False).eval(), fields)


def _kind(modality: Modality) -> type[Modality]:
    """Return the kind of values that a modality reads."""
    return next((kind for kind in KINDS if isinstance(modality, kind)), type(modality))
