"""How near an export is to the model that it was made of: both embed the same samples, each from the files on."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.export.parts import embed_prepared, kind_of, scale_and_bias
from mmcontrast.export.samples import Samples
from mmcontrast.modalities import ImageModality
from mmcontrast.modalities.image import LIBRARIES
from mmcontrast.modalities.library import LibraryImages

TOLERANCE = 1e-4  # of fp32
HALF_TOLERANCE = 1e-2  # of fp16
LEVELS, SHARE = 2.5, 0.05  # of 255, and of all pixels: two ways to round a scaled picture are not further apart


@dataclass(frozen=True)
class Reopened:
    """An export as its own library opens it.

    Attributes:
        embed: (field, values as in `Samples`) → unit rows [N, D].
        scale, bias: of the logits, where the format holds them.
        pixels: encoded pictures → what the library's own preprocessing makes of them, normalised, [N, 3, height, width].
    """

    embed: Callable[[str, list[Any]], Tensor]
    scale: float | None = None
    bias: float | None = None
    pixels: Callable[[list[bytes]], Tensor] | None = None


def measure(
    embedder: Embedder, fields: Sequence[str], samples: Samples, reopened: Reopened, tolerance: float
) -> dict[str, Any]:
    """Return what parity.json says: per field the largest difference between two numbers of the embeddings, those of scale and
    bias, and the samples.

    Pictures that a model was trained on with our own resizing are scaled in another way by the library, up to two of 255 levels
    apart in a few pixels. The difference that counts is then that of the same pixels; the one from the files on is told too.

    Raises:
        UserError: for a difference beyond the tolerance.
    """
    about: dict[str, Any] = {"fields": {}, "tolerance": tolerance, "samples": samples.source}
    notes = list(samples.notes)
    for field in fields:
        values, kind = samples.values[field], kind_of(embedder.model, field)
        modality = embedder.model.modality(field)
        pictures = modality if isinstance(modality, ImageModality) and not isinstance(modality, LibraryImages) else None
        if pictures and reopened.pixels and pictures.background not in LIBRARIES:
            solid = [value for value in values if not Image.open(io.BytesIO(value)).has_transparency_data]
            if len(solid) < len(values):
                notes.append(
                    f"{len(values) - len(solid)} pictures with transparency were left out: the library has its own way"
                )
            values = solid
        if not values:
            raise UserError(f"field {field!r}: no picture without transparency to compare by: give some with --data")
        ours, theirs = _ours(embedder, field, kind, values), reopened.embed(field, values)
        entry: dict[str, Any] = {"samples": len(values), "largest_difference": _largest(ours, theirs, field)}
        if pictures and reopened.pixels:
            entry["from_files"] = entry["largest_difference"]
            pixels = reopened.pixels(values)
            entry["largest_difference"] = _largest(embed_prepared(embedder.model, field, pixels), theirs, field)
            entry |= _pixel_levels(pictures, values, pixels)
            if entry["pixel_levels"] > LEVELS or entry["pixels_apart"] > SHARE:
                raise UserError(
                    f"field {field!r}: the library prepares pictures otherwise: {entry['pixels_apart']:.1%} of the pixels"
                    f" differ, by up to {entry['pixel_levels']:.1f} of 255 levels"
                )
        if not entry["largest_difference"] <= tolerance:
            raise UserError(
                f"field {field!r}: the export's embeddings differ from the model's by up to"
                f" {entry['largest_difference']:.2g}, more than {tolerance:g}: it was not written"
            )
        about["fields"][field] = entry
    about |= _scores(embedder, fields, reopened, tolerance)
    return about | ({"notes": notes} if notes else {})


def _ours(embedder: Embedder, field: str, kind: str, values: list[Any]) -> Tensor:
    name = {"image": "images", "text": "texts", "audio": "audio", "vector": "vectors"}[kind]
    given: dict[str, Any] = {name: values}
    return embedder.embed(**given, field=field, progress=False)


def _largest(ours: Tensor, theirs: Tensor, field: str) -> float:
    if ours.shape != theirs.shape:
        raise UserError(f"field {field!r}: the export's embeddings are {list(theirs.shape)}, the model's {list(ours.shape)}")
    return (ours.double() - theirs.double()).abs().max().item()


def _pixel_levels(modality: ImageModality, values: list[bytes], pixels: Tensor) -> dict[str, float]:
    """Return by how many of 255 levels pixels differ at most, and the share of those that do."""
    mine = torch.cat([modality(modality.collate([modality.transform(modality.decode(value), False)])) for value in values])
    if mine.shape != pixels.shape:
        raise UserError(f"the library makes {list(pixels.shape[1:])} of a picture, the model {list(mine.shape[1:])}")
    levels = (mine - pixels).abs() * 255 * torch.tensor(modality.std).view(-1, 1, 1)
    return {"pixel_levels": levels.max().item(), "pixels_apart": (levels > 0.5).double().mean().item()}


def _scores(embedder: Embedder, fields: Sequence[str], reopened: Reopened, tolerance: float) -> dict[str, float]:
    """Return the differences of the logit scale and bias.

    Raises:
        UserError: for one beyond the tolerance, relative to what is above 1.
    """
    if reopened.scale is None:
        return {}
    log_scale, bias = scale_and_bias(embedder.model, fields)
    pairs = {"logit_scale": (log_scale.exp().item(), reopened.scale)}
    if bias is not None or reopened.bias is not None:
        pairs["logit_bias"] = (0.0 if bias is None else bias.item(), reopened.bias or 0.0)
    for name, (ours, theirs) in pairs.items():
        if not abs(ours - theirs) <= tolerance * max(1.0, abs(ours)):
            raise UserError(f"the export's {name} is {theirs:g}, the model's {ours:g}: it was not written")
    return {name: abs(ours - theirs) for name, (ours, theirs) in pairs.items()}


def opened_pictures(values: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(value)) for value in values]


def unit(rows: Tensor | np.ndarray) -> Tensor:
    """Return rows of length 1, float32."""
    rows = torch.as_tensor(rows).detach().float()
    return torch.nn.functional.normalize(rows, dim=1)
