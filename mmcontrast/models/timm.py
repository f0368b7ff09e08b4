"""Open models of timm, as towers of pictures or spectrograms, or with the preprocessing of their weights."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.libraries import opening
from mmcontrast.modalities.image import INTERPOLATIONS
from mmcontrast.modalities.library import LibraryImages
from mmcontrast.models.base import Origin, Tower
from mmcontrast.models.contrastive import ContrastiveModel, assembled
from mmcontrast.models.sizes import OWN_SIZES, Sizes


class TimmTower(Tower):
    """A tower of a timm model without its classifier; its features are the pooled ones.

    Args:
        model: a timm name, like "vit_base_patch16_224" or "resnet50"; or a network.
        pretrained: load timm's weights, from its hub; or a checkpoint's file.
        **options: anything `timm.create_model` takes for that model: in_chans, img_size, drop_path_rate, channels, …
    """

    def __init__(self, model: str | nn.Module, pretrained: bool | str = False, **options: Any) -> None:
        super().__init__()
        network: Any = model if isinstance(model, nn.Module) else _make_network(model, pretrained, options)
        self.network, self.width = network, getattr(network, "head_hidden_size", network.num_features)


def _make_network(model: str, pretrained: bool | str, options: dict[str, Any]) -> nn.Module:
    """Return a timm network without its classifier.

    Raises:
        UserError: for an unknown model, or what timm refuses.
    """
    import timm

    if not timm.is_model(model.split(".")[0]):
        raise UserError(f"timm has no model {model!r}; {suggestion(model, timm.list_models())[:200]}")
    problem = f"timm's {model!r} refuses an option, or has no weights"
    with opening(problem, f"timm tower {model}", runs_transformers=False):
        if isinstance(pretrained, str):
            options = from_file(model, pretrained) | options
        network: Any = timm.create_model(model, pretrained=bool(pretrained), **({"num_classes": 0} | options))
        if isinstance(pretrained, str):
            network.reset_classifier(0)
    return network


def from_file(model: str, file: str) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` to load a checkpoint's file strictly: with its number of classes.

    Raises:
        FileNotFoundError: if there is no such file.
        others: as timm raises them.
    """
    import timm

    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}")
    config = timm.get_pretrained_cfg(model)
    names = config.classifier if config else None
    head = names if isinstance(names, str) else next(iter(names or ()), "")
    weight = timm.models.load_state_dict(file, weights_only=True).get(f"{head}.weight")
    classes = 0 if weight is None else len(weight)
    return {"num_classes": classes, "pretrained_cfg_overlay": {"file": file, "num_classes": classes}}


def is_timm(name: str) -> bool:
    """Return whether a name is an architecture of timm, with or without a tag."""
    import timm

    return timm.is_model(name.partition(".")[0])


def open_timm(name: str, pretrained: str | None, weights: bool = True, sizes: Sizes = OWN_SIZES) -> ContrastiveModel:
    """Open a timm model with the field image, whose embeddings are its normalized features.

    Args:
        name: an architecture with or without a tag, "hf-hub:timm/name", or "local-dir:FOLDER".
        pretrained: of an architecture: a checkpoint's file; default: timm's weights.
        weights: False: random ones.
        sizes: timm resizes the position embeddings of a checkpoint; a network without them takes pictures of any size.

    Raises:
        UserError: for an unknown architecture.
        others: as timm raises them.
    """
    import timm

    if ":" not in name and not is_timm(name):
        raise UserError(f"timm has no model {name!r}; {suggestion(name, timm.list_models())[:200]}")
    if ":" in name and pretrained:
        raise UserError(f"{name} has its own weights: leave out pretrained={pretrained!r}")
    options = from_file(name, pretrained) if pretrained and weights else {}
    for option in ("context_length", "new_tokens"):
        sizes.refuse(name, option, "timm's models take no texts: leave it out")
    network, config = _make_at_size(name, weights, options, sizes.image_size)
    network.reset_classifier(0)
    data = timm.data.resolve_model_data_config(network)
    prepare = timm.data.create_transform(**data, is_training=False)
    augmented = timm.data.create_transform(**data, is_training=True)
    mode = {1: "L", 3: "RGB"}[data["input_size"][0]]
    images = LibraryImages(prepare, max(data["input_size"][1:]), mode, augmented, as_ours(data, augmented))
    model = assembled({"image": images}, {"image": TimmTower(network)})
    model.origin = Origin("timm", name, pretrained, config=config)
    return model


def as_ours(data: Mapping[str, Any], augmented: Any) -> dict[str, Any] | str:
    """Return the options of `ImageModality` that do what timm does to pictures; or why there are none.

    Args:
        data: as `resolve_model_data_config` returns it.
        augmented: timm's transforms of training for it.
    """
    channels, height, width = data["input_size"]
    if height != width:
        return f"pictures of {height}×{width} are no squares"
    if data["crop_mode"] not in ("center", "squash"):
        return f"crop_mode {data['crop_mode']} fills up pictures that are no squares"
    if data["interpolation"] not in INTERPOLATIONS:
        return f"interpolation {data['interpolation']}: ours is {' or '.join(INTERPOLATIONS)}"
    augment = []
    for transform in augmented.transforms:
        kind = type(transform).__name__
        if kind == "RandomResizedCropAndInterpolation":
            crop = {"size": height, "scale": transform.scale, "ratio": transform.ratio}
            augment.append({"type": "RandomResizedCrop", "antialias": True, "interpolation": transform.interpolation, **crop})
        elif kind == "RandomHorizontalFlip":
            augment.append({"type": kind, "p": transform.p})
        elif kind == "ColorJitter":
            ranges = {name: getattr(transform, name) for name in ("brightness", "contrast", "saturation", "hue")}
            augment.append({"type": kind} | {name: values for name, values in ranges.items() if values is not None})
        elif kind not in ("MaybeToTensor", "Normalize"):
            return f"training's {kind} is not known here"
    options = {"size": height, "channels": channels, "mean": list(data["mean"]), "std": list(data["std"])}
    options |= {"background": "drop", "augment": augment, "interpolation": data["interpolation"]}
    resize = "squash" if data["crop_mode"] == "squash" else "shortest"
    return options | {"resize": resize, "resize_to": math.floor(height / data["crop_pct"])}


def _make_at_size(name: str, weights: bool, options: dict[str, Any], size: int | None) -> tuple[Any, dict[str, Any]]:
    """Return a network for square pictures of a size, and its option for the size; no option if it takes pictures of any size.

    Raises:
        UserError: for weights that depend on the size and that timm does not resize.
    """
    import timm

    if size is None:
        return timm.create_model(name, pretrained=weights, **options), {}
    config: dict[str, Any] = {"img_size": size}
    try:
        network: Any = timm.create_model(name, pretrained=weights, **options, **config)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        config, network = {}, timm.create_model(name, pretrained=weights, **options)
    except RuntimeError as error:
        if not (mismatch := re.search(r"size mismatch for ([\w.]+)", str(error))):
            raise
        raise UserError(
            f"{name}: image_size={size}: timm does not resize {mismatch[1]}: leave it out, or take a model whose checkpoints it"
            " resizes (vit, eva, swin, …) or that takes any size (resnet, convnext, …)"
        ) from error
    channels = timm.data.resolve_model_data_config(network)["input_size"][0]
    network.pretrained_cfg = network.default_cfg = {**network.pretrained_cfg, "input_size": (channels, size, size)}
    return network, config
