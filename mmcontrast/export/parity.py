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

TOLERANCE = 1e-4  # of fp32
HALF_TOLERANCE = 1e-2  # of fp16
COMMON = ("RGB", "L")  # modes of pictures that every library treats alike: not transparency, palettes, 16 bits
LEVELS, SHARE = 2.5, 0.05  # of 255, and of all pixels: two ways to round a scaled picture are not further apart


@dataclass(frozen=True)
class Reopened:
    """An export as its own library opens it.

    Attributes:
        embed: (field, values as in `Samples`) → unit rows [N, D].
        scale, bias: of the logits, where the format holds them.
        pixels: encoded pictures → what the library's own preprocessing makes of them, normalised, [N, 3, height, width].
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
    """Return what parity.json says: per field the largest difference between two numbers of the embeddings, those of scale and
    bias, and the samples.

    Another library than the model's own scales pictures in another way, up to two of 255 levels apart in a few pixels. The
    difference that counts is then that of the same pixels; the one from the files on is told too.

    Raises:
        UserError: for a difference beyond the tolerance.
    """
    about: dict[str, Any] = {"fields": {}, "tolerance": tolerance, "samples": samples.source}
    notes = list(samples.notes)
    for field in fields:
        values, kind = samples.values[field], kind_of(embedder.model, field)
        modality = embedder.model.modality(field)
        pictures = modality if isinstance(modality, ImageModality) and reopened.pixels else None
        if pictures:
            common = [value for value in values if Image.open(io.BytesIO(value)).mode in COMMON]
            if len(common) < len(values):
                notes.append(f"{len(values) - len(common)} pictures with transparency, a palette or 16 bits were left out")
            values = common
        if not values:
            raise UserError(f"field {field!r}: no picture that is RGB or grey to compare by: give some with --data")
        ours, theirs = _ours(embedder, field, kind, values), reopened.embed(field, values)
        entry: dict[str, Any] = {"samples": len(values), "largest_difference": _largest(ours, theirs, field)}
        if pictures and reopened.pixels:
            entry["from_files"] = entry["largest_difference"]
            pixels = reopened.pixels(values)
            entry["largest_difference"] = _largest(embed_prepared(embedder.model, field, pixels), theirs, field)
            entry |= _pixel_levels(pictures, values, pixels, reopened.std)
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


def _pixel_levels(modality: ImageModality, values: list[bytes], pixels: Tensor, std: Sequence[float]) -> dict[str, float]:
    """Return by how many of 255 levels pixels differ at most, and the share of those that do; where a library rounds the middle
    of a picture to another pixel, the crop that is nearest, and how many pictures that is."""
    deviation, most, apart, shifted = torch.tensor(std).view(-1, 1, 1), 0.0, 0.0, 0
    for value, theirs in zip(values, pixels, strict=True):
        mine = modality(modality.collate([modality.transform(modality.decode(value), False)]))[0]
        if mine.shape != theirs.shape:
            raise UserError(f"the library makes {list(theirs.shape)} of a picture, the model {list(mine.shape)}")
        best = _levels(mine, theirs, deviation)
        if best.max() > LEVELS:
            inside = theirs[:, 1:-1, 1:-1]
            height, width = inside.shape[1:]
            others = {
                (down, right): _levels(mine[:, down : down + height, right : right + width], inside, deviation)
                for down in range(3)
                for right in range(3)
            }
            crop = min(others, key=lambda place: others[place].mean().item())
            best, shifted = others[crop], shifted + (crop != (1, 1))
        most, apart = max(most, best.max().item()), apart + (best > 0.5).double().mean().item() / len(values)
    return {"pixel_levels": most, "pixels_apart": apart, "shifted_crops": shifted}


def _levels(mine: Tensor, theirs: Tensor, deviation: Tensor) -> Tensor:
    return (mine - theirs).abs() * 255 * deviation


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
