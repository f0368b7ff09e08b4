"""Measure the parity of an export with its model: both embed the same samples, each from the encoded files."""

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

TOLERANCE = 1e-4  # of fp32
HALF_TOLERANCE = 1e-2  # of fp16
COMMON = ("RGB", "L")  # modes of pictures that every library treats alike: not transparency, palettes, 16 bits
LEVELS, SHARE = 2.5, 0.05  # of 255, and of all pixels: bounds on the effect of rounding a scaled picture in another way


@dataclass(frozen=True)
class Reopened:
    """An export, opened by its own library.

    Attributes:
        embed: (field, values as in `Samples`) → unit rows [N, D].
        scale, bias: of the logits, if the format holds them.
        pixels: encoded pictures → normalised pixels [N, 3, height, width] by the library's own preprocessing.
        std: by which it normalised them.
    """

    embed: Callable[[str, list[Any]], Tensor]
    scale: float | None = None
    bias: float | None = None
    pixels: Callable[[list[bytes]], Tensor] | None = None
    std: Sequence[float] = (0.5, 0.5, 0.5)


def measure(
    embedder: Embedder, fields: Sequence[str], samples: Samples, reopened: Reopened, tolerance: float
) -> dict[str, Any]:
    """Compute the contents of parity.json: per field the largest difference between two numbers of the embeddings, the
    differences of scale and bias, and the samples.

    Another library than the model's own scales pictures in another way, up to two of 255 levels apart in a few pixels. The
    difference that counts is then that of the same pixels; the one from the files is reported, too.

    Raises:
        UserError: for a difference beyond the tolerance.
    """
    parity: dict[str, Any] = {"fields": {}, "tolerance": tolerance, "samples": samples.source}
    notes = list(samples.notes)
    for field in fields:
        values, kind = samples.values[field], kind_of(embedder.model, field)
        modality = embedder.model.modality(field)
        image_modality = modality if isinstance(modality, ImageModality) and reopened.pixels else None
        if image_modality:
            common = [value for value in values if Image.open(io.BytesIO(value)).mode in COMMON]
            if len(common) < len(values):
                notes.append(f"{len(values) - len(common)} pictures with transparency, a palette or 16 bits were left out")
            values = common
        if not values:
            raise UserError(f"field {field!r}: no picture that is RGB or grey to compare by: give some with --data")
        ours, theirs = _model_embeddings(embedder, field, kind, values), reopened.embed(field, values)
        entry: dict[str, Any] = {"samples": len(values), "largest_difference": _largest_difference(ours, theirs, field)}
        if image_modality and reopened.pixels:
            entry["from_files"] = entry["largest_difference"]
            pixels = reopened.pixels(values)
            entry["largest_difference"] = _largest_difference(embed_prepared(embedder.model, field, pixels), theirs, field)
            entry |= _pixel_levels(image_modality, values, pixels, reopened.std)
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
        parity["fields"][field] = entry
    parity |= _score_differences(embedder, fields, reopened, tolerance)
    return parity | ({"notes": notes} if notes else {})


def _model_embeddings(embedder: Embedder, field: str, kind: str, values: list[Any]) -> Tensor:
    name = {"image": "images", "text": "texts", "audio": "audio", "vector": "vectors"}[kind]
    query: dict[str, Any] = {name: values}
    return embedder.embed(**query, field=field, progress=False)


def _largest_difference(ours: Tensor, theirs: Tensor, field: str) -> float:
    if ours.shape != theirs.shape:
        raise UserError(f"field {field!r}: the export's embeddings are {list(theirs.shape)}, the model's {list(ours.shape)}")
    return (ours.double() - theirs.double()).abs().max().item()


def _pixel_levels(modality: ImageModality, values: list[bytes], pixels: Tensor, std: Sequence[float]) -> dict[str, float]:
    """Return by how many of 255 levels pixels differ at most, and the share of those that do. If a library rounds the centre of
    a picture to another pixel, compare the nearest crop, and count these pictures."""
    std_levels, largest, apart, shifted = torch.tensor(std).view(-1, 1, 1), 0.0, 0.0, 0
    for value, theirs in zip(values, pixels, strict=True):
        ours = modality(modality.collate([modality.transform(modality.decode(value), False)]))[0]
        if ours.shape != theirs.shape:
            raise UserError(f"the library makes {list(theirs.shape)} of a picture, the model {list(ours.shape)}")
        levels = _level_differences(ours, theirs, std_levels)
        if levels.max() > LEVELS:
            interior = theirs[:, 1:-1, 1:-1]
            height, width = interior.shape[1:]
            levels_by_offset = {
                (down, right): _level_differences(ours[:, down : down + height, right : right + width], interior, std_levels)
                for down in range(3)
                for right in range(3)
            }
            nearest_offset = min(levels_by_offset, key=lambda offset: levels_by_offset[offset].mean().item())
            levels, shifted = levels_by_offset[nearest_offset], shifted + (nearest_offset != (1, 1))
        largest, apart = max(largest, levels.max().item()), apart + (levels > 0.5).double().mean().item() / len(values)
    return {"pixel_levels": largest, "pixels_apart": apart, "shifted_crops": shifted}


def _level_differences(ours: Tensor, theirs: Tensor, deviation: Tensor) -> Tensor:
    return (ours - theirs).abs() * 255 * deviation


def _score_differences(embedder: Embedder, fields: Sequence[str], reopened: Reopened, tolerance: float) -> dict[str, float]:
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
    """Normalize rows to length 1, float32."""
    rows = torch.as_tensor(rows).detach().float()
    return torch.nn.functional.normalize(rows, dim=1)
