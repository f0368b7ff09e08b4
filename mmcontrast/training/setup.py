"""From options to the objects of a run: modalities, towers, model, data. What the loop and the evaluation work on."""

from collections.abc import Mapping

import torch

from mmcontrast.components import build, nearest
from mmcontrast.data import MixtureDataset, MixtureOrder, SampleOrder, ShardDataset
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


def make_training_data(
    options: DataOptions, fields: Mapping[str, FieldOptions], model: ContrastiveModel, batch_size: int, seed: int
) -> tuple[ShardDataset | MixtureDataset, SampleOrder | MixtureOrder]:
    """The samples and their order: of one set of shards, or of several sources.

    Raises:
        UserError: for shards, fields or weights that do not fit.
    """
    lanes = options.lanes or max(lanes for lanes in (1, 2, 4, 8, 16, 32, 64) if batch_size % lanes == 0)

    def order_of(dataset: ShardDataset) -> SampleOrder:
        sizes = tuple(len(shard) for shard in dataset.shards)
        return SampleOrder(sizes, batch_size, seed, lanes, options.block, options.window, dataset.digest)

    if not isinstance(options.train, dict):
        dataset = make_dataset(options.train, fields, model, seed=seed, training=True)
        return dataset, order_of(dataset)
    sources = {}
    for name, source in options.train.items():
        for field in source.keys.keys() | source.modalities.keys():
            if field not in fields:
                raise UserError(f"data.train.{name}: no field {field!r}; {nearest(field, fields)}")
        changed = {field: fields[field].modality for field in fields}
        for field, other in source.modalities.items():
            own = changed[field]
            changed[field] = {**({"type": own} if isinstance(own, str) else own), **other}
        modalities = {
            field: build(spec, MODALITIES, f"data.train.{name}.modalities.{field}: modality")
            if field in source.modalities
            else model.modality(field)
            for field, spec in changed.items()
        }
        keys = {field: of.keys for field, of in fields.items() if of.keys} | source.keys
        sources[name] = ShardDataset(source.shards, modalities, keys, seed, training=True, partial=True)
    weights = [source.weight or float(len(sources[name])) for name, source in options.train.items()]
    mixture = MixtureDataset(
        sources,
        {field: model.modality(field) for field in fields},
        [name for name, source in options.train.items() if source.own_ids],
    )
    orders = tuple(order_of(dataset) for dataset in sources.values())
    return mixture, MixtureOrder(orders, tuple(weight / sum(weights) for weight in weights), options.batches)
