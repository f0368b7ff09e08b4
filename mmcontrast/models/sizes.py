"""Models at other sizes than their own: of pictures, texts, vocabularies; and how models of transformers get them."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmcontrast.errors import UserError

HIGHEST_ID = 2  # the eos_token_id of CLIPs that were saved before transformers 4.31: their texts end with the highest id


@dataclass(frozen=True)
class Sizes:
    """What a model is opened at; None: its own.

    Attributes:
        image_size: pixels of the side of its square pictures.
        context_length: tokens of its texts.
        new_tokens: what its vocabulary grows by.
    """

    image_size: int | None = None
    context_length: int | None = None
    new_tokens: tuple[str, ...] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that are asked for, by their names."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def refuse(self, name: str, option: str, reason: str) -> None:
        """
        Raises:
            UserError: if an option is asked for that the model `name` cannot follow.
        """
        if option in self.given:
            value = self.given[option]
            raise UserError(f"{name}: {option}={list(value) if isinstance(value, tuple) else value}: {reason}")


OWN_SIZES = Sizes()


def resize_positions(name: str, network: Any, size: int) -> None:
    """Give a model of transformers' the position embeddings, and the config, of square pictures of another size: what its own
    forward makes of them at every step with `interpolate_pos_encoding=True`. Other weights stay as they are.

    Raises:
        UserError: for a model whose sizes are in other weights too.
    """
    before = {key: tensor.shape for key, tensor in network.state_dict().items()}
    configs = [config for module in network.modules() if (config := getattr(module, "config", None)) is not None]
    configs += [config.vision_config for config in configs if hasattr(config, "vision_config")]
    with_size = {id(config): config for config in configs if hasattr(config, "image_size")}
    for config in with_size.values():
        config.image_size = size
    with torch.device("meta"):
        after = {key: tensor.shape for key, tensor in type(network)(network.config).state_dict().items()}
    changed = [key for key in before if after.get(key) != before[key]]
    if not changed:
        return
    place, old = next(
        ((n, m) for n, m in network.named_modules() if n and changed[0].startswith(f"{n}.") and _resizes(m)), ("", None)
    )
    if old is None or len(changed) > 1:
        raise UserError(
            f"{name}: image_size={size}: transformers cannot resize {changed[0]} of a {type(network).__name__}: leave it out or"
            " take a model whose positions it interpolates (CLIP, SigLIP, ViT, DINOv2), or open_clip's or timm's version of it"
        )
    shape, key = after[changed[0]], changed[0].removeprefix(f"{place}.")
    with torch.no_grad():
        table = old.interpolate_pos_encoding(torch.zeros(1, *shape[-2:]), size, size).reshape(shape)
    new = type(old)(getattr(old, "config", None) or next(iter(with_size.values())))
    new.load_state_dict({**old.state_dict(), key: table})
    parent, _, child = place.rpartition(".")
    setattr(network.get_submodule(parent), child, new.train(old.training))


def add_tokens(name: str, network: Any, tokenizer: Any, tokens: Sequence[str]) -> int:
    """Add tokens to a tokenizer, and rows for them to a network's embedding as transformers does it: drawn by torch's generator
    with the mean and covariance of the others. Return the size of the vocabulary.

    Raises:
        UserError: for a token that is there already; for a CLIP that finds the end of a text by the highest id.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary or not token.strip() or tokens.count(token) > 1:
            raise UserError(
                f"{name}: new_tokens: {token!r} is no new token: it is empty, named twice, or in the vocabulary already"
            )
    tokenizer.add_tokens(list(tokens))
    text = getattr(network, "text_model", network)
    words = network.config.get_text_config()
    poolers = [part for part in text.modules() if getattr(part, "eos_token_id", None) == HIGHEST_ID]
    if words.model_type.startswith("owl") or (poolers and tokenizer.eos_token_id != max(vocabulary.values())):
        raise UserError(f"{name}: new_tokens: its texts end with the highest id, which would be that of a new token")
    for pooler in poolers:
        pooler.eos_token_id = pooler.config.eos_token_id = words.eos_token_id = tokenizer.eos_token_id
    rows = max(len(tokenizer), len(text.get_input_embeddings().weight))
    text.resize_token_embeddings(rows)
    words.vocab_size = rows
    return rows


def _resizes(module: Any) -> bool:
    resize = getattr(module, "interpolate_pos_encoding", None)
    return resize is not None and list(inspect.signature(resize).parameters) == ["embeddings", "height", "width"]


def resized_processor(name: str, processor: Any, size: int) -> Any:
    """Return an image processor of transformers' for pictures of another size: it crops and scales as before, in the same
    proportion. One of NaFlex, whose pictures keep their shape, makes as many patches as a square of that size has.

    Raises:
        UserError: for one whose sizes have other names.
    """
    options = processor.to_dict()
    if "max_num_patches" in options:
        return type(processor).from_dict(options | {"max_num_patches": (size // options["patch_size"]) ** 2})
    square = {"height": size, "width": size}
    crop, scaled = options.get("crop_size"), dict(options.get("size") or {})
    scaled = {key: value for key, value in scaled.items() if value is not None}
    if set(scaled) == {"shortest_edge"}:
        side = (crop or {}).get("height") or scaled["shortest_edge"]
        scaled = {"shortest_edge": round(scaled["shortest_edge"] * size / side)}
    elif set(scaled) == {"height", "width"}:
        scaled = square
    else:
        raise UserError(f"{name}: image_size={size}: its {type(processor).__name__} scales to {scaled}: leave image_size out")
    return type(processor).from_dict(options | {"size": scaled} | ({"crop_size": square} if crop else {}))
