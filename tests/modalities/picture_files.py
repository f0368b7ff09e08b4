"""Pictures in every mode that Pillow and the PNG specification know, with colours hidden where they are transparent."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    target = io.BytesIO()
    picture.save(target, format, **options)
    return target.getvalue()


def transparent(width: int = 61, height: int = 47) -> np.ndarray:
    """uint8 [height, width, 4]: opaque at the top, garbage under alpha 0 in a box, half transparent elsewhere."""
    noise = np.random.default_rng(0)
    pixels = noise.integers(0, 256, (height // 7 + 1, width // 7 + 1, 4), dtype=np.uint8)
    pixels = pixels.repeat(7, 0).repeat(7, 1)[:height, :width].copy()
    pixels[:5, :, 3], pixels[10:30, 10:40, 3] = 255, 0
    return pixels


def files() -> dict[str, bytes]:
    """By what they are."""
    rgba = Image.fromarray(transparent())
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    palette = rgb.quantize(16)
    deep = (np.asarray(grey).astype(np.uint16) << 8) + 37
    return {
        "RGB": encoded(rgb),
        "RGBA": encoded(rgba),
        "RGBA, WebP": encoded(rgba, "WEBP", lossless=True, exact=True),
        "LA": encoded(rgba.convert("LA")),
        "L": encoded(grey),
        "1": encoded(grey.convert("1")),
        "P": encoded(palette),
        "P, one transparent colour": encoded(palette, transparency=3),
        "P, alpha by colour": encoded(palette, transparency=bytes(range(0, 256, 16))),
        "L, one transparent value": encoded(grey, transparency=int(np.asarray(grey)[20, 20])),
        "RGB, one transparent colour": encoded(rgb, transparency=tuple(np.asarray(rgb)[20, 20].tolist())),
        "I;16": encoded(Image.fromarray(deep)),
        "JPEG": encoded(rgb, "JPEG"),
        "JPEG, CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "JPEG, progressive": encoded(grey, "JPEG", progressive=True),
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, depth: int, colour: int, row: bytes, *chunks: bytes) -> bytes:
    """One row, as the specification says: its depth in bits, its type of colour, further chunks."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
