"""Schedules of what changes at given steps: the side of pictures, and the share of their patches that a tower drops."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality
from mmcontrast.models import ContrastiveModel
from mmcontrast.training.options import TrainOptions

T = TypeVar("T")


def value_at(points: Mapping[int, T], step: int) -> T:
    """Return the value of the last point that is not after a step."""
    return points[max(point for point in points if point <= step)]


def apply_schedules(model: ContrastiveModel, options: TrainOptions, step: int) -> None:
    """Set what the schedules say for optimizer step `step`, from 0."""
    for field, sides in options.resolution.items():
        modality = model.modality(field)
        assert isinstance(modality, ImageModality)  # see check_schedules
        modality.side = value_at(sides, step)
    for tower, shares in options.patch_dropout.items():
        for module in _patch_dropouts(model, tower):
            module.prob = value_at(shares, step)  # type: ignore[assignment]  # a plain number


def _patch_dropouts(model: ContrastiveModel, tower: str) -> list[nn.Module]:
    """Return a tower's patch dropouts: timm's and open_clip's have the same class name and the same `prob`."""
    return [module for module in model.towers[tower].modules() if type(module).__name__.startswith("PatchDropout")]


@torch.no_grad()
def check_schedules(model: ContrastiveModel, options: TrainOptions) -> None:
    """Check the schedules against the model, by passing a picture of every side through its tower.

    Raises:
        UserError: for fields that are no pictures, towers that drop no patches, or that refuse pictures of a side.
    """
    for tower in options.patch_dropout:
        if tower not in model.towers:
            raise UserError(f"train.patch_dropout: no tower {tower!r}; {suggestion(tower, model.towers)}")
        if not _patch_dropouts(model, tower):
            raise UserError(
                f"train.patch_dropout: towers.{tower} has none: give a timm model patch_drop_rate: 0.5 there, an open_clip"
                " model force_patch_dropout: 0.5"
            )
    for field, sides in options.resolution.items():
        if field not in model.modalities:
            raise UserError(f"train.resolution: no field {field!r}; {suggestion(field, model.modalities)}")
        modality = model.modality(field)
        if not isinstance(modality, ImageModality):
            raise UserError(f"train.resolution: field {field!r} is no image")
        network: nn.Module = model.towers[model.tower_of[field]]
        training = network.training
        network.eval()
        for side in sorted({*sides.values()}):
            try:
                network(torch.zeros(1, modality.channels, side, side))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"train.resolution.{field}: its tower refuses pictures of {side} pixels ({error}); a timm transformer takes"
                    " them with dynamic_img_size: true"
                ) from error
        network.train(training)
