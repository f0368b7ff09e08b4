"""timm's image encoders: pooled features, prepared by the data config that comes with the weights."""

from typing import Any

from mmcontrast.components import nearest
from mmcontrast.errors import UserError
from mmcontrast.model import ContrastiveModel
from mmcontrast.pretrained.base import LibraryTower, assembled
from mmcontrast.pretrained.modalities import LibraryImages
from mmcontrast.towers.timm import from_file


def is_timm(name: str) -> bool:
    """Whether it is an architecture of timm's, with or without a tag."""
    import timm

    return timm.is_model(name.partition(".")[0])


def open_timm(name: str, pretrained: str | None) -> ContrastiveModel:
    """Field image, of unit features.

    Args:
        name: an architecture with or without a tag, "hf-hub:timm/name", or "local-dir:FOLDER".
        pretrained: of an architecture: a checkpoint's file; default: timm's weights.

    Raises:
        UserError: for an unknown architecture.
        others: as timm does.
    """
    import timm

    if ":" not in name and not is_timm(name):
        raise UserError(f"timm has no model {name!r}; {nearest(name, timm.list_models())[:200]}")
    if ":" in name and pretrained:
        raise UserError(f"{name} has its own weights: leave out pretrained={pretrained!r}")
    options = from_file(name, pretrained) if pretrained else {}
    network: Any = timm.create_model(name, pretrained=True, **options)
    network.reset_classifier(0)
    data = timm.data.resolve_model_data_config(network)
    prepare, augmented = (timm.data.create_transform(**data, is_training=train) for train in (False, True))
    mode = {1: "L", 3: "RGB"}[data["input_size"][0]]
    images = LibraryImages(prepare, max(data["input_size"][1:]), mode, augmented)
    return assembled({"image": images}, {"image": LibraryTower(network)})
