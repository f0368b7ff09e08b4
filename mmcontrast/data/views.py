"""Reads a sample for a teacher, beside the model: the same members by modalities of its own, or stored embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError, Modality, TextModality
from mmcontrast.modalities.vector import read_numbers


class StoredEmbeddings(Modality):
    """A teacher's embeddings of one sample, an array [E], or [A, E] of A augmentations or captions of it, one of which is
    drawn. They are made unit rows.

    Attributes:
        width: E, that of the first array that was read.
    """

    extensions = ("npy",)
    width: int | None = None

    def decode(self, data: bytes) -> Tensor:
        rows = read_numbers(data)
        rows = rows.unsqueeze(0) if rows.dim() == 1 else rows
        if rows.dim() != 2 or not rows.numel():
            raise DecodeError(f"an array of shape {tuple(rows.shape)}: a teacher's embeddings are [E] or [A, E]")
        self.width = self.width or rows.shape[1]
        if rows.shape[1] != self.width:
            raise DecodeError(f"embeddings of {rows.shape[1]} numbers, where the first sample has {self.width}")
        if not rows.any(1).all():
            raise DecodeError("an embedding of zeros, which has no direction")
        return F.normalize(rows, dim=1)

    def transform(self, raw: Tensor, training: bool) -> Tensor:
        return raw[int(torch.randint(len(raw), ())) if training and len(raw) > 1 else 0]

    def blank(self) -> Tensor:
        assert self.width, "known since the data set was opened"
        return torch.zeros(self.width)


@dataclass(frozen=True)
class TeacherView:
    """The way a teacher reads the fields of a sample.

    Attributes:
        modalities: per field of the model that the teacher has.
        keys: the members of fields whose embeddings are stored; any other field is read from the model's own member.
    """

    modalities: Mapping[str, Modality]
    keys: Mapping[str, str] = field(default_factory=dict)

    def check_widths(self) -> None:
        """Check that all stored embeddings have one width.

        Raises:
            UserError: if they do not.
        """
        stored = {name: modality for name, modality in self.modalities.items() if isinstance(modality, StoredEmbeddings)}
        widths = {name: modality.width for name, modality in stored.items() if modality.width}
        if len(set(widths.values())) > 1:
            shown = ", ".join(f".{self.keys[name]} has {width} numbers" for name, width in widths.items())
            raise UserError(f"train.teacher: {shown}: what one teacher makes of all fields is of one width")

    def read(self, field: str, model_modality: Modality, raw: Any, data: bytes | None, rng_state: Tensor) -> Tensor:
        """Return a field as the teacher reads it, without augmentation: of a text of several lines the line that the model has,
        and so the stored embedding, if there is one for each line. torch's generator is left as it was.

        Args:
            model_modality, raw: the model's modality, and what it has decoded.
            data: the member that the teacher reads.
            rng_state: the generator's state when the model's modality began to draw.

        Raises:
            DecodeError: if the teacher cannot read it.
        """
        modality = self.modalities[field]
        if data is None:
            raise DecodeError("is missing, and train.teacher reads it")
        state_after = torch.get_rng_state()
        torch.set_rng_state(rng_state)
        try:
            if isinstance(modality, StoredEmbeddings):
                rows = modality.decode(data)
                captions: int | str = "whole"
                lines = 1
                if isinstance(model_modality, TextModality) and model_modality.captions != "whole":
                    captions, lines = model_modality.captions, len(model_modality.lines(raw))
                if len(rows) > 1 and lines not in (1, len(rows)):
                    raise DecodeError(f"{len(rows)} embeddings of a text of {lines} lines: store one for each, or one")
                if lines > 1 and len(rows) > 1 and isinstance(captions, int):
                    return rows[captions]
                return modality.transform(rows, True)
            if isinstance(modality, TextModality) and isinstance(model_modality, TextModality):
                text = model_modality.shown(raw, True)
                assert text is not None, "the model has read it"
                return modality.tokens(text)
            value = modality.transform(modality.decode(data), False)
        finally:
            torch.set_rng_state(state_after)
        if value is None:
            raise DecodeError("holds nothing that the teacher reads")
        return value
