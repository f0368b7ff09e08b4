"""Parts of a model that every export format needs: plain weights, fields by kind, scale and bias of two of them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, ImageModality, Modality, TextModality, VectorModality
from mmcontrast.models import ContrastiveModel, Origin

KINDS: dict[type[Modality], str] = {
    ImageModality: "image",
    TextModality: "text",
    AudioModality: "audio",
    VectorModality: "vector",
}


def plain_model(model: ContrastiveModel) -> ContrastiveModel:
    """Merge every parametrized weight of a model, as of low-rank updates, into one tensor, in place.

    Not in a copy: a parametrized module shares its class with its copies, of which the last one would lose the weight's name.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def kind_of(model: ContrastiveModel, field: str) -> str:
    """Return "image", "text", "audio", "vector", or "" for a modality of another kind."""
    return next((name for kind, name in KINDS.items() if isinstance(model.modality(field), kind)), "")


def chosen_fields(model: ContrastiveModel, available: Sequence[str], requested: Sequence[str] | None) -> list[str]:
    """Return the fields to be exported: the requested ones, or all.

    Raises:
        UserError: for one that the model does not have.
    """
    for field in requested or ():
        if field not in available:
            raise UserError(f"--fields: the model has no field {field!r} that is embedded; {suggestion(field, available)}")
    return list(requested or available)


def image_and_text(model: ContrastiveModel, fields: Sequence[str], library: str) -> tuple[str, str]:
    """Return the names of the one field of pictures and the one field of texts.

    Raises:
        UserError: for any other fields.
    """
    kinds = {field: kind_of(model, field) for field in fields}
    image = next((field for field, kind in kinds.items() if kind == "image"), "")
    text = next((field for field, kind in kinds.items() if kind == "text"), "")
    if sorted(kinds.values()) != ["image", "text"]:
        description = ", ".join(f"{field} ({kind or 'another kind'})" for field, kind in kinds.items())
        remedy = f": leave the others out with --fields {image},{text}" if image and text else ""
        raise UserError(f"{library} holds one field of pictures and one of texts, this model has {description}{remedy}")
    return image, text


def scale_and_bias(model: ContrastiveModel, fields: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Return the logarithm of the logit scale of a pair of fields, and the bias, each a scalar.

    Raises:
        UserError: where more than two fields have scales of their own.
    """
    scales = model.log_logit_scale.detach()
    if model.pairs:
        among = [number for number, pair in enumerate(model.pairs) if set(pair) <= set(fields)]
        if len(among) != 1:
            raise UserError("each pair of fields has learnt a scale of its own: name two of them with --fields")
        scales = scales[among]
    return scales.squeeze(0).clone(), None if model.logit_bias is None else model.logit_bias.detach().squeeze(0).clone()


@torch.no_grad()
def embed_prepared(model: ContrastiveModel, field: str, prepared: Tensor) -> Tensor:
    """Return unit embeddings of a field's prepared values, as its tower takes them."""
    tower = model.tower_of[field]
    return F.normalize(model.projections[tower](model.towers[tower](prepared)).float(), dim=1)


def projection_of(model: ContrastiveModel, field: str) -> nn.Module:
    return model.projections[model.tower_of[field]]


def origin_of(model: ContrastiveModel, names: Sequence[str]) -> Origin | None:
    """Return the origin of some fields: the one model that training started from, if all of them are its; else the model's."""
    origin = model.origin
    starts = [origin.starts.get(model.tower_of[name]) for name in names] if origin else []
    return starts[0] if starts and starts[0] and all(start is starts[0] for start in starts) else origin


def tower_options(model: ContrastiveModel, field: str) -> dict[str, Any]:
    """Return the options of a field's tower in the config that the model was composed of; {} for one of a library's."""
    towers: Mapping[str, Any] = model.origin.config.get("towers", {}) if model.origin else {}
    options = towers.get(model.tower_of[field], {})
    return dict(options) if isinstance(options, Mapping) else {"type": options}


def unused(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer of transformers without the truncation and padding of its last call, which would be saved
    with it, so that a processor would cut sounds to as many samples."""
    fresh = copy.deepcopy(tokenizer)
    if (backend := getattr(fresh, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    return fresh


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors for safetensors: on the CPU, none of them sharing memory with another."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
