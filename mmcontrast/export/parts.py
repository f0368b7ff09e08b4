"""What every format asks of a model: its plain weights, its fields by kind, the scale and bias of two of them."""

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
    """Make every weight of a model one tensor, in place: what is parametrized, as by low-rank updates, is merged.

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


def chosen_fields(model: ContrastiveModel, there: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """Return the fields to be exported: those that are asked for, or all.

    Raises:
        UserError: for one that the model has not.
    """
    for field in asked or ():
        if field not in there:
            raise UserError(f"--fields: the model has no field {field!r} that is embedded; {suggestion(field, there)}")
    return list(asked or there)


def image_and_text(model: ContrastiveModel, fields: Sequence[str], library: str) -> tuple[str, str]:
    """Return the names of the one field of pictures and the one field of texts.

    Raises:
        UserError: if the fields are others.
    """
    kinds = {field: kind_of(model, field) for field in fields}
    if sorted(kinds.values()) != ["image", "text"]:
        has = ", ".join(f"{field} ({kind or 'another kind'})" for field, kind in kinds.items())
        pair = [next((f for f, k in kinds.items() if k == kind), "") for kind in ("image", "text")]
        remedy = f": leave the others out with --fields {','.join(pair)}" if all(pair) else ""
        raise UserError(f"{library} holds one field of pictures and one of texts, this model has {has}{remedy}")
    return next(f for f, k in kinds.items() if k == "image"), next(f for f, k in kinds.items() if k == "text")


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
    """Return unit embeddings of what a field's tower takes: the modality has done its part, or another library has."""
    tower = model.tower_of[field]
    return F.normalize(model.projections[tower](model.towers[tower](prepared)).float(), dim=1)


def projection_of(model: ContrastiveModel, field: str) -> nn.Module:
    return model.projections[model.tower_of[field]]


def origin_of(model: ContrastiveModel, names: Sequence[str]) -> Origin | None:
    """Return where some fields came from: where the model did, or the one model that it began with, if all of them are its."""
    origin = model.origin
    starts = [origin.starts.get(model.tower_of[name]) for name in names] if origin else []
    return starts[0] if starts and starts[0] and all(one is starts[0] for one in starts) else origin


def tower_options(model: ContrastiveModel, field: str) -> dict[str, Any]:
    """Return the options of a field's tower in the config that the model was composed of; {} for one of a library's."""
    towers: Mapping[str, Any] = model.origin.config.get("towers", {}) if model.origin else {}
    options = towers.get(model.tower_of[field], {})
    return dict(options) if isinstance(options, Mapping) else {"type": options}


def unused(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer of transformers as it was before it was called: it keeps the truncation and padding of its
    last call, which would be saved with it, and a processor would then cut sounds to as many samples."""
    found = copy.deepcopy(tokenizer)
    if (backend := getattr(found, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    return found


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, none of them sharing memory with another."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
