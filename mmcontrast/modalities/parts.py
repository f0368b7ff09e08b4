"""Count the parts of a picture's file before it is decoded: a small file may have so many that a decoder takes minutes."""

import re

import numpy as np

from mmcontrast.modalities.base import DecodeError

JPEG_START, PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
MAX_SCANS = 16  # of a JPEG with the most pixels; smaller ones may have more. Encoders write 1 to about 12
MAX_PARTS = 50_000  # segments of a JPEG, chunks of a PNG: an encoder that writes 8 KiB at a time writes 32,768 in 256 MiB
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # no byte of a scan's data, and no restart
SCAN, END, ALONE = b"\xda", b"\xd9", (b"\x01", b"\xd8")  # the last have no length


def check_scans(data: bytes, width: int, height: int, max_pixels: int) -> None:
    """Check that a JPEG does not have too many scans, each of which decodes all pixels.

    Raises:
        DecodeError: for more than `MAX_SCANS` times `max_pixels` pixels in all scans.
    """
    pixels = (width + 31) * (height + 31)  # whole blocks, of up to 32 × 32
    if _markers(data, SCAN) * pixels > MAX_SCANS * max_pixels:  # counts the scans of a thumbnail in the metadata too
        scans = _segments(data).count(SCAN)
        if scans * pixels > MAX_SCANS * max_pixels:
            raise DecodeError(f"{scans} scans of {width}×{height} pixels, more than {MAX_SCANS} × max_pixels={max_pixels}")


def _markers(data: bytes, kind: bytes) -> int:
    """Return how often a marker's bytes occur, at even and odd positions."""
    value = int.from_bytes(b"\xff" + kind, "little")
    return sum(int(np.count_nonzero(np.frombuffer(data, "<u2", (len(data) - k) // 2, k) == value)) for k in (0, 1))


def check_parts(data: bytes) -> None:
    """Check the number of segments of a JPEG, or chunks of a PNG, which Pillow reads one by one.

    Raises:
        DecodeError: for more than `MAX_PARTS`.
    """
    if data.startswith(JPEG_START):
        _segments(data, until=SCAN)
    elif data.startswith(PNG_START):
        offset = len(PNG_START)
        for _ in range(MAX_PARTS):
            if data[offset + 4 : offset + 8] in (b"IEND", b""):
                return
            offset += int.from_bytes(data[offset : offset + 4], "big") + 12
        raise DecodeError(f"more than {MAX_PARTS} chunks")


def _segments(data: bytes, until: bytes = END) -> list[bytes]:
    """Return the markers of a JPEG's segments up to the first of a kind, or to its end."""
    offset, markers = 2, []
    while (marker := MARKER.search(data, offset)) and marker[1] not in (until, END):
        markers.append(marker[1])
        if len(markers) > MAX_PARTS:
            raise DecodeError(f"more than {MAX_PARTS} segments")
        offset = marker.end()
        if marker[1] not in ALONE:
            offset += max(2, int.from_bytes(data[offset : offset + 2], "big"))
    return markers
