"""Pairs as img2dataset writes them (`00000.tar` with .jpg, .txt and .json, keys of 5 + 4 digits), by webdataset and PIL."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

NAMES = ["fox", "owl", "harbour", "bicycle", "violin", "teapot", "lighthouse", "windmill"]


def jpeg(seed: int, width: int = 32, height: int = 24, quality: int = 90) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(target, "JPEG", quality=quality)
    return target.getvalue()


def pair(shard: int, row: int, caption: str | None = None, picture: bytes | None = None, **about: object) -> dict:
    """Return a sample of webdataset; an entry of `about` that is None is left out."""
    number = shard * 100 + row
    key = f"{shard:05d}{row:04d}"
    caption = f"a photo of a {NAMES[number % len(NAMES)]} number {number}" if caption is None else caption
    entries = {"url": f"https://example.com/{key}.jpg", "caption": caption, "key": key, "status": "success"}
    entries |= {"sample_id": number}
    entries |= {"similarity": round((number * 37 % 100) / 100, 2), "uid": f"{number:032x}", "group_id": number // 2, **about}
    entries = {name: value for name, value in entries.items() if value is not None}
    data = jpeg(number) if picture is None else picture
    return {"__key__": key, "jpg": data, "txt": caption, "json": json.dumps(entries).encode()}


def write_pairs(folder: Path, shards: int = 3, rows: int = 8, samples: list[list[dict]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    samples = samples or [[pair(shard, row) for row in range(rows)] for shard in range(shards)]
    for shard, of in enumerate(samples):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for sample in of:
                writer.write(sample)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a selection, by name."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
