"""Pictures of a start by our own path instead of its library's: with the library's size, numbers and method, and compared."""

import numpy as np
import torch
from PIL import Image

from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality
from mmcontrast.modalities.library import LibraryImages
from mmcontrast.models.contrastive import ContrastiveModel
from mmcontrast.models.options import StartOptions

LEVELS = 3.0  # of 255: Pillow and torchvision round otherwise, by one or two; and the middle of a picture, by one pixel
SHAPES = ((1.5, 2.0), (3.1, 1.2), (0.5, 0.7))  # of the pictures that are compared, in sides of the model's


def set_decoding(model: ContrastiveModel, start: StartOptions) -> ContrastiveModel:
    """Let our own path read the pictures of a model, if its start asks for it.

    Raises:
        UserError: for a model without pictures; where our path would not give about the library's pixels.
    """
    if start.decoding == "library":
        return model
    pictures = {field: of for field in model.modalities if isinstance(of := model.modality(field), ImageModality)}
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
    """
    Raises:
        ValueError: if it would give other pixels than the library.
    """
    if isinstance(images.as_ours, str):
        raise ValueError(images.as_ours)
    ours = ImageModality(**images.as_ours)
    levels = 255 * torch.tensor(ours.std).view(-1, 1, 1)
    for wide, tall in SHAPES:
        picture = stripes(round(wide * ours.size), round(tall * ours.size)).convert(ours.mode)
        theirs, mine = images.prepare(picture), ours(ours.collate([ours.transform(ours.encode(picture), False)]))[0]
        if theirs.shape != mine.shape:
            raise ValueError(f"it makes {list(theirs.shape)} of a picture, ours {list(mine.shape)}")
        shifts = [mine[:, y : y + mine.shape[1] - 2, x : x + mine.shape[2] - 2] for y in range(3) for x in range(3)]
        apart = min(((theirs[:, 1:-1, 1:-1] - shifted) * levels).abs().max().item() for shifted in shifts)
        if apart > LEVELS:
            raise ValueError(f"its pixels are up to {apart:.0f} of 255 levels from ours")
    return ours


def stripes(width: int, height: int) -> Image.Image:
    """Return a picture of edges and gradients, in which another size, place, or method of scaling is seen; without black and
    white, beyond which libraries cut what bicubic scaling overshoots at different times."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = x * 128 // width, y * 128 // height, (x // 5 + y // 7) % 2 * 128
    return Image.fromarray((64 + np.stack([red, green, blue], 2)).astype(np.uint8))
