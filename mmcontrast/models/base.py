"""What a tower is: a network that turns one modality's prepared batch into one feature vector a sample."""

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
    """Where a model came from: what writing it back into its library takes.

    Attributes:
        library: "open_clip", "transformers", "timm"; or "mmcontrast", composed of the fields and towers of a config.
        name, pretrained, pooling: by which it was opened.
        config: what its library makes it of: open_clip's `model_cfg` and `preprocess_cfg`; of a composed model `fields`,
            `towers` and `model`.
        rest: tensors of the library's model that no tower has, by their names there: CoCa's decoder, CLAP's second scale.
        starts: of a composed model that began with others, where each tower of theirs came from, by the tower's name.
    """

    library: str
    name: str = ""
    pretrained: str | None = None
    pooling: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    starts: Mapping[str, "Origin"] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self  # nothing of it changes


class Tower(nn.Module):
    """Adapters set `width` and map a batch of N inputs to features [N, width]; a projection head follows in the model.

    Texts come as token ids int64 [N, longest], with `PADDING` (−1) after the end of those that are shorter: no token's id says
    where a text ends, since tokenizers use any id for padding, also one that occurs in texts.

    Attributes:
        width: the number of features.
        network: the wrapped network, as its library made it.
        context_length, vocab_size: of a text's tower: how many ids it takes, and from 0 to below which; None: any.
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
        """Return the repeated parts by their names in the tower: transformer layers, residual blocks. They are recomputed,
        compiled and sharded one by one, their rates decay by depth, and LoRA adapts them.

        The default finds the innermost numbered modules under names that timm, transformers and open_clip use; a tower whose
        parts have other names overrides it.
        """
        named = {name: module for name, module in self.named_modules() if BLOCK.fullmatch(f"{name}.")}
        return {name: block for name, block in named.items() if not any(other.startswith(f"{name}.") for other in named)}

    def read(self, texts: TextIds) -> None:
        """Prepare the tower for texts of a tokenizer.

        Raises:
            UserError: if it cannot read them.
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
