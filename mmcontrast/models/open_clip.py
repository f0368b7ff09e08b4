"""Open models of open_clip: a whole dual encoder, one half as a tower, or its text transformer from scratch."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.libraries import library_errors, opening, part_of_open_clip
from mmcontrast.modalities import PADDING, TextIds
from mmcontrast.modalities.image import without_palette_alpha
from mmcontrast.modalities.library import LibraryImages, LibraryTexts
from mmcontrast.models.base import Origin, Tower
from mmcontrast.models.contrastive import ContrastiveModel, assembled
from mmcontrast.models.sizes import OWN_SIZES, Sizes
from mmcontrast.models.transformers import positions_of

OPEN_CLIP_CONFIG = "open_clip_config.json"
CONTEXT_LENGTH = 77  # open_clip's default


class OpenClipTextReader(Tower):
    """The base of towers around open_clip's text networks, which take texts padded as by open_clip's tokenizers."""

    masks = False  # True: the network is a Hugging Face encoder, which takes a mask and texts of any length

    def _set_text_limits(self) -> None:
        """Set the context length and vocabulary size from the network."""
        network, self.masks = self.network, type(self.network).__name__ == "HFTextEncoder"
        self.context_length = positions_of(network, network.config) if self.masks else network.context_length
        self.vocab_size = network.config.vocab_size if self.masks else network.vocab_size

    def read(self, texts: TextIds) -> None:
        if self.vocab_size is None:
            raise UserError("its tower is the image half of a model: give it one of part: text")
        super().read(texts)
        network, pad_id = self.network, texts.pad_id
        if self.masks:
            masked_id, reads_padding, pooling = network.config.pad_token_id, True, "mask"
        else:
            masks_by_id = getattr(network, "use_pad_mask", False) or network.cls_emb is not None
            masked_id, pooling = network.pad_id if masks_by_id else pad_id, network.pool_type
            reads_padding = masks_by_id or network.attn_mask is None or pooling == "last"
        if pad_id is None and reads_padding:
            raise UserError(
                f"tokenizer {texts.tokenizer} has no padding token, and the tower reads padding: give it a pad_token"
            )
        if masked_id != pad_id:
            raise UserError(
                f"tokenizer {texts.tokenizer} pads with id {pad_id}, the tower leaves out id {masked_id}: give the tower"
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
        """Return texts [N, longest] padded as by open_clip's tokenizers: to the whole context (its attention mask has one size,
        and SigLIP takes its features from the last position), before the text if the tokenizer does so."""
        if self.context_length is not None and tokens.shape[1] > self.context_length:
            raise UserError(
                f"texts of {tokens.shape[1]} tokens for a tower of context_length={self.context_length}: set the text"
                f" modality's context_length to {self.context_length}"
            )
        if not self.masks:
            tokens = F.pad(tokens, (0, self.network.context_length - tokens.shape[1]), value=PADDING)
        padding = tokens == PADDING
        if self.texts and self.texts.pads_left:
            positions = torch.arange(tokens.shape[1], device=tokens.device) - padding.sum(1, keepdim=True)
            tokens = tokens.gather(1, positions % tokens.shape[1])
            padding = tokens == PADDING
        return tokens.masked_fill(padding, (self.texts and self.texts.pad_id) or 0)


class OpenClipTower(OpenClipTextReader):
    """A tower of the image or the text half of an open_clip model, with its projection.

    Args:
        model: an architecture's name, like "ViT-B-32"; or a network of a half.
        part: which half.
        pretrained: an open_clip tag or a local checkpoint; default: random weights.
        **options: anything that `open_clip.create_model` takes. A tag whose weights were trained with QuickGELU gets it.
    """

    def __init__(
        self, model: str | nn.Module, part: Literal["image", "text"], pretrained: str | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.network, self.part = model if isinstance(model, nn.Module) else _half(model, part, pretrained, options), part
        if part == "text":
            self._set_text_limits()
        self.width = getattr(self.network, "output_dim", None) or 0

    def forward(self, batch: Tensor) -> Tensor:
        features = self.network(self.padded(batch) if self.part == "text" else batch)
        return features[0] if isinstance(features, tuple) else features  # CoCa returns the tokens' features too


class OpenClipTextTower(OpenClipTextReader):
    """A tower of open_clip's text transformer from scratch, with any of its options: width, heads, layers, context_length, …"""

    def __init__(self, width: int, layers: int, heads: int, context_length: int = 77, **options: Any) -> None:
        super().__init__()
        with library_errors("open_clip's text transformer refuses an option"):
            self.network = part_of_open_clip("transformer").TextTransformer(
                context_length=context_length, width=width, layers=layers, heads=heads, output_dim=None, **options
            )
        self._set_text_limits()
        self.width = width

    def forward(self, batch: Tensor) -> Tensor:
        features = self.network(self.padded(batch))
        return features[0] if isinstance(features, tuple) else features


def _half(model: str, part: str, pretrained: str | None, options: dict[str, Any]) -> nn.Module:
    """Return the network of one half of an open_clip model.

    Raises:
        UserError: for an unknown model or half, or an option that open_clip refuses.
    """
    import open_clip

    if ":" not in model and model not in open_clip.list_models():
        raise UserError(f"open_clip has no model {model!r}; {suggestion(model, open_clip.list_models())[:200]}")
    if part not in ("image", "text"):
        raise UserError(f"open_clip tower: part must be 'image' or 'text', not {part!r}")
    with opening(f"open_clip's {model!r} with pretrained={pretrained!r}", f"open_clip tower {model}"):
        options = {"force_quick_gelu": quick_gelu(model, pretrained)} | options
        whole = open_clip.create_model(model, pretrained=pretrained, force_custom_text=True, **options)
        if pretrained and ":" not in model and Path(pretrained).is_file() and not options["force_quick_gelu"]:
            tell_of_activation(model, pretrained)
        for half, network in (("image", whole.visual), ("text", whole.text)):
            check_loaded(network, f"pretrained_{half}_path", options.get(f"pretrained_{half}_path"))
    network = whole.visual if part == "image" else whole.text
    if getattr(network, "output_dim", None) is None:
        network.output_dim = open_clip.get_model_config(model)["embed_dim"]
    return network


def quick_gelu(model: str, pretrained: str | None) -> bool:
    """Return whether a tag's weights were trained with QuickGELU; open_clip only warns if the architecture has another GELU."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(model, pretrained or "") if ":" not in model else {}
    return bool(tag.get("quick_gelu"))


def check_loaded(network: nn.Module, option: str, file: str | None) -> None:
    """Check that open_clip has loaded a file of weights; it would only log a failure, and train from random ones.

    Raises:
        UserError: if the file is missing, or lacks weights.
    """
    if file is None:
        return
    from open_clip.factory import load_state_dict

    if not Path(file).is_file():
        raise UserError(f"open_clip tower: {option}: no file {file}")
    missing = sorted(network.state_dict().keys() - load_state_dict(file).keys())
    if missing:
        raise UserError(f"open_clip tower: {option}: {file} lacks {len(missing)} weights of its half, as {missing[0]}")


def is_architecture(name: str) -> bool:
    """Return whether a name is an architecture, with or without a tag: "ViT-B-32", "ViT-B-32/laion2b_s34b_b79k"."""
    import open_clip

    return name.partition("/")[0] in open_clip.list_models()


def open_open_clip(name: str, pretrained: str | None, weights: bool = True, sizes: Sizes = OWN_SIZES) -> ContrastiveModel:
    """Open an open_clip model with the fields image and text.

    Args:
        name: an architecture, "ARCHITECTURE/TAG", "hf-hub:org/name", or "local-dir:FOLDER".
        pretrained: of an architecture: an open_clip tag, or a checkpoint's file.
        sizes: open_clip resizes the position embeddings of its vision transformers, of timm's, and of its text transformers.

    Raises:
        UserError: for an architecture without weights, an unknown tag, or a size that open_clip does not support.
        others: as open_clip raises them.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if ":" not in name:
        name, _, tag = name.partition("/")
        pretrained = pretrained or tag or None
        if not is_architecture(name):
            raise UserError(f"open_clip has no model {name!r}; {suggestion(name, open_clip.list_models())[:200]}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if weights and not (pretrained and (pretrained in tags or Path(pretrained).is_file())):
            raise UserError(
                f"open_clip's {name} with pretrained={pretrained!r}: no such file, and no such tag: it takes a checkpoint's"
                f" file, or a tag ({suggestion(pretrained or '', tags)[:200] if tags else 'there is none'})"
            )
    elif pretrained:
        raise UserError(f"{name} has its own weights: leave out pretrained={pretrained!r}")
    sizes.refuse(
        name, "new_tokens", "open_clip's tokenizers cannot grow: export --format huggingface, and begin with that folder"
    )
    model_cfg = model_config(name)
    if weights and isinstance(model_cfg["vision_cfg"].get("layers"), list | tuple):
        sizes.refuse(name, "image_size", "open_clip does not resize the positions in a ResNet's attention pool: take a ViT")
    shape = model_cfg["vision_cfg"].get("image_size")
    if weights and isinstance(shape, list | tuple) and len(set(shape)) > 1:
        reason = f"open_clip resizes square pictures' positions alone, its own are {shape}: leave it out"
        sizes.refuse(name, "image_size", reason)
    options: dict[str, Any] = {"force_custom_text": True, "force_quick_gelu": quick_gelu(name, pretrained)}
    options |= {f"force_{option}": value for option, value in sizes.given.items()}
    if not pretrained and ":" not in name:
        options["force_preprocess_cfg"] = published_preprocessing(name)
    whole = open_clip.create_model(name, pretrained, load_weights=weights, require_pretrained=weights, **options)
    preprocess = PreprocessCfg(**whole.visual.preprocess_cfg)
    if pretrained and pretrained not in open_clip.list_pretrained_tags_by_model(name):
        tell_of_preprocessing(name, pretrained, preprocess)
        tell_of_activation(name, pretrained)
    prepare = partial(_pixels, image_transform_v2(preprocess, is_train=False))
    augmented = partial(_pixels, image_transform_v2(preprocess, is_train=True))
    size = preprocess.size if isinstance(preprocess.size, int) else max(preprocess.size)
    texts = OpenClipTexts(name, sizes.context_length or model_cfg["text_cfg"].get("context_length", CONTEXT_LENGTH))
    if weights:
        texts.open()
    modalities = {
        "image": LibraryImages(prepare, size, None, augmented, as_ours(preprocess)),
        "text": texts,
    }
    towers = {"image": OpenClipTower(whole.visual, "image"), "text": OpenClipTower(whole.text, "text")}
    longest = towers["text"].context_length
    if longest is not None and texts.context_length > longest:
        sizes.refuse(
            name, "context_length", f"its text tower, a Hugging Face encoder, takes {longest} tokens: set that or less"
        )
    model = assembled(modalities, towers, whole.logit_scale, whole.logit_bias)
    for option, part in (("image_size", "vision_cfg"), ("context_length", "text_cfg")):
        model_cfg[part] |= {option: sizes.given[option]} if option in sizes.given else {}
    config = {"model_cfg": model_cfg, "preprocess_cfg": dict(whole.visual.preprocess_cfg)}
    rest = {key: value for key, value in whole.state_dict().items() if not key.startswith(("visual.", "text.", "logit_"))}
    model.origin = Origin("open_clip", name, pretrained, config=config, rest=rest)
    return model


def published_preprocessing(name: str) -> dict[str, Any]:
    """Return the preprocessing of all published weights of an architecture; {} if they differ, for open_clip's default."""
    import open_clip

    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    keys = ("mean", "std", "interpolation", "resize_mode")
    settings = [{key: tag[key] for key in keys if tag.get(key)} for tag in tags]
    return settings[0] if settings and all(setting == settings[0] for setting in settings) else {}


def tell_of_activation(name: str, file: str) -> None:
    """Warn where a file is opened with GELU, and published weights of the architecture were trained with QuickGELU."""
    import open_clip

    tags = [tag for tag in open_clip.list_pretrained_tags_by_model(name) if quick_gelu(name, tag)]
    if tags and not open_clip.get_model_config(name).get("quick_gelu"):
        warnings.warn(
            f"{file} is opened with GELU, and {', '.join(tags)} of {name} were trained with QuickGELU: if it is one of those,"
            f" or was trained from one, open {name}-quickgelu",
            stacklevel=2,
        )


def tell_of_preprocessing(name: str, file: str, used: Any) -> None:
    """Warn where pictures are prepared by open_clip's default for a file, and the architecture's published weights differ."""
    published = published_preprocessing(name)
    other = {key: value for key, value in published.items() if list_of(getattr(used, key)) != list_of(value)}
    if other:
        default = {key: getattr(used, key) for key in other}
        warnings.warn(
            f"{file}: open_clip prepares pictures for a file by {default}, for the published weights of {name} by {other}:"
            f" if it was trained from those, export it --format open_clip, and set them in {OPEN_CLIP_CONFIG}",
            stacklevel=2,
        )


def list_of(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def as_ours(preprocess: Any) -> dict[str, Any] | str:
    """Return the options of `ImageModality` that do what a PreprocessCfg does; or why there are none."""
    sides = {preprocess.size} if isinstance(preprocess.size, int) else set(preprocess.size)
    if len(sides) > 1:
        return f"pictures of {preprocess.size} are no squares"
    if preprocess.resize_mode == "longest":
        return "resize_mode longest fills up pictures that are no squares"
    options = {"size": sides.pop(), "mean": list(preprocess.mean), "std": list(preprocess.std), "background": "open_clip"}
    method = "bilinear" if preprocess.interpolation == "bilinear" else "bicubic"  # random: bicubic in evaluation
    return options | {"interpolation": method, "resize": preprocess.resize_mode}


def model_config(name: str) -> dict[str, Any]:
    """Return the `model_cfg` of an architecture, of "local-dir:FOLDER", or of "hf-hub:org/name"."""
    import open_clip

    schema, _, path = name.rpartition(":")
    if not schema:
        return open_clip.get_model_config(path)
    if schema == "local-dir":
        file = Path(path) / OPEN_CLIP_CONFIG
    else:
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(path, OPEN_CLIP_CONFIG))
    return json.loads(file.read_text(encoding="utf-8"))["model_cfg"]


def _pixels(transform: Callable[[Image.Image], Tensor], picture: Image.Image) -> Tensor:
    """Return open_clip's pixels of a picture in any mode: it scales a picture before it converts it to RGB."""
    return transform(without_palette_alpha(picture))


class OpenClipTexts(LibraryTexts):
    """A modality of token ids of the whole context's length, as open_clip pads them.

    Args:
        name: of the model. Its tokenizer is opened when it is first needed, as it may be a download.
    """

    def __init__(self, name: str, context_length: int) -> None:
        super().__init__(_Tokenizer(name, context_length), context_length)

    def open(self) -> None:
        assert self.tokenize.tokenizer

    def blank(self) -> Tensor:
        return torch.arange(self.context_length) % 4


@dataclass
class _Tokenizer:
    """A text → its ids, by the tokenizer of a model, which is opened at first use."""

    name: str
    context_length: int

    def __call__(self, text: str) -> Tensor:
        return self.tokenizer([text])[0]

    @cached_property
    def tokenizer(self) -> Any:
        """Return open_clip's tokenizer."""
        import open_clip

        with opening(f"{self.name}: its tokenizer"):
            return open_clip.get_tokenizer(self.name, context_length=self.context_length)
