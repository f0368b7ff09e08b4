"""Makes pictures, names in ten languages and speech of emoji: `mmcontrast data build data_pipelines/emoji/emoji.yaml`."""

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.glyphs import speech
from mmcontrast.data.writer import Sample
from mmcontrast.errors import UserError

SIZE, BOX = 109, 160  # the one size of a colour font's pictures, and the square that one is drawn in
LANGUAGES = ("en", "fr", "de", "es", "ru", "tr", "sw", "hi", "ar", "zh")
VOICES = {"en": "en-us", "zh": "cmn"}  # espeak-ng's names, where they are not the language's
TRAIN_SPEAKERS, HELD_OUT_SPEAKERS = ("m1", "m3", "m4", "m7", "f1", "f2", "f4"), ("m2", "f3")
HELD_OUT = 5  # one emoji in five is never trained on
open_font = cache(ImageFont.truetype)


class Emoji:
    """A source with one sample for each emoji that has a name in every language.

    `font`: a .ttf; `annotations`: the folder of CLDR's, with one for each of `languages`; `side`: of the pictures, in pixels;
    `seed`: of the order, the voices, and where an emoji is drawn. `val_voices` holds the emoji of `train`, drawn in other
    places, in voices that were not trained on.
    """

    def __init__(
        self, font: str, annotations: str, languages: Sequence[str] = LANGUAGES, side: int = 64, seed: int = 0
    ) -> None:
        self.font, self.annotations, self.languages, self.side, self.seed = font, annotations, tuple(languages), side, seed

    def splits(self) -> dict[str, Sequence[str]]:
        shuffled = np.random.default_rng(self.seed).permutation(sorted(names(self.font, self.annotations, self.languages)))
        train, val = (
            [emoji for emoji in shuffled.tolist() if (ord(emoji) % HELD_OUT == 0) == held_out] for held_out in (False, True)
        )
        return {"train": train, "val": val, "val_voices": train}

    def make_sample(self, split: str, emoji: str) -> Sample:
        rng = np.random.default_rng([self.seed, ord(emoji), len(split)])
        name_of = names(self.font, self.annotations, self.languages)[emoji]
        sample: Sample = {"__key__": f"{split}-{ord(emoji):05x}", "png": draw(emoji, self.font, self.side, rng)}
        sample["json"] = {"sample_id": ord(emoji), "group_id": ord(emoji), "emoji": emoji, "name": name_of[self.languages[0]]}
        for language, name in name_of.items():
            sample |= {f"{language}.txt": name, f"{language}.flac": say(name, language, split == "val_voices", rng)}
        return sample


@cache
def names(font: str, annotations: str, languages: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return by language the names of each emoji of one character that the font has and every language names."""
    files = {language: Path(annotations) / language / "annotations.json" for language in languages}
    if missing := [str(file) for file in (Path(font), *files.values()) if not file.is_file()]:
        raise UserError(f"no file {missing[0]}: README.md of data_pipelines/emoji says how to get it")
    entries = {language: json.loads(file.read_text("utf-8"))["annotations"]["annotations"] for language, file in files.items()}
    everywhere = {chr(code) for code in TTFont(font, lazy=True).getBestCmap()}
    for of_language in entries.values():
        everywhere &= {emoji for emoji, entry in of_language.items() if entry.get("tts")}
    single = [emoji for emoji in sorted(everywhere) if len(emoji) == 1]
    return {emoji: {language: entries[language][emoji]["tts"][0] for language in languages} for emoji in single}


def draw(emoji: str, font: str, side: int, rng: np.random.Generator) -> bytes:
    """Return a PNG on white, at a random place and size."""
    image, out = Image.new("RGB", (BOX, BOX), "white"), io.BytesIO()
    centre = rng.uniform(0.42, 0.58, 2) * BOX
    ImageDraw.Draw(image).text(tuple(centre), emoji, fill="black", font=open_font(font, SIZE), anchor="mm", embedded_color=True)
    image.crop((*([rng.integers(0, 12)] * 2), *([BOX - rng.integers(0, 12)] * 2))).resize((side, side)).save(out, "PNG")
    return out.getvalue()


def say(name: str, language: str, held_out: bool, rng: np.random.Generator) -> bytes:
    """Return a FLAC of a name, spoken by a random speaker."""
    voice = f"{VOICES.get(language, language)}+{rng.choice(HELD_OUT_SPEAKERS if held_out else TRAIN_SPEAKERS)}"
    out = io.BytesIO()
    soundfile.write(out, speech.speaker().say(name, voice, int(rng.integers(160, 221))), speech.SAMPLE_RATE, format="FLAC")
    return out.getvalue()
