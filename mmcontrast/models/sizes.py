"""Open models at other sizes of pictures, texts or vocabularies than their own, and resize those of transformers."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmcontrast.errors import UserError

HIGHEST_ID = 2  # the eos_token_id of CLIPs that were saved before transformers 4.31: their texts end with the highest id


@dataclass(frozen=True)
class Sizes:
    """The sizes at which a model is opened; None: its own.

    Attributes:
        image_size: the side of its square pictures in pixels.
        context_length: the number of tokens of its texts.
        new_tokens: tokens that are added to its vocabulary.
    """

    image_size: int | None = None
    context_length: int | None = None
    new_tokens: tuple[str, ...] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Return the sizes that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def refuse(self, name: str, option: str, reason: str) -> None:
        """Refuse an option, if it is set, that the model `name` does not support.

        Raises:
            UserError: if it is set.
        """
        if option in self.given:
            value = self.given[option]
            raise UserError(f"{name}: {option}={list(value) if isinstance(value, tuple) else value}: {reason}")


OWN_SIZES = Sizes()


def resize_positions(name: str, network: Any, size: int) -> None:
    """Resize the position embeddings and the config of a transformers model to square pictures of another size, as its own
    forward does at every step with `interpolate_pos_encoding=True`. Other weights do not change.

    Raises:
        UserError: for a model with other weights that depend on the size.
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
    key = changed[0]
    candidates = [(path, module) for path, module in network.named_modules() if path and key.startswith(f"{path}.")]
    path, old = next(((path, module) for path, module in candidates if _resizes(module)), ("", None))
    if old is None or len(changed) > 1:
        raise UserError(
            f"{name}: image_size={size}: transformers cannot resize {key} of a {type(network).__name__}: leave it out or"
            " take a model whose positions it interpolates (CLIP, SigLIP, ViT, DINOv2), or open_clip's or timm's version of it"
        )
    shape = after[key]
    with torch.no_grad():
        table = old.interpolate_pos_encoding(torch.zeros(1, *shape[-2:]), size, size).reshape(shape)
    new = type(old)(getattr(old, "config", None) or next(iter(with_size.values())))
    new.load_state_dict({**old.state_dict(), key.removeprefix(f"{path}."): table})
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, new.train(old.training))


def add_tokens(name: str, network: Any, tokenizer: Any, tokens: Sequence[str]) -> int:
    """Add tokens to a tokenizer, and rows for them to a network's embedding as transformers does: drawn by torch's generator
    with the mean and covariance of the others. Return the size of the vocabulary.

    Raises:
        UserError: for a token of the vocabulary; for a CLIP that finds the end of a text by the highest id.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary or not token.strip() or tokens.count(token) > 1:
            raise UserError(
                f"{name}: new_tokens: {token!r} is no new token: it is empty, named twice, or in the vocabulary already"
            )
    tokenizer.add_tokens(list(tokens))
    text = getattr(network, "text_model", network)
    text_config = network.config.get_text_config()
    poolers = [part for part in text.modules() if getattr(part, "eos_token_id", None) == HIGHEST_ID]
    if text_config.model_type.startswith("owl") or (poolers and tokenizer.eos_token_id != max(vocabulary.values())):
        raise UserError(f"{name}: new_tokens: its texts end with the highest id, which would be that of a new token")
    for pooler in poolers:
        pooler.eos_token_id = pooler.config.eos_token_id = text_config.eos_token_id = tokenizer.eos_token_id
    rows = max(len(tokenizer), len(text.get_input_embeddings().weight))
    text.resize_token_embeddings(rows)
    text_config.vocab_size = rows
    return rows


def _resizes(module: Any) -> bool:
    """Return whether a module can interpolate its position embeddings."""
    resize = getattr(module, "interpolate_pos_encoding", None)
    return resize is not None and list(inspect.signature(resize).parameters) == ["embeddings", "height", "width"]


def resized_processor(name: str, processor: Any, size: int) -> Any:
    """Return a transformers image processor for pictures of another size, which crops and scales in the same proportion. A
    NaFlex processor, whose pictures keep their shape, makes as many patches as a square of that size has.

    Raises:
        UserError: for a processor whose sizes have other names.
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
