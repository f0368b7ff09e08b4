"""open_clip's models as towers: one half of a named dual encoder, or its text transformer at a size of one's own."""

from typing import Any, Literal

import open_clip
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor

from mmcontrast.components import nearest
from mmcontrast.errors import UserError
from mmcontrast.library_messages import library_messages
from mmcontrast.towers.base import Tower
from mmcontrast.trust import library_code_refused


class OpenClipTower(Tower):
    """The image or the text half of an open_clip model, up to and with its projection.

    Args:
        model: an architecture's name, like "ViT-B-32".
        part: which half.
        pretrained: a tag of open_clip's or a local checkpoint; none: random weights.
        **options: anything that `open_clip.create_model` takes.
    """

    def __init__(self, model: str, part: Literal["image", "text"], pretrained: str | None = None, **options: Any) -> None:
        super().__init__()
        if ":" not in model and model not in open_clip.list_models():
            raise UserError(f"open_clip has no model {model!r}; {nearest(model, open_clip.list_models())[:200]}")
        if part not in ("image", "text"):
            raise UserError(f"open_clip tower: part must be 'image' or 'text', not {part!r}")
        with library_messages(f"open_clip tower {model}"), library_code_refused(model):
            whole = open_clip.create_model(model, pretrained=pretrained, force_custom_text=True, **options)
        self.network = whole.visual if part == "image" else whole.text
        self.context_length = getattr(self.network, "context_length", None) if part == "text" else None
        self.pad_id: int | None = None  # of the texts; set with the modality
        size = open_clip.get_model_config(model)
        self.width = getattr(self.network, "output_dim", None) or size["embed_dim"]

    def forward(self, batch: Tensor) -> Tensor:
        return self.network(batch if self.context_length is None else _pad(batch, self.context_length, self.pad_id))


class OpenClipTextTower(Tower):
    """open_clip's text transformer from scratch, at the size of `options`: width, heads, layers, context_length, …"""

    def __init__(self, width: int, layers: int, heads: int, context_length: int = 77, **options: Any) -> None:
        super().__init__()
        self.network = TextTransformer(
            context_length=context_length, width=width, layers=layers, heads=heads, output_dim=None, **options
        )
        self.context_length, self.width = context_length, width
        self.pad_id: int | None = None

    def forward(self, batch: Tensor) -> Tensor:
        return self.network(_pad(batch, self.context_length, self.pad_id))


def _pad(tokens: Tensor, length: int, pad_id: int | None) -> Tensor:
    """Tokens [N, ≤ length] to [N, length]: its attention mask has one size, and SigLIP's features are of the last one."""
    if tokens.shape[1] > length:
        raise UserError(
            f"texts of {tokens.shape[1]} tokens for a tower of context_length={length}: set the text"
            f" modality's context_length to {length}"
        )
    return F.pad(tokens, (0, length - tokens.shape[1]), value=pad_id or 0)
