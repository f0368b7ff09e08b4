"""Make the training data of a run from its options: data sets, their order, sources and mined negatives."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.components import suggestion
from mmcontrast.data import (
    ClusterOrder,
    MixtureDataset,
    MixtureOrder,
    NeighbourOrder,
    SampleOrder,
    ShardDataset,
    ShardOptions,
    Shards,
    StreamDataset,
    StreamOrder,
    TeacherView,
    TrainingDataset,
    TrainingOrder,
    clusters_of,
    open_dataset,
    open_neighbours,
)
from mmcontrast.data.held_out import Part
from mmcontrast.data.keys import names_of
from mmcontrast.data.loading import ExactOrder
from mmcontrast.data.negatives import MinedNegatives, open_negatives
from mmcontrast.data.neighbours import Neighbours
from mmcontrast.data.opening import check_templates
from mmcontrast.errors import UserError
from mmcontrast.modalities import Modality, TextModality
from mmcontrast.models import ContrastiveModel, changed_modality
from mmcontrast.models.options import FieldOptions
from mmcontrast.training.data_options import DataOptions, NeighboursOptions, SourceOptions


def make_dataset(
    shards: Shards,
    fields: Mapping[str, FieldOptions],
    model: ContrastiveModel,
    *,
    seed: int = 0,
    training: bool = False,
    partial: bool = False,
    without: float | None = None,
    views: Sequence[TeacherView] = (),
) -> ShardDataset:
    """Open shards by the keys of `fields`, or by those of a mapping of shards that has its own `keys` and `files`.

    Args:
        partial: leave out fields of which no sample has a member.
        without: the share of the samples that is held out, and so left out.
        views: what teachers read of each sample.

    Raises:
        UserError: for shards that do not exist, or lack a field, or in training have no sample with two.
    """
    modalities = training_modalities(fields, model) if training else {field: model.modality(field) for field in fields}
    keys = {name: field.keys for name, field in fields.items() if field.keys}
    options: dict[str, Any] = {"seed": seed, "training": training, "partial": partial, "without": without, "views": views}
    dataset = open_dataset(shards, modalities, keys, **options)
    if dataset.pairless:
        raise UserError(dataset.pairless)
    return dataset


def training_modalities(fields: Iterable[str], model: ContrastiveModel) -> dict[str, Modality]:
    """Return the fields' modalities with the augmentation of training."""
    return {field: model.modality(field).for_training() for field in fields}


def make_training_data(
    options: DataOptions,
    fields: Mapping[str, FieldOptions],
    model: ContrastiveModel,
    batch_size: int,
    seed: int,
    views: Sequence[TeacherView] = (),
) -> tuple[TrainingDataset, TrainingOrder]:
    """Return the training samples and their order: from one set of shards, from several sources, within clusters, beside their
    nearest neighbours, or sequential.

    Raises:
        UserError: for shards, fields, weights or options that do not fit.
    """
    sources = options.train if isinstance(options.train, dict) else {}
    check_combinations(options, fields)
    if options.sequential and any(view.keys for view in views):
        raise UserError("train.teacher: embeddings that are stored need shards that are indexed: no data.sequential")
    lanes = options.lanes or max(lanes for lanes in (1, 2, 4, 8, 16, 32, 64) if batch_size % lanes == 0)
    keys = {name: field.keys for name, field in fields.items() if field.keys}
    if options.sequential:
        assert not isinstance(options.train, dict)
        modalities = training_modalities(fields, model)
        return StreamDataset(options.train, modalities, keys, seed, views), StreamOrder(batch_size, seed)

    def make_order(dataset: ShardDataset) -> SampleOrder:
        sizes, field = tuple(len(shard) for shard in dataset.shards), options.bucket_by
        lengths = partial(dataset.lengths, field) if field else None
        digest = dataset.digest + negatives_digest
        return SampleOrder(sizes, batch_size, seed, lanes, options.block, options.window, digest, field, lengths)

    dataset: ShardDataset | MixtureDataset
    if sources:
        common: dict[str, Any] = {"seed": seed, "without": options.held_out, "views": views, "select": options.select}
        opened = {name: make_source(name, source, fields, model, **common) for name, source in sources.items()}
        own_ids = [name for name, source in sources.items() if source.own_ids]
        dataset = MixtureDataset(opened, training_modalities(fields, model), own_ids, views)
    else:
        assert not isinstance(options.train, dict)
        shards = ShardOptions(shards=options.train, select=options.select)
        dataset = make_dataset(shards, fields, model, seed=seed, training=True, without=options.held_out, views=views)
    dataset.negatives = make_negatives(options, dataset, seed)
    negatives_digest, batches = digest_of_negatives(dataset), options.batches
    if options.clusters:
        clusters, table = clusters_of(dataset, options.clusters)
        return dataset, ClusterOrder(batch_size, seed, lanes, dataset.digest + negatives_digest, table, clusters)
    if isinstance(batches, NeighboursOptions):
        if batches.table is None:
            neighbours = Neighbours.none(len(dataset))
        else:
            neighbours = open_neighbours(dataset, batches.table, batches.nearest, batches.unknown_ids)
        return dataset, NeighbourOrder(
            batch_size, seed, lanes, dataset.digest + negatives_digest, neighbours.digest, batches.nearest, batches.beside,
            batches.share, neighbours,
        )  # fmt: skip
    if isinstance(dataset, ShardDataset):
        return dataset, make_order(dataset)
    orders = tuple(make_order(source) for source in dataset.sources.values())
    weights = [source.weight or float(len(dataset.sources[name])) for name, source in sources.items()]
    return dataset, MixtureOrder(orders, tuple(weight / sum(weights) for weight in weights), batches)


def make_negatives(options: DataOptions, dataset: ShardDataset | MixtureDataset, seed: int) -> list[MinedNegatives]:
    """Open the tables of `data.negatives`.

    Raises:
        UserError: for a table that does not exist, or belongs to other samples.
    """
    all_names, negatives = iter(options.mined), []
    for table in options.tables_of_negatives:
        names = [next(all_names) for _ in range(table.count)]
        if table.table is None:
            negatives.append(MinedNegatives.none(table.field, names, seed))
        else:
            negatives.append(open_negatives(dataset, table.table, table.field, names, seed, table.unknown_ids))
    return negatives


def use_mined(
    table: Path, options: DataOptions, dataset: ShardDataset | MixtureDataset, order: ExactOrder, sample_ids: np.ndarray
) -> ExactOrder:
    """Let a data set use the negatives of a table that training has mined, wherever the options name no table, and return the
    order with the table's neighbours, if it has neighbours. The table's digest is part of the order's state.

    Args:
        sample_ids: those of the data set.

    Raises:
        UserError: for a table that does not exist, or belongs to other samples.
    """
    dataset.negatives = [
        open_negatives(dataset, str(table), old.field, old.names, old.seed, known=sample_ids) if named.table is None else old
        for named, old in zip(options.tables_of_negatives, dataset.negatives, strict=True)
    ]
    negatives_digest = digest_of_negatives(dataset)
    if isinstance(order, MixtureOrder):
        assert isinstance(dataset, MixtureDataset)
        orders = tuple(
            replace(source_order, data=source.digest + negatives_digest)
            for source_order, source in zip(order.orders, dataset.sources.values(), strict=True)
        )
        return replace(order, orders=orders)
    order = replace(order, data=dataset.digest + negatives_digest)
    batches = options.batches
    if isinstance(order, NeighbourOrder) and isinstance(batches, NeighboursOptions) and batches.table is None:
        neighbours = open_neighbours(dataset, str(table), batches.nearest, known=sample_ids)
        order = replace(order, table=neighbours.digest, neighbours=neighbours)
    return order


def digest_of_negatives(dataset: ShardDataset | MixtureDataset) -> str:
    """Return what the tables of negatives add to the digest of the data."""
    return "".join(f" {negatives.digest}" for negatives in dataset.negatives)


def check_combinations(options: DataOptions, fields: Mapping[str, FieldOptions]) -> None:
    """Check that the options of the data go together.

    Raises:
        UserError: for options that contradict each other.
    """
    several = isinstance(options.train, dict)
    if options.bucket_by and options.bucket_by not in fields:
        raise UserError(f"data.bucket_by: no field {options.bucket_by!r}; {suggestion(options.bucket_by, fields)}")
    if options.bucket_by and several:
        raise UserError("data.bucket_by: steps are brought together by length within one source; there are several")
    if options.clusters and options.bucket_by:
        raise UserError("data.clusters and data.bucket_by: a step is of one cluster, or of one length, not both")
    weighted = [name for name, source in options.train.items() if source.weight] if isinstance(options.train, dict) else []
    if options.clusters and (weighted or options.batches == "single"):
        raise UserError("data.clusters: an epoch shows each sample once, so there are no weights and no data.batches")
    if isinstance(options.batches, NeighboursOptions):
        check_neighbours(options, bool(weighted))
    if options.sequential and options.mined:
        raise UserError("data.negatives: they are read by their ids, from shards that are indexed: no data.sequential")
    if options.sequential and options.held_out:
        raise UserError("data.held_out: which samples are held out is known of shards that are indexed: no data.sequential")
    if options.sequential and options.select:
        raise UserError("data.select: which samples are kept is known of shards that are indexed: no data.sequential")
    if options.sequential and (several or options.clusters or options.bucket_by):
        raise UserError("data.sequential: the order is that of the tars: no several sources, clusters or bucket_by")


def check_neighbours(options: DataOptions, weighted: bool) -> None:
    """Check the options beside batches of neighbours.

    Raises:
        UserError: for options that contradict them.
    """
    if options.clusters:
        raise UserError("data.batches neighbours and data.clusters: a step is of neighbours, or of one cluster, not both")
    if options.bucket_by:
        raise UserError("data.batches neighbours and data.bucket_by: a step is of neighbours, or of one length, not both")
    if weighted:
        raise UserError("data.batches neighbours: an epoch shows each sample once, so data.train takes no weights")
    if options.sequential:
        raise UserError("data.batches neighbours: they are read by their ids, from shards that are indexed: no data.sequential")


def make_source(
    name: str,
    source: SourceOptions,
    fields: Mapping[str, FieldOptions],
    model: ContrastiveModel,
    seed: int,
    without: float | None = None,
    views: Sequence[TeacherView] = (),
    select: str | None = None,
) -> ShardDataset:
    """Open one of several sources, with its own keys and transforms.

    Args:
        without: the share of the samples that is held out, and so left out.
        select: the selection of all sources that have none of their own.

    Raises:
        UserError: for an unknown field.
    """
    modalities = source_modalities(name, source, fields, training_modalities(fields, model))
    keys = {name: field.keys for name, field in fields.items() if field.keys} | source.keys
    part = Part(without, False) if without else None
    check_templates(source.templates, modalities, f"data.train.{name}")
    select = source.select or select
    dataset = ShardDataset(
        source.shards, modalities, keys, seed, True, True, source.files, part, source.templates, views, select
    )
    for field in source.keys.keys() - dataset.keys.keys():
        wanted = " or ".join(names_of(source.keys[field]))
        raise UserError(f"data.train.{name}.keys.{field}: no sample has a member {wanted}")
    return dataset


def source_modalities(
    name: str, source: SourceOptions, fields: Mapping[str, FieldOptions], modalities: Mapping[str, Modality]
) -> dict[str, Modality]:
    """Return the model's modalities with the changes of one of several sources.

    Raises:
        UserError: for an unknown field; for an option that must be that of the model.
    """
    for field in source.keys.keys() | source.modalities.keys():
        if field not in fields:
            raise UserError(f"data.train.{name}: no field {field!r}; {suggestion(field, fields)}")
    modalities = dict(modalities)
    for field, changed in source.modalities.items():
        for option in changed.keys() - modalities[field].of_source:
            allowed = ", ".join(sorted(modalities[field].of_source)) or "none"
            raise UserError(
                f"data.train.{name}.modalities.{field}: {option!r} must be that of the model; a source may have: {allowed}"
            )
        spec, place = fields[field].modality, f"data.train.{name}.modalities.{field}"
        if isinstance(modalities[field], TextModality):
            modalities[field] = changed_modality(place, modalities[field], {"type": "text", **changed})
            continue
        if spec is None:
            raise UserError(
                f"data.train.{name}.modalities.{field}: its modality is that of model.start: say fields.{field}.modality"
            )
        spec = {**({"type": spec} if isinstance(spec, str) else spec), **changed}
        modalities[field] = changed_modality(place, modalities[field], spec)
    return modalities
