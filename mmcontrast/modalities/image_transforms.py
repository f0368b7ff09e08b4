"""The torchvision transforms of images, imported only for models with images: torchvision imports more slowly than torch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import v2

from mmcontrast.components import build

AUGMENTATIONS = {name: value for name, value in vars(v2).items() if isinstance(value, type)}
INTERPOLATIONS = {"bicubic": v2.InterpolationMode.BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}


def make_transforms(
    size: int, augment: Sequence[Any] | None, interpolation: str, resize: str, resize_to: int
) -> tuple[v2.Transform, v2.Transform]:
    """Return the transforms of training and of evaluation: uint8 [channels, height, width] to [channels, size, size].

    Args:
        augment: specs of torchvision v2 transforms, by name; None: a random crop of 0.9 to 1.0 of the area.
        interpolation, resize, resize_to: as in `ImageModality`.
    """
    method = INTERPOLATIONS[interpolation]

    def fit(side: int) -> list[v2.Transform]:
        sides = side if resize == "shortest" else [side, side]
        return [v2.Resize(sides, interpolation=method, antialias=True), v2.CenterCrop(size)]

    if augment is None:
        train = [RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=method, antialias=True)]
    else:
        augmentations = [build(spec, AUGMENTATIONS, "augmentation", torch.nn.Module) for spec in augment]
        train = [*augmentations, *fit(size if augmentations else resize_to)]
    return v2.Compose(train), v2.Compose(fit(resize_to))


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's RandomResizedCrop with all random numbers drawn in one call, which saves a tenth of a small JPEG's time."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        low, high = (math.log(ratio) for ratio in self.ratio)
        for share, shape, down, right in torch.rand(10, 4).tolist():
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + shape * (high - low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return {"top": int(down * (height - h + 1)), "left": int(right * (width - w + 1)), "height": h, "width": w}
        w = min(width, round(height * max(self.ratio)))  # the largest crop in the middle
        h = min(height, round(width / min(self.ratio)))
        return {"top": (height - h) // 2, "left": (width - w) // 2, "height": h, "width": w}
