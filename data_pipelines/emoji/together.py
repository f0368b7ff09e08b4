"""Makes a task for three fields together, of emoji: `mmcontrast data build data_pipelines/emoji/together.yaml`."""

from collections.abc import Sequence

import numpy as np

from data_pipelines.emoji.emoji import draw, names, say
from mmcontrast.data.writer import Sample


class Together:
    """A source of samples whose picture follows from text and speech together alone (as in Symile's M3, arXiv:2411.01053).

    The text has the names of several emoji, one in each of `languages`; spoken is the name of yet another emoji, in one of
    them; the picture is of the emoji that the text names in that language. So speech and picture are independent, and the text
    leaves as many pictures as there are languages: pairs of fields find one in so many at best.

    `emoji`: how many there are; `train`, `val`: samples, drawn with `seed`; the voices of `val` are others. `font`,
    `annotations`, `side` as of `Emoji`.
    """

    def __init__(
        self, font: str, annotations: str, languages: Sequence[str] = ("en", "ru", "zh"), emoji: int = 50,
        train: int = 20_000, val: int = 2_000, side: int = 48, seed: int = 0,
    ) -> None:  # fmt: skip
        self.font, self.annotations, self.languages, self.emoji = font, annotations, tuple(languages), emoji
        self.numbers, self.side, self.seed = {"train": train, "val": val}, side, seed

    def splits(self) -> dict[str, Sequence[int]]:
        return {"train": range(self.numbers["train"]), "val": range(self.numbers["train"], sum(self.numbers.values()))}

    def make_sample(self, split: str, number: int) -> Sample:
        name_of = names(self.font, self.annotations, self.languages)
        chosen = sorted(name_of)[:: max(1, len(name_of) // self.emoji)][: self.emoji]
        rng = np.random.default_rng([self.seed, number])
        *named, spoken_emoji = rng.choice(chosen, len(self.languages) + 1, replace=False).tolist()
        place = int(rng.integers(len(self.languages)))
        pictured, language = named[place], self.languages[place]
        texts = [name_of[emoji][text_language] for emoji, text_language in zip(named, self.languages, strict=True)]
        text = ", ".join(texts[k] for k in rng.permutation(len(texts)))
        metadata = {"sample_id": number, "group_id": number, "shown": pictured, "language": language, "heard": spoken_emoji}
        return {
            "__key__": f"{split}-{number:06d}",
            "png": draw(pictured, self.font, self.side, rng),
            "flac": say(name_of[spoken_emoji][language], language, split == "val", rng),
            "txt": text,
            "json": metadata,
        }
