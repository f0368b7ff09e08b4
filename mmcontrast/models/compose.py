"""A model composed of the `fields` and `towers` of a config, with initial weights."""

from collections.abc import Mapping
from typing import Any

import torch

from mmcontrast.components import build, nearest
from mmcontrast.errors import UserError
from mmcontrast.modalities import MODALITIES, AudioModality, DecodeError, Modality, TextModality
from mmcontrast.models.base import Origin, Tower
from mmcontrast.models.contrastive import ContrastiveModel
from mmcontrast.models.linear import LinearTower
from mmcontrast.models.open_clip import OpenClipTextTower, OpenClipTower
from mmcontrast.models.options import FieldOptions, ModelOptions
from mmcontrast.models.timm import TimmTower
from mmcontrast.models.transformers import TransformersTower, shortest_waveform
from mmcontrast.options import Component

TOWERS = {
    "timm": TimmTower,
    "transformers": TransformersTower,
    "open_clip": OpenClipTower,
    "open_clip_text": OpenClipTextTower,
    "linear": LinearTower,
}
PRETRAINED_BACKGROUNDS = {"open_clip": "open_clip", "timm": "drop"}  # others put white under transparent pixels


def make_model(
    fields: Mapping[str, FieldOptions],
    towers: Mapping[str, Component],
    options: ModelOptions,
    seed: int,
    tokenizers: bool = True,
) -> ContrastiveModel:
    """The model with its initial weights, a function of the seed.

    Args:
        tokenizers: they are those of the texts, and must fit the towers.

    Raises:
        UserError: for a field without a tower, a tower without a field, or texts that a tower cannot read.
    """
    for field, of in fields.items():
        if of.tower not in towers:
            raise UserError(f"fields.{field}.tower: no tower {of.tower!r} under towers; {nearest(of.tower, towers)}")
    for tower in towers:
        if tower not in {of.tower for of in fields.values()}:
            raise UserError(f"towers.{tower} serves no field: name it in fields.<field>.tower, or remove it")
    for tower in options.projection if isinstance(options.projection, dict) else ():
        if tower not in towers:
            raise UserError(f"model.projection: no tower {tower!r} under towers; {nearest(tower, towers)}")
    torch.manual_seed(seed)
    modalities = make_modalities(fields, towers)
    made = {name: build(spec, TOWERS, f"towers.{name}: tower", Tower) for name, spec in towers.items()}
    for field, modality in modalities.items():
        tower = made[fields[field].tower]
        if isinstance(modality, TextModality) and tokenizers:
            try:
                tower.read(modality.text_ids)
            except (UserError, DecodeError) as error:
                raise UserError(f"fields.{field}: {error}") from error
        if isinstance(modality, AudioModality) and isinstance(tower, TransformersTower):
            refuse_short_sounds(field, modality, tower)
    model = ContrastiveModel(modalities, made, {field: of.tower for field, of in fields.items()}, **options.model_dump())
    composed = {field: of.model_dump(mode="json") for field, of in fields.items()}
    config = {"fields": composed, "towers": dict(towers), "model": options.model_dump(mode="json")}
    model.origin = Origin("mmcontrast", config=config)
    return model


def refuse_short_sounds(field: str, modality: AudioModality, tower: TransformersTower) -> None:
    """
    Raises:
        UserError: if a waveform may be shorter than what the tower's convolutions take.
    """
    samples = min(modality.window, modality.length) if modality.variable else modality.length
    needed = shortest_waveform(tower.network.config)
    if modality.representation == "waveform" and samples < needed:
        option = "window" if modality.length >= needed else "seconds"
        raise UserError(f"fields.{field}: sounds may have {samples} samples, its tower needs {needed}: set a longer {option}")


def make_modalities(fields: Mapping[str, FieldOptions], towers: Mapping[str, Component] | None = None) -> dict[str, Modality]:
    """Return each field's modality. Pictures for weights that a library pretrained are treated as it does where they are
    transparent, unless `background` says otherwise."""
    made = {}
    for field, options in fields.items():
        spec, tower = options.modality, (towers or {}).get(options.tower)
        spec = {"type": spec} if isinstance(spec, str) else spec
        if isinstance(spec, dict) and spec.get("type") == "image" and isinstance(tower, dict) and _has_weights(tower):
            spec = {"background": PRETRAINED_BACKGROUNDS.get(str(tower.get("type")), "white"), **spec}
        made[field] = build(spec, MODALITIES, f"fields.{field}.modality: modality", Modality)
    return made


def _has_weights(tower: Mapping[str, Any]) -> bool:
    """Whether they are a library's; a model of open_clip's that is named with its place has some without `pretrained`."""
    return bool(tower.get("pretrained")) or (tower.get("type") == "open_clip" and ":" in str(tower.get("model")))
