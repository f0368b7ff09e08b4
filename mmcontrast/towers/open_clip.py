"""open_clip's models as towers: one half of a named dual encoder, or its text transformer at a size of one's own."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcontrast.components import nearest
from mmcontrast.errors import UserError
from mmcontrast.library_messages import library_messages
from mmcontrast.towers.base import PADDING, TextIds, Tower, library_errors
from mmcontrast.towers.transformers import positions_of
from mmcontrast.trust import library_code_refused

PARTS = "open_clip_parts"  # a package of open_clip's files whose own first lines are not run


def part_of_open_clip(name: str) -> ModuleType:
    """Return a module of open_clip's without importing the whole, which imports transformers: "tokenizer", "transformer"."""
    if "open_clip" in sys.modules:
        return importlib.import_module(f"open_clip.{name}")
    if PARTS not in sys.modules:
        whole = importlib.util.find_spec("open_clip")
        assert whole
        package = ModuleSpec(PARTS, None, is_package=True)
        package.submodule_search_locations = whole.submodule_search_locations
        sys.modules[PARTS] = importlib.util.module_from_spec(package)
    return importlib.import_module(f"{PARTS}.{name}")


class OpenClipTextReader(Tower):
    """A tower around one of open_clip's text networks, which take texts as open_clip's tokenizers pad them."""

    masks = False  # a Hugging Face encoder, which is given no fixed length

    def _reads(self) -> None:
        """Takes over what the network says of its texts."""
        network, self.masks = self.network, type(self.network).__name__ == "HFTextEncoder"
        self.context_length = positions_of(network, network.config) if self.masks else network.context_length
        self.vocab_size = network.config.vocab_size if self.masks else network.vocab_size

    def read(self, texts: TextIds) -> None:
        if self.vocab_size is None:
            raise UserError("its tower is the image half of a model: give it one of part: text")
        super().read(texts)
        network, pad_id = self.network, texts.pad_id
        if self.masks:
            masked, reads_padding, pooling = network.config.pad_token_id, True, "mask"
        else:
            by_id = getattr(network, "use_pad_mask", False) or network.cls_emb is not None
            masked, pooling = network.pad_id if by_id else pad_id, network.pool_type
            reads_padding = by_id or network.attn_mask is None or pooling == "last"
        if pad_id is None and reads_padding:
            raise UserError(
                f"tokenizer {texts.tokenizer} has no padding token, and the tower reads padding: give it a pad_token"
            )
        if masked != pad_id:
            raise UserError(
                f"tokenizer {texts.tokenizer} pads with id {pad_id}, the tower leaves out id {masked}: give the tower"
                f" pad_id: {pad_id}, or take the tokenizer that belongs to it"
            )
        if pad_id is not None and pad_id >= self.vocab_size:
            raise UserError(
                f"tokenizer {texts.tokenizer} pads with id {pad_id}, beyond the tower's vocab_size={self.vocab_size}"
            )
        if pooling == "argmax" and texts.example[-1] != max(texts.size - 1, pad_id or 0):
            raise UserError(
                f"the tower takes the highest id of a text for its end (pool_type argmax), {texts.tokenizer} ends texts"
                f" with id {texts.example[-1]} of {texts.size}: give the tower pool_type: last, or eos with eos_id"
            )
        if pooling == "eos" and network.eos_id not in texts.example:
            raise UserError(
                f"the tower takes id {network.eos_id} for the end of a text, which tokenizer {texts.tokenizer} does not write:"
                f" give the tower eos_id: {texts.example[-1]}, if that is its end"
            )

    def padded(self, tokens: Tensor) -> Tensor:
        """Texts [N, longest] as open_clip's tokenizers pad them: to the whole context (its attention mask has one size, and
        SigLIP's features are of the last place), before the text if the tokenizer does so."""
        if self.context_length is not None and tokens.shape[1] > self.context_length:
            raise UserError(
                f"texts of {tokens.shape[1]} tokens for a tower of context_length={self.context_length}: set the text"
                f" modality's context_length to {self.context_length}"
            )
        if not self.masks:
            tokens = F.pad(tokens, (0, self.network.context_length - tokens.shape[1]), value=PADDING)
        padding = tokens == PADDING
        if self.texts and self.texts.pads_left:
            places = torch.arange(tokens.shape[1], device=tokens.device) - padding.sum(1, keepdim=True)
            tokens = tokens.gather(1, places % tokens.shape[1])
            padding = tokens == PADDING
        return tokens.masked_fill(padding, (self.texts and self.texts.pad_id) or 0)


class OpenClipTower(OpenClipTextReader):
    """The image or the text half of an open_clip model, up to and with its projection.

    Args:
        model: an architecture's name, like "ViT-B-32".
        part: which half.
        pretrained: a tag of open_clip's or a local checkpoint; none: random weights.
        **options: anything that `open_clip.create_model` takes. A tag whose weights were trained with QuickGELU gets it.
    """

    def __init__(self, model: str, part: Literal["image", "text"], pretrained: str | None = None, **options: Any) -> None:
        super().__init__()
        import open_clip

        if ":" not in model and model not in open_clip.list_models():
            raise UserError(f"open_clip has no model {model!r}; {nearest(model, open_clip.list_models())[:200]}")
        if part not in ("image", "text"):
            raise UserError(f"open_clip tower: part must be 'image' or 'text', not {part!r}")
        what = f"open_clip's {model!r} with pretrained={pretrained!r}"
        with library_errors(what), library_messages(f"open_clip tower {model}"), library_code_refused(what):
            options.setdefault("force_quick_gelu", quick_gelu(model, pretrained))
            whole = open_clip.create_model(model, pretrained=pretrained, force_custom_text=True, **options)
            size = open_clip.get_model_config(model)
            for half, network in (("image", whole.visual), ("text", whole.text)):
                check_loaded(network, f"pretrained_{half}_path", options.get(f"pretrained_{half}_path"))
        self.network, self.part = whole.visual if part == "image" else whole.text, part
        if part == "text":
            self._reads()
        self.width = getattr(self.network, "output_dim", None) or size["embed_dim"]

    def forward(self, batch: Tensor) -> Tensor:
        features = self.network(self.padded(batch) if self.part == "text" else batch)
        return features[0] if isinstance(features, tuple) else features  # CoCa's come with those of the tokens


class OpenClipTextTower(OpenClipTextReader):
    """open_clip's text transformer from scratch, at the size of `options`: width, heads, layers, context_length, …"""

    def __init__(self, width: int, layers: int, heads: int, context_length: int = 77, **options: Any) -> None:
        super().__init__()
        with library_errors("open_clip's text transformer refuses an option"):
            self.network = part_of_open_clip("transformer").TextTransformer(
                context_length=context_length, width=width, layers=layers, heads=heads, output_dim=None, **options
            )
        self._reads()
        self.width = width

    def forward(self, batch: Tensor) -> Tensor:
        features = self.network(self.padded(batch))
        return features[0] if isinstance(features, tuple) else features


def quick_gelu(model: str, pretrained: str | None) -> bool:
    """Whether weights of a tag were trained with QuickGELU: open_clip itself only warns where the architecture has another."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(model, pretrained or "") if ":" not in model else {}
    return bool(tag.get("quick_gelu"))


def check_loaded(network: nn.Module, option: str, file: str | None) -> None:
    """
    Raises:
        UserError: for a file of weights that open_clip would leave out with a line in its log, and train from random ones.
    """
    if file is None:
        return
    from open_clip.factory import load_state_dict

    if not Path(file).is_file():
        raise UserError(f"open_clip tower: {option}: no file {file}")
    missing = sorted(network.state_dict().keys() - load_state_dict(file).keys())
    if missing:
        raise UserError(f"open_clip tower: {option}: {file} lacks {len(missing)} weights of its half, as {missing[0]}")
