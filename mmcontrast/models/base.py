"""The base class of towers: networks that map a modality's prepared batch to one feature vector per sample."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.modalities.text import TextIds

BLOCK = re.compile(r".*?(stages\.\d+\.(blocks|layers)\.\d+|layer\d+\.\d+|(stages|blocks|layers|layer|resblocks|h)\.\d+)\.")


@dataclass(frozen=True)
class Origin:
    """The source of a model: all that writing it back into its library takes.

    Attributes:
        library: "open_clip", "transformers", "timm"; or "mmcontrast", composed of the fields and towers of a config.
        name, pretrained, pooling: the arguments by which it was opened.
        config: what its library builds it from: open_clip's `model_cfg` and `preprocess_cfg`; for a composed model `fields`,
            `towers` and `model`.
        rest: tensors of the library's model that no tower has, by their names there: CoCa's decoder, CLAP's second scale.
        starts: for a composed model with starts, the origin of each tower of a start, by the tower's name.
    """

    library: str
    name: str = ""
    pretrained: str | None = None
    pooling: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    starts: Mapping[str, "Origin"] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self  # it never changes


class Tower(nn.Module):
    """The base of towers, which set `width` and map a batch of N inputs to features [N, width]; the model adds a projection.

    Texts come as token ids int64 [N, longest], with `PADDING` (−1) after the end of shorter ones: no token's id marks the end
    of a text, since tokenizers use any id for padding, also one that occurs in texts.

    Attributes:
        width: the number of features.
        network: the wrapped network, as its library made it.
        context_length, vocab_size: of a text tower: the most ids of a text, and the number of ids that it knows; None: any.
        texts: the tokenizer of its texts, once it is known.
    """

    width: int
    network: Any
    context_length: int | None = None
    vocab_size: int | None = None
    texts: TextIds | None = None

    def forward(self, batch: Tensor) -> Tensor:
        return self.network(batch)

    def blocks(self) -> dict[str, nn.Module]:
        """Return the repeated blocks by their names in the tower: transformer layers, residual blocks. They are recomputed,
        compiled and sharded one by one, their learning rates decay by depth, and LoRA adapts them.

        The default finds the innermost numbered modules under names that timm, transformers and open_clip use; a tower whose
        blocks have other names overrides it.
        """
        blocks = {name: module for name, module in self.named_modules() if BLOCK.fullmatch(f"{name}.")}
        return {name: block for name, block in blocks.items() if not any(inner.startswith(f"{name}.") for inner in blocks)}

    def read(self, texts: TextIds) -> None:
        """Check that the tower can read the texts of a tokenizer, and remember it.

        Raises:
            UserError: if it cannot.
        """
        if self.texts is not None and texts.tokenizer != self.texts.tokenizer:
            raise UserError(f"its tokenizer is {texts.tokenizer}, that of another field of its tower {self.texts.tokenizer}")
        if self.context_length is not None and texts.context_length > self.context_length:
            raise UserError(
                f"context_length={texts.context_length} for a tower that takes texts of {self.context_length} tokens: set the"
                f" modality's context_length to {self.context_length}"
            )
        if self.vocab_size is not None and texts.size > self.vocab_size:
            raise UserError(
                f"tokenizer {texts.tokenizer} has ids up to {texts.size - 1}, for a tower of vocab_size={self.vocab_size}: give"
                f" the tower vocab_size: {texts.size}, or take the tokenizer that belongs to it"
            )
        self.texts = texts
