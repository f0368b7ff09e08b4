"""Chooses the characters of the corpus, their names and their font files: Unicode's names are the captions."""

import unicodedata
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from fontTools.ttLib import TTFont
from fontTools.unicodedata import script as unicode_script

FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
)
HELD_OUT_FONT = "DejaVuSerif-Bold"  # of a family that is trained on
HELD_OUT_FAMILY = "STIXGeneral"
SYMBOLS = range(0x2600, 0x2700)  # chess pieces, the zodiac, weather, …: what DejaVu Sans and Sans Mono draw of them
SYMBOLS_FONT = "DejaVuSansMono-Bold"  # held out for these alone

COMMON = "Common"  # as Unicode calls the script of symbols, digits and punctuation that all scripts share
SCRIPTS = {"Latn": "Latin", "Grek": "Greek", "Cyrl": "Cyrillic", "Armn": "Armenian", "Geor": "Georgian", "Zyyy": COMMON}
CATEGORIES = {
    "Lu": "capital letter",
    "Ll": "small letter",
    "Lt": "titlecase letter",
    "Lo": "letter",
    "Nd": "digit",
    "Nl": "number letter",
    "No": "number",
    **dict.fromkeys(("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"), "punctuation mark"),
    "Sm": "mathematical symbol",
    "Sc": "currency symbol",
    "So": "pictorial symbol",
}
SPECIFIC = ("{name}", "{name}", "a picture of {name}", "the character {name}", "{name}, a {kind}", "{kind}: {name}")
GENERIC = ("a {kind}", "{kind}", "a picture of a {kind}")  # some people write no more


@dataclass(frozen=True)
class Character:
    """One character: its name in lower case, its Unicode script, and its Unicode category in words."""

    code: int

    @property
    def name(self) -> str:
        return unicodedata.name(chr(self.code)).lower()

    @property
    def script(self) -> str:
        return SCRIPTS[unicode_script(chr(self.code))]

    @property
    def category(self) -> str:
        return CATEGORIES[unicodedata.category(chr(self.code))]

    @property
    def unseen(self) -> bool:
        """Return whether the character is never trained on: one in ten, chosen by a checksum."""
        return zlib.crc32(str(self.code).encode()) % 10 == 0

    @property
    def kind(self) -> str:
        """Return "Greek small letter", or "mathematical symbol" for a character of no script."""
        return self.category if self.script == COMMON else f"{self.script} {self.category}"

    def caption(self, rng: np.random.Generator, specific: bool) -> str:
        """Return a caption of one of a few natural templates; one in ten names only the character's kind, unless `specific`."""
        templates = SPECIFIC if specific or rng.random() < 0.9 else GENERIC
        return templates[rng.integers(len(templates))].format(name=self.name, kind=self.kind)


@cache
def characters_of(font: str) -> frozenset[int]:
    """Return the code points that a font file draws: letters of the scripts, numbers, punctuation and symbols. No modifiers,
    which are other letters made small, and no braille, whose dots are a code more than a shape."""
    codes = TTFont(FONT_FOLDER / f"{font}.ttf").getBestCmap()
    return frozenset(
        code
        for code in codes
        if unicodedata.category(chr(code)) in CATEGORIES
        and unicode_script(chr(code)) in SCRIPTS
        and unicodedata.name(chr(code), "")
    )


def splits() -> dict[str, list[tuple[Character, str]]]:
    """Return (character, font file) of every sample of every split: one picture each."""
    symbols = characters_of("DejaVuSansMono") & characters_of("DejaVuSans") & frozenset(SYMBOLS) - characters_of("DejaVuSerif")
    trained = sorted(characters_of("DejaVuSerif") & characters_of("DejaVuSans") | symbols)
    seen = [Character(code) for code in trained if not Character(code).unseen]
    unseen = [Character(code) for code in trained if Character(code).unseen]
    return {
        "train": [
            (c, font)
            for font in TRAIN_FONTS
            for c in seen
            if c.code in characters_of(font) and not (c.code in symbols and font == SYMBOLS_FONT)
        ],
        "val": [(c, HELD_OUT_FONT) for c in seen if c.code in characters_of(HELD_OUT_FONT)],
        "val_family": [(c, HELD_OUT_FAMILY) for c in seen if c.code in characters_of(HELD_OUT_FAMILY)],
        "val_symbols": [(c, SYMBOLS_FONT) for c in seen if c.code in symbols],
        "val_unseen": [(c, "DejaVuSans") for c in unseen],
    }
