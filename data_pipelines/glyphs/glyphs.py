"""Makes pictures, captions and spoken names of characters: `mmcontrast data build data_pipelines/glyphs/glyphs.yaml`."""

import io
from collections.abc import Sequence
from functools import cache

import numpy as np
import soundfile
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.glyphs import characters, speech
from mmcontrast.data.writer import Sample

FONTS = (*characters.TRAIN_FONTS, characters.HELD_OUT_FONT, characters.HELD_OUT_FAMILY)
PLAIN_LETTERS = [f"{script} {case} letter" for script in ("Latin", "Greek", "Cyrillic") for case in ("capital", "small")]


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(characters.FONT_FOLDER / f"{name}.ttf", size, layout_engine=ImageFont.Layout.BASIC)


def draw(character: str, font_name: str, size: int, side: int) -> Image.Image:
    """Draw a character black on white, on a common baseline, so that a small letter stays smaller than its capital."""
    image = Image.new("L", (side, side), 255)
    ImageDraw.Draw(image).text((side / 2, side * 0.74), character, fill=0, font=font(font_name, size), anchor="ms")
    return image


class Glyphs:
    """A source with one sample for each character and font file. `side`: of the pictures, in pixels; `seed`: of the shards'
    order; `plain_letters`: only Latin, Greek and Cyrillic letters whose names have no "with"."""

    def __init__(self, side: int = 48, seed: int = 0, plain_letters: bool = False) -> None:
        self.side, self.seed, self.plain_letters = side, seed, plain_letters

    def splits(self) -> dict[str, Sequence[tuple[characters.Character, str]]]:
        rng = np.random.default_rng(self.seed)
        kept = {split: [pair for pair in pairs if self._is_kept(pair[0])] for split, pairs in characters.splits().items()}
        return {split: [pairs[k] for k in rng.permutation(len(pairs))] for split, pairs in kept.items()}

    def _is_kept(self, character: characters.Character) -> bool:
        plain = character.kind in PLAIN_LETTERS and character.code < 0x530 and " with " not in character.name
        return plain or not self.plain_letters

    def sample_id(self, item: tuple[characters.Character, str]) -> int:
        """Return a unique and stable id."""
        return item[0].code << 8 | FONTS.index(item[1])

    def make_sample(self, split: str, item: tuple[characters.Character, str]) -> Sample:
        character, name = item
        sample_id = self.sample_id(item)
        rng = np.random.default_rng(sample_id)
        voices = speech.TRAIN_VOICES if split in ("train", "val_unseen") else speech.HELD_OUT_VOICES
        picture, sound = io.BytesIO(), io.BytesIO()
        size = int(rng.integers(round(self.side * 0.62), round(self.side * 0.7) + 1))
        draw(chr(character.code), name, size, self.side).save(picture, "PNG")
        spoken = speech.speaker().say(character.name, str(rng.choice(voices)), int(rng.integers(200, 281)))
        soundfile.write(sound, spoken, speech.SAMPLE_RATE, format="FLAC")
        metadata = {"sample_id": sample_id, "group_id": character.code, "character": chr(character.code), "font": name}
        labels = {"name": character.name, "script": character.script, "category": character.category}
        text = character.caption(rng, specific=split != "train")
        key = f"{split}-{character.code:05x}-{name}"
        return {"__key__": key, "png": picture.getvalue(), "flac": sound.getvalue(), "txt": text, "json": metadata | labels}
