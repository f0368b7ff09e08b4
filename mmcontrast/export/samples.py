"""Samples to compare an export on: the user's, or a few generated ones."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mmcontrast.data import Shards
from mmcontrast.data.decoding import UNREADABLE
from mmcontrast.data.keys import chosen
from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.export.parts import kind_of
from mmcontrast.modalities import AudioModality, TextModality, VectorModality
from mmcontrast.modalities.library import LibraryAudio
from mmcontrast.models import ContrastiveModel

SIZES = ((67, 45), (31, 50), (40, 41), (96, 96), (640, 427), (120, 200))  # of generated pictures
TEXTS = (
    "a photo of a cat",
    "two dogs, one of them asleep, on a red sofa in front of a window through which the sea can be seen",
    "Noise.",
    "a chess board seen from above: 32 pieces (16 white, 16 black), & a clock",
    "ein Haus am See",
    "нарисованный кот",
    "一只坐在树上的黑鸟",
    "the quick brown fox jumps over the lazy dog, again and again and again, until all of the words that a model of texts may"
    " take have been used, and then some more of them, so that the end of this sentence, which nobody will read, is cut off at"
    " the place where the tokenizer cuts what is longer than the context, wherever that may be, in this model or in another",
)


@dataclass(frozen=True)
class Samples:
    """Values of fields to embed.

    Attributes:
        values: by field: encoded bytes of pictures, sounds and vectors; texts.
        source: "generated", or the patterns of the user's data.
        notes: what was left out.
    """

    values: dict[str, list[Any]]
    source: Any
    notes: tuple[str, ...] = ()


def given_samples(embedder: Embedder, shards: Shards, number: int, fields: Sequence[str]) -> Samples:
    """Return samples of the user's data, evenly spread.

    Raises:
        UserError: for shards that lack one of the fields, or have no sample of it that can be decoded.
    """
    dataset = embedder.dataset(shards)
    values: dict[str, list[Any]] = {field: [] for field in fields}
    unreadable = 0
    if lacking := [field for field in fields if field not in dataset.keys]:
        raise UserError(f"--data {shards}: its samples have no {', '.join(lacking)}: leave fields out with --fields")
    for position in np.unique(np.linspace(0, len(dataset) - 1, number).astype(np.int64)).tolist():
        for field in fields:
            modality = dataset.modalities[field]
            members = dataset.members(position, dataset.keys[field])
            if not (key := chosen(dataset.choices[field], members, False)):
                continue
            try:
                raw = modality.decode(members[key])
                if modality.transform(raw, False) is None:
                    continue
            except UNREADABLE:
                unreadable += 1
                continue
            if isinstance(modality, TextModality) and modality.captions != "whole":
                raw = modality.lines(raw)[0 if isinstance(modality.captions, str) else modality.captions]
            values[field].append(raw if isinstance(modality, TextModality) else members[key])
    for field, field_values in values.items():
        if not field_values:
            raise UserError(f"--data {shards}: none of {number} samples has a {field} that can be decoded")
    return Samples(values, str(shards), (f"{unreadable} values could not be decoded",) if unreadable else ())


def made_samples(model: ContrastiveModel, fields: Sequence[str]) -> Samples:
    """Generate a few samples of each field, always the same.

    Raises:
        UserError: for a field of a kind that cannot be generated.
    """
    values: dict[str, list[Any]] = {}
    for field in fields:
        modality, random = model.modality(field), np.random.default_rng(0)
        if kind_of(model, field) == "image":
            values[field] = [_picture(random, *size) for size in SIZES]
        elif isinstance(modality, TextModality):
            values[field] = list(TEXTS)
        elif isinstance(modality, AudioModality):
            most = modality.length / modality.sample_rate
            if isinstance(modality, LibraryAudio):  # CLAP's extractor cuts longer ones at random
                extractor: Any = modality.extract
                most = getattr(extractor.args[0], "nb_max_samples", modality.length) / modality.sample_rate
            seconds = [share * min(most, 10.0) for share in (0.3, 0.8, 1.0)]
            values[field] = [_sound(random, length, modality.sample_rate) for length in seconds]
        elif isinstance(modality, VectorModality):
            values[field] = [_array(random.normal(size=modality.width)) for _ in range(4)]
        else:
            raise UserError(f"field {field!r}: no samples of its kind can be made: give some with --data")
    return Samples(values, "generated")


def _picture(random: np.random.Generator, width: int, height: int) -> bytes:
    coarse = random.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _sound(random: np.random.Generator, seconds: float, rate: int) -> bytes:
    time = np.arange(max(1, round(seconds * rate))) / rate
    tone = 0.2 * np.sin(2 * np.pi * random.uniform(100, 800) * time) + random.normal(0, 0.05, len(time))
    file = io.BytesIO()
    soundfile.write(file, np.clip(tone, -0.9, 0.9), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values.astype(np.float32))
    return file.getvalue()
