"""Modalities of other libraries' models: our decoding under our limits, then the library's own preprocessing in the worker."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, TextModality


class LibraryImages(ImageModality):
    """What the library makes of a picture: float tensors, all of one shape.

    Args:
        prepare: a PIL image → a tensor.
        size: about the larger side of what `prepare` makes, for the limit on narrow pictures.
        mode: pictures are converted to it first; None: `prepare` does so itself.
        augmented: in training, in the place of `prepare`.
    """

    def __init__(
        self,
        prepare: Callable[[Image.Image], Tensor],
        size: int,
        mode: str | None = "RGB",
        augmented: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        super().__init__(size)
        self.prepare, self.augmented, self.mode = prepare, augmented or prepare, mode

    def _decode_jpeg(self, data: bytes) -> None:
        """Pillow decodes all: the library's transforms take its images."""

    def encode(self, value: Any) -> Image.Image:
        picture = self.picture(value)
        if self.mode:
            picture = picture.convert(self.mode)
        picture.load()
        return picture

    def transform(self, raw: Image.Image, training: bool) -> Tensor:
        return (self.augmented if training else self.prepare)(raw)

    def blank(self) -> Tensor:
        return self.prepare(Image.new(self.mode or "RGB", (self.size, self.size)))

    def forward(self, batch: Tensor) -> Tensor:
        return batch


class LibraryTexts(TextModality):
    """Token ids int64 [length] as the library's tokenizer gives them; what it masks is −1, and so are texts of a batch that end
    before its longest.

    Args:
        tokenize: a text → its ids.
        context_length: how many there may be.
    """

    def __init__(self, tokenize: Any, context_length: int) -> None:
        super().__init__(context_length=context_length)
        self.tokenize = tokenize

    def tokens(self, raw: str) -> Tensor:
        tokens = self.tokenize(raw)
        if not len(tokens):
            raise DecodeError("a text without tokens")
        return tokens


class LibraryAudio(AudioModality):
    """What the library's feature extractor makes of a sound: float tensors. Those of different lengths are padded by NaN.

    Args:
        extract: float32 [samples] in [-1, 1] at `sample_rate` → a tensor.
    """

    def __init__(self, extract: Callable[[np.ndarray], Tensor], sample_rate: int) -> None:
        super().__init__(sample_rate)
        self.extract = extract

    def transform(self, raw: Tensor, training: bool) -> Tensor:
        return self.extract(raw.numpy().astype(np.float32) / 32768)

    def blank(self) -> Tensor:
        return self.extract(np.zeros(self.sample_rate, dtype=np.float32))

    def collate(self, samples: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=torch.nan)

    def forward(self, batch: Tensor) -> Tensor:
        return batch
