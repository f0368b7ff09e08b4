"""Let our own image pipeline read a start's pictures instead of its library's, after comparing their pixels."""

import numpy as np
import torch
from PIL import Image

from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality
from mmcontrast.modalities.library import LibraryImages
from mmcontrast.models.contrastive import ContrastiveModel
from mmcontrast.models.options import StartOptions

LEVELS = 3.0  # allowed difference of 255: Pillow and torchvision round by one or two differently, and centre by one pixel
SHAPES = ((1.5, 2.0), (3.1, 1.2), (0.5, 0.7))  # width and height of the compared pictures, in sides of the model's


def set_decoding(model: ContrastiveModel, start: StartOptions) -> ContrastiveModel:
    """Let our own pipeline read the pictures of a model, if its start asks for it.

    Raises:
        UserError: for a model without pictures; if our pipeline gives other pixels than the library.
    """
    if start.decoding == "library":
        return model
    modalities = {field: model.modality(field) for field in model.modalities}
    pictures = {field: modality for field, modality in modalities.items() if isinstance(modality, ImageModality)}
    if not pictures:
        raise UserError(f"model.start: {start.model}: decoding={start.decoding}: it has no field of pictures: leave it out")
    for field, images in pictures.items():
        if isinstance(images, LibraryImages):
            try:
                images.fast = our_path(images)
            except ValueError as error:
                raise UserError(
                    f"model.start: {start.model}: decoding={start.decoding}: our path cannot read field {field!r} as its"
                    f" library does: {error}: leave decoding out"
                ) from error
            images.fast_in_evaluation = start.decoding == "fast_everywhere"
    return model


def our_path(images: LibraryImages) -> ImageModality:
    """Return our own pipeline for a library's pictures, compared with it on pictures of several shapes.

    Raises:
        ValueError: if it gives other pixels than the library.
    """
    if isinstance(images.as_ours, str):
        raise ValueError(images.as_ours)
    ours = ImageModality(**images.as_ours)
    levels = 255 * torch.tensor(ours.std).view(-1, 1, 1)
    for width_in_sides, height_in_sides in SHAPES:
        picture = stripes(round(width_in_sides * ours.size), round(height_in_sides * ours.size)).convert(ours.mode)
        expected = images.prepare(picture)
        pixels = ours(ours.collate([ours.transform(ours.encode(picture), False)]))[0]
        if expected.shape != pixels.shape:
            raise ValueError(f"it makes {list(expected.shape)} of a picture, ours {list(pixels.shape)}")
        height, width = pixels.shape[1] - 2, pixels.shape[2] - 2
        shifts = [pixels[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        difference = min(((expected[:, 1:-1, 1:-1] - shifted) * levels).abs().max().item() for shifted in shifts)
        if difference > LEVELS:
            raise ValueError(f"its pixels are up to {difference:.0f} of 255 levels from ours")
    return ours


def stripes(width: int, height: int) -> Image.Image:
    """Return a picture of edges and gradients, which shows a different size, offset or method of scaling. It has no black and
    white, as libraries clip the overshoot of bicubic scaling at different times."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = x * 128 // width, y * 128 // height, (x // 5 + y // 7) % 2 * 128
    return Image.fromarray((64 + np.stack([red, green, blue], 2)).astype(np.uint8))
