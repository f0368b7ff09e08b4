"""Modalities of other libraries' models, which decode under our limits, and preprocess with the library in the worker."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, TextModality
from mmcontrast.modalities.audio import joined
from mmcontrast.modalities.image import without_palette_alpha


class LibraryImages(ImageModality):
    """Pictures preprocessed by their library: float tensors, all of one shape.

    Args:
        prepare: a PIL image → a tensor.
        size: about the larger side of the output of `prepare`, for the limit on narrow pictures.
        mode: pictures are converted to it first, without transparency; None: `prepare` converts them.
        augmented: replaces `prepare` in training.
        as_ours: options with which `ImageModality` does about the same; or why there are none.

    Attributes:
        fast: our own pipeline for training, if a config asks for it, else None.
        fast_in_evaluation: use `fast` in evaluation too.
    """

    fast: ImageModality | None
    fast_in_evaluation = False

    def __init__(
        self,
        prepare: Callable[[Image.Image], Tensor],
        size: int,
        mode: str | None = "RGB",
        augmented: Callable[[Image.Image], Tensor] | None = None,
        as_ours: Mapping[str, Any] | str = "how its library prepares pictures is not known",
    ) -> None:
        super().__init__(size, background="drop")
        self.as_ours, self.fast = as_ours, None
        self.prepare, self.augmented, self.first_mode = prepare, augmented or prepare, mode

    def _decode_jpeg(self, data: bytes) -> None:
        """Return None: Pillow decodes all pictures, as the library's transforms take its images."""

    def for_training(self) -> ImageModality:
        return self.fast or self

    @property
    def reader(self) -> ImageModality | None:
        """Return our own pipeline, if it is used in evaluation too."""
        return self.fast if self.fast_in_evaluation else None

    def decode(self, data: bytes) -> Any:
        return self.reader.decode(data) if self.reader else super().decode(data)

    def encode(self, value: Any) -> Any:
        if self.reader:
            return self.reader.encode(value)
        picture = self.picture(value)
        return without_palette_alpha(picture).convert(self.first_mode) if self.first_mode else picture

    def as_rgb(self) -> ImageModality:
        if self.reader:
            return self.reader.as_rgb()
        other = copy.copy(self)
        other.first_mode = self.first_mode or "RGB"
        return other

    def transform(self, raw: Any, training: bool) -> Tensor:
        if self.reader:
            return self.reader.transform(raw, training)
        return (self.augmented if training else self.prepare)(raw)

    def blank(self) -> Tensor:
        return self.reader.blank() if self.reader else self.prepare(Image.new(self.first_mode or "RGB", (self.size, self.size)))

    def forward(self, batch: Tensor) -> Tensor:
        if self.fast and batch.dtype == torch.uint8:
            batch = self.fast(batch)
        return self.at_side(batch)


class LibraryTexts(TextModality):
    """Token ids int64 [length] of the library's tokenizer; ids that it masks, and positions after the end of a text in a batch,
    are −1.

    Args:
        tokenize: a text → its ids.
        context_length: the most ids of a text.
    """

    def __init__(self, tokenize: Any, context_length: int) -> None:
        super().__init__(context_length=context_length)
        self.tokenize = tokenize

    def open(self) -> None:
        """Open the tokenizer, if that was deferred until texts are read."""

    def tokens(self, raw: str) -> Tensor:
        tokens = self.tokenize(raw)
        if not len(tokens):
            raise DecodeError("a text without tokens")
        return tokens


class LibraryAudio(AudioModality):
    """Sounds preprocessed by the library's feature extractor: float tensors, padded by NaN to the longest of a batch.

    Args:
        extract: decoded float32 [samples] at `sample_rate` → a tensor.
        shortest: the fewest samples that the network needs.
    """

    def __init__(self, extract: Callable[[np.ndarray], Tensor], sample_rate: int, shortest: int = 1) -> None:
        super().__init__(sample_rate)
        self.extract, self.shortest = extract, shortest

    def stored(self, parts: Iterable[np.ndarray]) -> Tensor:
        sound = joined(list(parts))
        if len(sound) < self.shortest:
            raise DecodeError(f"a sound of {len(sound)} samples at {self.sample_rate} Hz: this model needs {self.shortest}")
        return sound

    def transform(self, raw: Tensor, training: bool) -> Tensor:
        return self.extract(raw.numpy())

    def blank(self) -> Tensor:
        return self.extract(np.zeros(self.sample_rate, dtype=np.float32))

    def collate(self, samples: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=torch.nan)

    def forward(self, batch: Tensor) -> Tensor:
        return batch
