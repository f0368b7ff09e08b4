"""Pictures, sounds, texts and tokenizers of the tests, made at random."""

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "a queen",
    "a photo of a BLACK chess queen, on a board of  two colours",
    "Noise.",
    "three kings & a bishop (white), that were painted by hand in a small village near the sea",
]


def pictures(folder: Path) -> list[Path]:
    """Files of odd sizes: JPEG, grey, with transparency, with a palette, and narrow."""
    noise, folder = np.random.default_rng(np.random.randint(2**31)), folder / "pictures"  # noqa: NPY002 - seeded by the test
    folder.mkdir()

    def smooth(width: int, height: int, channels: int) -> Image.Image:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        coarse = noise.integers(0, 256, (height // 7 + 2, width // 7 + 2, channels), dtype=np.uint8)
        return Image.fromarray(coarse.squeeze(), mode).resize((width, height), Image.Resampling.BICUBIC)

    smooth(67, 45, 3).save(folder / "a.jpg")
    smooth(31, 50, 3).save(folder / "b.png")
    smooth(40, 41, 1).save(folder / "c.png")
    smooth(29, 64, 4).save(folder / "d.png")
    smooth(64, 33, 3).convert("P").save(folder / "e.png")
    smooth(120, 18, 1).save(folder / "f.jpg")
    return sorted(folder.iterdir())


def sounds(folder: Path, rate: int, seconds: tuple[float, ...]) -> list[Path]:
    """16-bit files of one channel."""
    noise, folder = np.random.default_rng(np.random.randint(2**31)), folder / "sounds"  # noqa: NPY002 - seeded by the test
    folder.mkdir()
    for number, length in enumerate(seconds):
        samples = noise.normal(0, 0.1, round(length * rate)).cumsum() * 0.02
        soundfile.write(folder / f"{number}.wav", np.clip(samples, -0.9, 0.9), rate, subtype="PCM_16")
    return sorted(folder.iterdir())


def tokenizer(first: str = "[CLS]", last: str = "[SEP]", **options) -> PreTrainedTokenizerFast:
    """Byte-pair encoding learnt of the texts, between two tokens; ids of [PAD], [CLS], [SEP] are 0, 1, 2."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, special_tokens=special))
    ids = [(token, special.index(token)) for token in (first, last)]
    made.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ids)
    roles = {"pad_token": "[PAD]", "cls_token": first, "sep_token": last, "unk_token": "[UNK]", "eos_token": last}
    return PreTrainedTokenizerFast(tokenizer_object=made, **(roles | options))
