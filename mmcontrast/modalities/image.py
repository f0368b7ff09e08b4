"""Images, decoded by simplejpeg or Pillow under limits, transformed by torchvision on uint8, normalised on the device."""

import copy
import io
import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from mmcontrast.modalities.base import DecodeError, Modality
from mmcontrast.modalities.parts import JPEG_START, PNG_START, check_parts, check_scans

FORMATS = ("JPEG", "PNG", "WEBP")  # nothing else is tried: Pillow would hand EPS to Ghostscript
OTHER_FORMATS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"<svg": "drawing, SVG",
}  # by their first bytes
Image.MAX_IMAGE_PIXELS = None  # our own limit, `max_pixels`, is checked on the header, before any pixel is decoded
warnings.filterwarnings("ignore", module=r"PIL\.")  # its warnings of palettes and metadata name no file
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, struct.error, zlib.error)
LIBRARIES = ("open_clip", "drop")  # values of `background` that are no colours
INTERPOLATIONS, RESIZES = ("bicubic", "bilinear"), ("shortest", "squash")


class ImageModality(Modality):
    """Pictures: uint8 [channels, size, size] in the worker; float, normalised, on the device.

    Args:
        size: side in pixels.
        channels: 3 (RGB) or 1 (grey).
        mean, std: per channel, of pixel values in [0, 1]. Default: 0.5 and 0.5.
        augment: torchvision v2 transforms for training, in order, e.g. [{type: RandomAffine, degrees: 5}]; default:
            RandomResizedCrop to 0.9–1.0 of the area, as open_clip does. They end at `size`, or a resize is added.
        max_pixels: larger pictures are refused before they are decoded.
        scaled_decode: decode a large JPEG at 1/2, 1/4 or 1/8 of its side, if that is at least `size`: faster, and 44–48 dB
            from the exact picture.
        background: the colour under transparent pixels, a name ("white"), "#rrggbb", or [red, green, blue]. For weights that
            were pretrained without one: "drop" shows the colours that are hidden there, as Pillow's convert("RGB") and timm
            do; "open_clip" scales the picture with its transparency, palette or 16 bits, and converts it then, as open_clip
            does (before `augment`, if there is any). Default: white; that of the library, where the tower has pretrained
            weights of open_clip's or timm's.
        interpolation: "bicubic" or "bilinear", with antialiasing.
        resize: "shortest": the shorter side is scaled to `resize_to`, and the middle is cut out; "squash": both sides are,
            whatever the picture's shape.
        resize_to: side in pixels, before the middle of `size` × `size` is cut out. Default: `size`.

    Attributes:
        mean, std: of the normalisation.
        side: pictures are scaled to it on the device in training; None: they are not.
    """

    side: int | None = None

    factor: Tensor
    shift: Tensor
    of_source = frozenset({"augment", "max_pixels", "scaled_decode", "background"})
    extensions = ("jpg", "jpeg", "png", "webp", "image")

    def __init__(
        self,
        size: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Sequence[Any] | None = None,
        max_pixels: int = 64_000_000,
        scaled_decode: bool = False,
        background: str | Sequence[int] = "white",
        interpolation: str = "bicubic",
        resize: str = "shortest",
        resize_to: int | None = None,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size={size} is no side in pixels")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: pictures have 3 (RGB) or 1 (grey)")
        for name, values in {"mean": mean, "std": std}.items():
            if values is not None and (len(values) != channels or not all(math.isfinite(value) for value in values)):
                raise ValueError(f"{name}={values}: it must be {channels} numbers, one for each channel, of values in [0, 1]")
        if std is not None and min(std) <= 0:
            raise ValueError(f"std={std}: each must be more than 0")
        for name, value, known in (("interpolation", interpolation, INTERPOLATIONS), ("resize", resize, RESIZES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, it must be {' or '.join(known)}")
        self.interpolation, self.resize, self.resize_to = interpolation, resize, size if resize_to is None else resize_to
        if self.resize_to < size:
            raise ValueError(f"resize_to={resize_to} is less than size={size}, which is cut out of it")
        self.background, self.colour = background, _colour(background)
        self.mode = "RGB" if channels == 3 else "L"
        self.augments = augment is not None
        self.size, self.channels, self.max_pixels, self.scaled_decode = size, channels, max_pixels, scaled_decode
        from mmcontrast.modalities.image_transforms import make_transforms

        self.train_transform, self.eval_transform = make_transforms(size, augment, interpolation, resize, self.resize_to)
        self.mean = [float(value) for value in mean or [0.5] * channels]
        self.std = [float(value) for value in std or [0.5] * channels]
        channel_mean, channel_std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        self.register_buffer("factor", 1 / (255 * channel_std), persistent=False)
        self.register_buffer("shift", channel_mean / channel_std, persistent=False)

    def decode(self, data: bytes) -> Any:
        """Decode to uint8 [channels, height, width], or to a Pillow image if that is converted after scaling."""
        if data.startswith(JPEG_START) and (picture := self._decode_jpeg(data)) is not None:
            return picture
        check_parts(data)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if data.startswith(JPEG_START):
                    check_scans(data, *image.size, self.max_pixels)
                elif data.startswith(PNG_START) and self.background not in LIBRARIES:
                    scale_transparency(image, depth=data[24])
                return self.encode(image)
        except UnidentifiedImageError as error:
            kind = next((f"a {name}: convert it; " for start, name in OTHER_FORMATS.items() if data.startswith(start)), "")
            raise DecodeError(f"not a picture that can be decoded ({kind}no {', '.join(FORMATS)})") from error
        except DAMAGED as error:
            raise DecodeError(f"not a picture that can be decoded ({error})") from error

    def _decode_jpeg(self, data: bytes) -> Tensor | None:
        """Decode by libjpeg-turbo; return None for files that are left to Pillow: CMYK, and those with any warning or error."""
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            self._check_size(width, height)
            check_scans(data, width, height, self.max_pixels)
            if space not in ("YCbCr", "Gray"):
                return None
            least = self.resize_to if self.scaled_decode else 0
            array = simplejpeg.decode_jpeg(data, "RGB" if self.channels == 3 else "GRAY", min_height=least, min_width=least)
        except ValueError:
            return None
        return torch.from_numpy(array).permute(2, 0, 1)

    def _check_size(self, width: int, height: int) -> None:
        """Check a picture's size against the limits.

        Raises:
            DecodeError: if it is too large, or too narrow.
        """
        if width * height > self.max_pixels:
            raise DecodeError(f"{width}×{height} pixels, more than max_pixels={self.max_pixels}")
        if max(width, height) * self.resize_to**2 > self.max_pixels * max(1, min(width, height)):
            raise DecodeError(f"{width}×{height} pixels, so narrow that scaled to {self.resize_to} it has more than max_pixels")

    def encode(self, value: Any) -> Any:
        """Return a PIL image, or pixels (uint8, [height, width] or [height, width, channels]), in the form of `decode`."""
        picture = self.picture(value)
        if self.background == "open_clip" and picture.mode not in ("RGB", "L"):
            return without_palette_alpha(picture)
        return self._pixels(picture if self.background in LIBRARIES else over(picture, self.colour))

    def _pixels(self, picture: Image.Image) -> Tensor:
        """Return a picture's pixels, uint8 [channels, height, width]."""
        pixels = np.array(without_palette_alpha(picture).convert(self.mode))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], self.channels)).permute(2, 0, 1)

    def picture(self, value: Any) -> Image.Image:
        """Return a PIL image, or pixels as one, after checking the limits.

        Raises:
            DecodeError: if it exceeds one, or is not a picture.
        """
        if not isinstance(value, Image.Image):
            pixels = np.asarray(value)
            if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
                raise DecodeError(f"pixels of shape {pixels.shape}, {pixels.dtype}: a picture is uint8 [height, width, 3]")
            value = Image.fromarray(pixels)
        if value.mode == "F":
            raise DecodeError("a picture of mode F, whose range of values is not known: convert it to RGB or L")
        self._check_size(value.width, value.height)
        value.load()
        return value

    def as_rgb(self) -> "ImageModality":
        """Return a copy for pictures that a loader has converted to RGB, as CLIP_benchmark's does; a background colour
        stays."""
        if self.background != "open_clip":
            return self
        other = copy.copy(self)
        other.background = "drop"
        return other

    def transform(self, raw: Any, training: bool) -> Tensor:
        if training and self.augments and isinstance(raw, Image.Image):
            raw = self._pixels(raw)
        prepared = self.train_transform(raw) if training else self.eval_transform(raw)
        return self._pixels(prepared) if isinstance(prepared, Image.Image) else prepared

    def blank(self) -> Tensor:
        return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8)

    def forward(self, batch: Tensor) -> Tensor:
        pictures = self.at_side(batch.float())
        return pictures.mul_(self.factor).sub_(self.shift)  # (x / 255 − mean) / std, in place

    def at_side(self, pictures: Tensor) -> Tensor:
        """Scale a batch of floats to `side`, in training."""
        if not self.training or self.side in (None, pictures.shape[-1]):
            return pictures
        return F.interpolate(pictures, [self.side] * 2, mode="bicubic", antialias=True)


def over(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Return a picture with 8 bits per channel, with a colour under its transparent pixels."""
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip
        values = np.asarray(picture).clip(0, 65535)
        grey = Image.fromarray((values / 257).round().astype(np.uint8))
        transparent = picture.info.get("transparency")
        if transparent is None:
            return grey
        picture = Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))
    if not picture.has_transparency_data:
        return picture
    foreground = picture.convert("RGBA")
    background = Image.new("RGB", picture.size, colour)
    background.paste(foreground, mask=foreground)
    return background


def scale_transparency(picture: Image.Image, depth: int) -> None:
    """Scale the transparent value of a PNG from the file's bit depth to 8 bits; Pillow scales only the pixels."""
    value = picture.info.get("transparency")
    if picture.mode == "L" and isinstance(value, int) and depth < 8:
        picture.info["transparency"] = value * (255 // (2**depth - 1))
    elif picture.mode == "RGB" and isinstance(value, tuple) and depth == 16:
        picture.info["transparency"] = tuple(number >> 8 for number in value)


def without_palette_alpha(picture: Image.Image) -> Image.Image:
    """Return the picture so that it converts to RGB without a warning: without a palette's transparency, which is lost
    anyway."""
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.copy()
        del picture.info["transparency"]
    return picture


def _colour(background: Any) -> tuple[int, ...]:
    """Return the colour of a `background`; black for those of libraries, which have none.

    Raises:
        ValueError: if it is no colour.
    """
    if background in LIBRARIES:
        return (0, 0, 0)
    try:
        colour = ImageColor.getrgb(background) if isinstance(background, str) else tuple(background)
    except (ValueError, TypeError):
        colour = ()
    if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
        known = "a colour (white, '#ffffff', [255, 255, 255])"
        raise ValueError(f"background is {background!r}: it must be {known}, or one of {', '.join(LIBRARIES)}")
    return colour
