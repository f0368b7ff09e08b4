"""Text in UTF-8, tokenized by open_clip's byte-pair encoding or by a Hugging Face tokenizer."""

import copy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mmcontrast.libraries import part_of_open_clip, refused, tell
from mmcontrast.modalities.base import DecodeError, Modality
from mmcontrast.text_files import lines_of

OPEN_CLIP = "open_clip"
PADDING = -1  # after the end of a text in a batch of token ids: no token has this id


@dataclass(frozen=True)
class TextIds:
    """The properties of a tokenizer that a tower must know.

    Attributes:
        tokenizer: its name.
        context_length: the most ids of a text.
        size: all ids are below it.
        example: the ids of a short text.
        pad_id: the id of padding, None if the tokenizer has none; with `pads_left` it comes before the text.
    """

    tokenizer: str
    context_length: int
    size: int
    example: tuple[int, ...]
    pad_id: int | None = None
    pads_left: bool = False


@cache
def open_clip_tokenizer() -> Any:
    """Return open_clip's byte-pair encoding, read once per process, as that takes a fifth of a second."""
    return part_of_open_clip("tokenizer").SimpleTokenizer()


class TextModality(Modality):
    """Texts as token ids, int64 [length]; in a batch −1 follows the end of shorter texts, since a tokenizer's padding id may
    occur in texts.

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
        if context_length < 1:
            raise ValueError(f"context_length is {context_length}, it must be 1 or more")
        self.name, self.context_length, self.max_bytes, self.captions = tokenizer, context_length, max_bytes, captions
        self.pad_id, self.pads_left = 0, False
        if tokenizer != OPEN_CLIP:
            try:
                self.pad_id, self.pads_left = self.tokenizer.pad_token_id, self.tokenizer.padding_side == "left"
            except refused() as error:
                raise ValueError(f"tokenizer {tokenizer!r}: {' '.join(str(error).split())[:300]}") from error

    def __getstate__(self) -> dict[str, Any]:  # a worker process makes its own tokenizer
        return {key: value for key, value in self.__dict__.items() if key != "tokenizer"}

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer, opened at first use."""
        if self.name == OPEN_CLIP:
            return open_clip_tokenizer()
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)

    def decode(self, data: bytes) -> str:
        if len(data) > self.max_bytes:
            raise DecodeError(f"{len(data)} bytes of text, more than max_bytes={self.max_bytes}")
        try:
            text = data.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DecodeError(f"not UTF-8 ({error})") from error
        if "\0" in text:
            raise DecodeError("a text with NUL, as of UTF-16: save it as UTF-8")
        if not text:
            raise DecodeError("an empty text")
        return text

    def transform(self, raw: str, training: bool) -> Tensor | None:
        text = self.shown(raw, training)
        return None if text is None else self.tokens(text)

    def shown(self, raw: str, training: bool) -> str | None:
        """Return the part of a text that is read: all of it, or one of its lines; None: it has no such line."""
        if self.captions == "whole":
            worker = get_worker_info()
            if "\n" in raw and (worker is None or worker.id == 0):
                tell("a text has several lines, which are read as one text: if each is a caption, set captions: lines")
            return raw
        lines = self.lines(raw)
        drawn = int(torch.randint(len(lines), ())) if training and self.captions == "lines" else 0
        number = drawn if isinstance(self.captions, str) else self.captions
        return lines[number] if number < len(lines) else None

    @staticmethod
    def lines(raw: str) -> list[str]:
        """Return the lines of a text that are not empty."""
        return [line.strip() for line in lines_of(raw) if line.strip()]

    def by_lines(self) -> "TextModality":
        """Return a copy that reads each line as a caption."""
        other = copy.copy(self)
        other.captions = "lines"
        return other

    def tokens(self, raw: str) -> Tensor:
        """Return the token ids of one text, int64 [length]."""
        return torch.tensor(self.ids(raw), dtype=torch.int64)

    def ids(self, raw: str) -> list[int]:
        """Return the token ids of one text as the tokenizer does, cut to `context_length` with its end token kept.

        Raises:
            DecodeError: for a text without tokens.
        """
        if self.name == OPEN_CLIP:
            ids = [self.tokenizer.sot_token_id, *self.tokenizer.encode(raw), self.tokenizer.eot_token_id]
            return [*ids[:-1][: self.context_length - 1], ids[-1]]
        ids = self.tokenizer(raw, truncation=True, max_length=self.context_length)["input_ids"]
        if not ids:
            raise DecodeError("a text without tokens")
        return ids

    @property
    def text_ids(self) -> TextIds:
        """Return the properties of the tokenizer that a tower must know."""
        example = tuple(self.ids("blank"))
        if self.name == OPEN_CLIP:
            size = self.tokenizer.vocab_size
        else:  # without special tokens that no text has, such as a padding that was added to the vocabulary
            added = set(self.tokenizer.all_special_ids) - set(example)
            size = max(number for number in self.tokenizer.get_vocab().values() if number not in added) + 1
        return TextIds(self.name, self.context_length, size, example, self.pad_id, self.pads_left)

    def blank(self) -> Tensor:
        return self.tokens("blank")

    def collate(self, samples: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=PADDING)
