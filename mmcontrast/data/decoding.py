"""One sample, decoded from its members, and the batch that is collated of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmcontrast.data.class_texts import CLASS_NAME, class_of, group_of, prompt_of
from mmcontrast.data.ids import ids_of, read_json, shown, stable_hash, weight_of
from mmcontrast.data.keys import ENTRY, chosen, entries_of
from mmcontrast.data.views import TeacherView
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError, Modality
from mmcontrast.types import Batch

UNREADABLE = (DecodeError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, RuntimeError)  # of one sample
Members = dict[str, bytes] | Exception  # of a sample, by extension; or why they could not be read


@dataclass
class Sample:
    """One sample in a worker: transformed fields, or the reason why it cannot be used.

    Attributes:
        lost: the reason lies with the storage, not with the sample: no other stands in for it.
        bad_member: where the reason lies.
        replaces: the `error` of each of those in whose place it stands, its `sample_id`, and its `source` if there are several;
            and of its negatives that cannot be decoded, which are left out.
        weight: how much it counts in the loss.
        views: fields as each teacher reads them.
    """

    values: dict[str, torch.Tensor]
    sample_id: int
    group_id: int
    metadata: dict[str, Any]
    error: str | None = None
    lost: bool = False
    bad_member: str = ""
    replaces: tuple[dict[str, str], ...] = ()
    weight: float = 1.0
    views: tuple[dict[str, torch.Tensor], ...] = ()

    @property
    def bad(self) -> dict[str, str]:
        """Return what is reported of a sample that cannot be used."""
        sample_id = self.metadata.get("sample_id") or self.sample_id
        return {"error": str(self.error), "key": self.metadata["key"], "sample_id": str(sample_id)}

    @property
    def id_in_words(self) -> str:
        return f", sample_id {self.metadata['sample_id']!r}" if self.metadata.get("sample_id") is not None else ""


def decode_sample(
    key: str,
    default: int,
    members: Members,
    modalities: Mapping[str, Modality],
    choices: Mapping[str, Sequence[Mapping[str, float]]],
    seed: str | None,
    templates: Mapping[str, Sequence[str]] | None = None,
    views: Sequence[TeacherView] = (),
) -> Sample:
    """Decode a sample from its members; the first error is kept in the sample.

    Args:
        default: its id, if its json has none.
        choices: per field, the keys that are tried in turn, and of each the weights with which one is drawn.
        seed: of augmentation, with the sample's id; None: not training.
        templates: per field that holds names of classes, what its texts are made of.
        views: what teachers read of the same fields.
    """
    sample = Sample({}, default, default, {"key": shown(key)}, views=tuple({} for _ in views))
    if isinstance(members, Exception):
        return replace(sample, error=str(members), lost=isinstance(members, UserError))
    extension = "json"
    try:
        if "json" in members:
            metadata = read_json(members["json"])
            sample.sample_id, sample.group_id = ids_of(metadata, sample.sample_id)
            sample.weight = weight_of(metadata)
            sample.metadata = metadata | sample.metadata  # the key is the sample's
            field_keys = [key for field_choices in choices.values() for choice in field_choices for key in choice]
            view_keys = [key for view in views for key in view.keys.values()]
            for extension in [*field_keys, *view_keys]:
                members = members | (entries_of(metadata, [extension]) if extension.startswith(ENTRY) else {})
        if "cls" in members:
            sample.metadata.setdefault("cls", members["cls"].decode("utf-8-sig", "replace").strip())
        for field in templates or ():
            if extension := chosen(choices.get(field, ()), members, False):
                sample.metadata[CLASS_NAME] = class_of(members[extension])
                sample.group_id = group_of(sample.metadata[CLASS_NAME])
        if seed is not None:
            torch.default_generator.manual_seed(stable_hash(f"{seed} {sample.sample_id}"))
        for field, modality in modalities.items():
            extension = chosen(choices[field], members, seed is not None)
            if not extension:
                continue
            member = members[extension]
            if templates and field in templates:
                member = prompt_of(class_of(member), templates[field], seed is not None)
            raw, rng_state = modality.decode(member), torch.get_rng_state() if views else None
            value = modality.transform(raw, seed is not None)
            if value is None:
                continue
            sample.values[field] = value
            for view, view_values in zip(views, sample.views, strict=True):
                if field in view.modalities and rng_state is not None:
                    extension = view.keys.get(field, extension)
                    view_values[field] = view.read(field, modality, raw, members.get(extension), rng_state)
    except UNREADABLE as error:
        sample.error, sample.bad_member = str(error) or type(error).__name__, extension
    return sample


def collate(samples: list[Sample], modalities: Mapping[str, Modality], views: Sequence[TeacherView] = ()) -> Batch | str:
    """Return the batch, or the first bad sample's error: workers cannot raise it in one line."""
    for sample in samples:
        if sample.error and sample.lost:
            return f"{sample.error}. When it can be read again, --resume continues the run"
        if sample.error:
            return (
                f"{sample.error}; repair or remove the sample, or leave such ones out: `mmcontrast data filter` with the rule"
                " readable, then its selection (`mmcontrast data verify` finds all of them)"
            )
    ids = torch.tensor([s.sample_id for s in samples]), torch.tensor([s.group_id for s in samples])
    return Batch(
        *stack_fields([s.values for s in samples], modalities),
        *ids,
        [s.metadata for s in samples],
        [dict(bad) for s in samples for bad in s.replaces],
        torch.tensor([s.weight for s in samples]),
        [Batch(*stack_fields([s.views[k] for s in samples], view.modalities), *ids, []) for k, view in enumerate(views)],
    )


def stack_fields(
    samples: Sequence[Mapping[str, torch.Tensor]], modalities: Mapping[str, Modality]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return per field the collated values of a batch, and bool [samples]: which of them have the field."""
    values = {}
    for field, modality in modalities.items():
        rows = [sample[field] for sample in samples if field in sample]
        values[field] = modality.collate(rows or [modality.blank()])
    return values, {field: torch.tensor([field in sample for sample in samples]) for field in modalities}
