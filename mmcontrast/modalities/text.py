"""Text: UTF-8, tokenized by open_clip's byte-pair encoding or by a Hugging Face tokenizer."""

import copy
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mmcontrast.modalities.base import DecodeError, Modality

OPEN_CLIP = "open_clip"


class TextModality(Modality):
    """int64 [length] token ids; a batch is padded to its longest text.

    Args:
        tokenizer: "open_clip" (its byte-pair encoding, shipped in its wheel), or a Hugging Face name or folder.
        context_length: longer texts are cut to this many tokens.
        max_bytes: longer members are refused.
        captions: "whole"; "lines": every line is a caption of its own, of which training draws one and evaluation reads the
            first; or a number: that line alone, from 0 on, and a sample with fewer lacks the field. Fields with the numbers 0,
            1, 2 … that share a tower show all captions of a sample in one batch.
    """

    of_source = frozenset({"context_length", "max_bytes", "captions"})
    extensions = ("txt", "caption", "text")

    def __init__(
        self,
        tokenizer: str = OPEN_CLIP,
        context_length: int = 77,
        max_bytes: int = 1_000_000,
        captions: Literal["whole", "lines"] | int = "whole",
    ) -> None:
        super().__init__()
        if captions not in ("whole", "lines") and not (isinstance(captions, int) and captions >= 0):
            raise ValueError(f'captions is {captions!r}, it must be "whole", "lines", or the number of a line')
        self.name, self.context_length, self.max_bytes, self.captions = tokenizer, context_length, max_bytes, captions
        try:
            self.pad_id = 0 if tokenizer == OPEN_CLIP else (self.tokenizer.pad_token_id or 0)
        except OSError as error:
            raise ValueError(f"tokenizer {tokenizer!r}: {' '.join(str(error).split())[:300]}") from error

    def __getstate__(self) -> dict[str, Any]:  # a worker process makes its own tokenizer
        return {key: value for key, value in self.__dict__.items() if key != "tokenizer"}

    @cached_property
    def tokenizer(self) -> Any:
        if self.name == OPEN_CLIP:
            from open_clip.tokenizer import SimpleTokenizer

            return SimpleTokenizer(context_length=self.context_length)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)

    def decode(self, data: bytes) -> str:
        if len(data) > self.max_bytes:
            raise DecodeError(f"{len(data)} bytes of text, more than max_bytes={self.max_bytes}")
        try:
            text = data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DecodeError(f"not UTF-8 ({error})") from error
        if not text:
            raise DecodeError("an empty text")
        return text

    def transform(self, raw: str, training: bool) -> Tensor | None:
        if self.captions != "whole":
            lines = self.lines(raw)
            drawn = int(torch.randint(len(lines), ())) if training and self.captions == "lines" else 0
            number = drawn if isinstance(self.captions, str) else self.captions
            if number >= len(lines):
                return None
            raw = lines[number]
        return self.tokens(raw)

    @staticmethod
    def lines(raw: str) -> list[str]:
        """Those that are not empty: captions, where there are several."""
        return [line.strip() for line in raw.splitlines() if line.strip()]

    def by_lines(self) -> "TextModality":
        """The same, of texts whose lines are captions."""
        other = copy.copy(self)
        other.captions = "lines"
        return other

    def tokens(self, raw: str) -> Tensor:
        """int64 [length] of one text."""
        if self.name == OPEN_CLIP:
            tokens = self.tokenizer(raw)[0]
            return tokens[: int(tokens.count_nonzero())]
        ids = self.tokenizer(raw, truncation=True, max_length=self.context_length)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def blank(self) -> Tensor:
        return self.tokens("blank")

    def collate(self, samples: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=self.pad_id)
