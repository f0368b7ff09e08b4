"""Makes pictures, captions and sounds of Tux Paint: `mmcontrast data build data_pipelines/stamps/stamps.yaml`."""

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mmcontrast.data.writer import Sample
from mmcontrast.errors import UserError

FOLDER = "usr/share/tuxpaint/stamps"
HELD_OUT = 5  # one caption in five is never trained on


class Stamps:
    """A source with one sample for each picture (png) of `folder`, to which the package tuxpaint-stamps-default is unpacked.

    `languages`: of the captions (`key.fr.txt`) and spoken captions (`key.fr.ogg`) beside the English ones; `side`: the
    longest, in pixels; `seed`: of the shards' order. `val_mirrored` holds the pictures of `train`, mirrored.
    """

    def __init__(self, folder: str, languages: Sequence[str] = ("fr", "es", "ru"), side: int = 256, seed: int = 0) -> None:
        self.folder, self.languages, self.side, self.seed = Path(folder), tuple(languages), side, seed

    def splits(self) -> dict[str, Sequence[Path]]:
        """Return the pictures of each split; stamps that share a caption are in one split."""
        files = sorted(self.folder.rglob("*.png"))
        pictures = [p for p in files if not p.stem.endswith(("_mirror", "_flip")) and p.with_suffix(".txt").is_file()]
        if not pictures:
            raise UserError(f"{self.folder} holds no stamps: README.md of data_pipelines/stamps says how to unpack them")
        order = np.random.default_rng(self.seed).permutation(len(pictures))
        splits: dict[str, list[Path]] = {"train": [], "val": []}
        for number in order:
            splits["train" if self.group_id(pictures[number]) % HELD_OUT else "val"].append(pictures[number])
        return splits | {"val_mirrored": splits["train"]}

    def group_id(self, picture: Path) -> int:
        return zlib.crc32(captions(picture)["en"].lower().encode())

    def make_sample(self, split: str, picture: Path) -> Sample:
        texts, name = captions(picture), picture.relative_to(self.folder).with_suffix("").as_posix()
        metadata = {
            "sample_id": zlib.crc32(name.encode()),
            "group_id": self.group_id(picture),
            "category": name.partition("/")[0],
        }
        picture_bytes = on_white(picture, self.side, mirrored=split == "val_mirrored")
        sample: Sample = {"__key__": name.replace("/", "-").replace(".", "_"), "png": picture_bytes}
        sample |= {"txt": texts["en"], "json": metadata | {"name": name}}
        sample |= {f"{language}.txt": texts[language] for language in self.languages if language in texts}
        sounds = {"ogg": ".ogg", "en.ogg": "_desc.ogg"} | {f"{lang}.ogg": f"_desc_{lang}.ogg" for lang in self.languages}
        files = {member: picture.with_name(picture.stem + ending) for member, ending in sounds.items()}
        return sample | {member: file.read_bytes() for member, file in files.items() if file.is_file()}


def captions(picture: Path) -> dict[str, str]:
    """Return the captions of a picture by language: the first line is English, the others are like "fr.utf8=Une pomme"."""
    file = picture.with_suffix(".txt")
    try:
        first, *translations = file.read_text("utf-8").splitlines()
    except ValueError as error:
        raise UserError(f"{file} is no caption in UTF-8 ({error}): remove it, or mend it") from error
    pairs = (line.partition(".utf8=") for line in translations)
    return {"en": first.strip()} | {language: text.strip() for language, _, text in pairs if text.strip()}


def on_white(picture: Path, side: int, mirrored: bool) -> bytes:
    """Return a PNG of a picture on white, scaled down."""
    with Image.open(picture) as image:
        rgba = ImageOps.mirror(image.convert("RGBA")) if mirrored else image.convert("RGBA")
    rgba.thumbnail((side, side))
    out = io.BytesIO()
    Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB").save(out, "PNG")
    return out.getvalue()
