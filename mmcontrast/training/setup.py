"""From options to the objects of a run: modalities, towers, model, data. What the loop and the evaluation work on."""

from collections.abc import Mapping

import torch

from mmcontrast.components import build, nearest
from mmcontrast.data import SampleOrder, ShardDataset
from mmcontrast.errors import UserError
from mmcontrast.modalities import MODALITIES, Modality
from mmcontrast.model import ContrastiveModel
from mmcontrast.options import Component, Patterns
from mmcontrast.towers import TOWERS
from mmcontrast.training.options import DataOptions, FieldOptions, ModelOptions


def make_model(
    fields: Mapping[str, FieldOptions], towers: Mapping[str, Component], options: ModelOptions, seed: int
) -> ContrastiveModel:
    """The model with its initial weights, a function of the seed.

    Raises:
        UserError: for a field without a tower, or a tower without a field.
    """
    for field, of in fields.items():
        if of.tower not in towers:
            raise UserError(f"fields.{field}.tower: no tower {of.tower!r} under towers; {nearest(of.tower, towers)}")
    for tower in towers:
        if tower not in {of.tower for of in fields.values()}:
            raise UserError(f"towers.{tower} serves no field: name it in fields.<field>.tower, or remove it")
    torch.manual_seed(seed)
    return ContrastiveModel(
        make_modalities(fields),
        {name: build(spec, TOWERS, f"towers.{name}: tower") for name, spec in towers.items()},
        {field: of.tower for field, of in fields.items()},
        **options.model_dump(),
    )


def make_modalities(fields: Mapping[str, FieldOptions]) -> dict[str, Modality]:
    return {f: build(of.modality, MODALITIES, f"fields.{f}.modality: modality") for f, of in fields.items()}


def make_dataset(
    shards: Patterns,
    fields: Mapping[str, FieldOptions],
    model: ContrastiveModel,
    *,
    seed: int = 0,
    training: bool = False,
) -> ShardDataset:
    modalities = {field: model.modality(field) for field in fields}
    return ShardDataset(shards, modalities, {field: of.keys for field, of in fields.items() if of.keys}, seed, training)


def make_order(dataset: ShardDataset, options: DataOptions, batch_size: int, seed: int) -> SampleOrder:
    lanes = options.lanes or max(lanes for lanes in (1, 2, 4, 8, 16, 32, 64) if batch_size % lanes == 0)
    sizes = tuple(len(shard) for shard in dataset.shards)
    return SampleOrder(sizes, batch_size, seed, lanes, options.block, options.window, dataset.digest)
