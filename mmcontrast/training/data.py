"""From options to the objects of a run: modalities, towers, model, data. What the loop and the evaluation work on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.components import build, suggestion
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
from mmcontrast.modalities import MODALITIES, ImageModality, Modality
from mmcontrast.models import ContrastiveModel
from mmcontrast.models.options import FieldOptions
from mmcontrast.training.options import DataOptions, NeighboursOptions, SourceOptions


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
    """Open shards as `fields` say, or as a mapping of shards says that has `keys` and `files` of its own.

    Args:
        partial: leave out fields of which no sample has a member.
        without: the share of the samples that is held out, and left out here.
        views: what teachers read beside it.

    Raises:
        UserError: for shards that are not there, or lack a field.
    """
    modalities = training_modalities(fields, model) if training else {field: model.modality(field) for field in fields}
    keys = {field: of.keys for field, of in fields.items() if of.keys}
    return open_dataset(shards, modalities, keys, seed=seed, training=training, partial=partial, without=without, views=views)


def training_modalities(fields: Iterable[str], model: ContrastiveModel) -> dict[str, Modality]:
    return {field: model.modality(field).for_training() for field in fields}


def make_training_data(
    options: DataOptions,
    fields: Mapping[str, FieldOptions],
    model: ContrastiveModel,
    batch_size: int,
    seed: int,
    views: Sequence[TeacherView] = (),
) -> tuple[TrainingDataset, TrainingOrder]:
    """The samples and their order: of one set of shards, of several sources, within clusters, beside their neighbours, or
    sequential.

    Raises:
        UserError: for shards, fields, weights or options that do not fit.
    """
    sources = options.train if isinstance(options.train, dict) else {}
    refuse_combinations(options, fields)
    if options.sequential and any(view.keys for view in views):
        raise UserError("train.teacher: embeddings that are stored need shards that are indexed: no data.sequential")
    lanes = options.lanes or max(lanes for lanes in (1, 2, 4, 8, 16, 32, 64) if batch_size % lanes == 0)
    keys = {field: of.keys for field, of in fields.items() if of.keys}
    if options.sequential:
        assert not isinstance(options.train, dict)
        modalities = training_modalities(fields, model)
        return StreamDataset(options.train, modalities, keys, seed, views), StreamOrder(batch_size, seed)

    def order_of(dataset: ShardDataset) -> SampleOrder:
        sizes, by = tuple(len(shard) for shard in dataset.shards), options.bucket_by
        lengths = partial(dataset.lengths, by) if by else None
        return SampleOrder(sizes, batch_size, seed, lanes, options.block, options.window, dataset.digest + more, by, lengths)

    dataset: ShardDataset | MixtureDataset
    if sources:
        common: dict[str, Any] = {"seed": seed, "without": options.held_out, "views": views, "select": options.select}
        opened = {name: make_source(name, source, fields, model, **common) for name, source in sources.items()}
        every = training_modalities(fields, model)
        dataset = MixtureDataset(opened, every, [name for name, source in sources.items() if source.own_ids], views)
    else:
        assert not isinstance(options.train, dict)
        part: dict[str, Any] = {"without": options.held_out, "views": views}
        shards = ShardOptions(shards=options.train, select=options.select)
        dataset = make_dataset(shards, fields, model, seed=seed, training=True, **part)
    dataset.negatives = make_negatives(options, dataset, seed)
    more, batches = digest_of(dataset), options.batches
    if options.clusters:
        clusters, table = clusters_of(dataset, options.clusters)
        return dataset, ClusterOrder(batch_size, seed, lanes, dataset.digest + more, table, clusters)
    if isinstance(batches, NeighboursOptions):
        if batches.table is None:
            neighbours = Neighbours.none(len(dataset))
        else:
            neighbours = open_neighbours(dataset, batches.table, batches.nearest, batches.unknown_ids)
        chosen = batches.nearest, batches.beside, batches.share
        return dataset, NeighbourOrder(batch_size, seed, lanes, dataset.digest + more, neighbours.digest, *chosen, neighbours)
    if isinstance(dataset, ShardDataset):
        return dataset, order_of(dataset)
    orders = tuple(order_of(source) for source in dataset.sources.values())
    weights = [source.weight or float(len(dataset.sources[name])) for name, source in sources.items()]
    return dataset, MixtureOrder(orders, tuple(weight / sum(weights) for weight in weights), batches)


def make_negatives(options: DataOptions, dataset: ShardDataset | MixtureDataset, seed: int) -> list[MinedNegatives]:
    """Open the tables of `data.negatives`.

    Raises:
        UserError: for a table that is not there, or of other samples.
    """
    names, opened = iter(options.mined), []
    for given in options.tables_of_negatives:
        own = [next(names) for _ in range(given.count)]
        if given.table is None:
            opened.append(MinedNegatives.none(given.field, own, seed))
        else:
            opened.append(open_negatives(dataset, given.table, given.field, own, seed, given.unknown_ids))
    return opened


def use_mined(
    table: Path, options: DataOptions, dataset: ShardDataset | MixtureDataset, order: ExactOrder, known: np.ndarray
) -> ExactOrder:
    """Give a data set the negatives of a table that training has mined, wherever the options name none, and return the order
    with its neighbours, if there are such; its digest is part of the order's state.

    Args:
        known: the data set's sample ids.

    Raises:
        UserError: for a table that is not there, or of other samples.
    """
    opened = []
    for given, old in zip(options.tables_of_negatives, dataset.negatives, strict=True):
        renewed = given.table is None
        opened.append(open_negatives(dataset, str(table), old.field, old.names, old.seed, known=known) if renewed else old)
    dataset.negatives = opened
    more = digest_of(dataset)
    if isinstance(order, MixtureOrder):
        assert isinstance(dataset, MixtureDataset)
        sources = dataset.sources.values()
        orders = [replace(one, data=source.digest + more) for one, source in zip(order.orders, sources, strict=True)]
        return replace(order, orders=tuple(orders))
    order = replace(order, data=dataset.digest + more)
    batches = options.batches
    if isinstance(order, NeighbourOrder) and isinstance(batches, NeighboursOptions) and batches.table is None:
        neighbours = open_neighbours(dataset, str(table), batches.nearest, known=known)
        order = replace(order, table=neighbours.digest, neighbours=neighbours, epochs={})
    return order


def digest_of(dataset: ShardDataset | MixtureDataset) -> str:
    """Return what the tables of negatives add to the digest of the data."""
    return "".join(f" {negatives.digest}" for negatives in dataset.negatives)


def refuse_combinations(options: DataOptions, fields: Mapping[str, FieldOptions]) -> None:
    """
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
        refuse_beside_neighbours(options, bool(weighted))
    if options.sequential and options.mined:
        raise UserError("data.negatives: they are read by their ids, from shards that are indexed: no data.sequential")
    if options.sequential and options.held_out:
        raise UserError("data.held_out: which samples are held out is known of shards that are indexed: no data.sequential")
    if options.sequential and options.select:
        raise UserError("data.select: which samples are kept is known of shards that are indexed: no data.sequential")
    if options.sequential and (several or options.clusters or options.bucket_by):
        raise UserError("data.sequential: the order is that of the tars: no several sources, clusters or bucket_by")


def refuse_beside_neighbours(options: DataOptions, weighted: bool) -> None:
    """
    Raises:
        UserError: for what contradicts batches of neighbours.
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
    """One of several sources, with its own keys and transforms; without a share that is held out.

    Args:
        select: the selection of all sources that have none of their own.

    Raises:
        UserError: for a field that there is not.
    """
    modalities = source_modalities(name, source, fields, training_modalities(fields, model))
    keys = {field: of.keys for field, of in fields.items() if of.keys} | source.keys
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
    """The model's modalities, with what one of several sources has otherwise.

    Raises:
        UserError: for a field that there is not; for an option that must be that of the model.
    """
    for field in source.keys.keys() | source.modalities.keys():
        if field not in fields:
            raise UserError(f"data.train.{name}: no field {field!r}; {suggestion(field, fields)}")
    modalities = dict(modalities)
    for field, changed in source.modalities.items():
        for option in changed.keys() - modalities[field].of_source:
            may = ", ".join(sorted(modalities[field].of_source)) or "none"
            raise UserError(
                f"data.train.{name}.modalities.{field}: {option!r} must be that of the model; a source may have: {may}"
            )
        own = fields[field].modality
        if own is None:
            raise UserError(
                f"data.train.{name}.modalities.{field}: its modality is that of model.start: say fields.{field}.modality"
            )
        spec = {**({"type": own} if isinstance(own, str) else own), **changed}
        if spec["type"] == "image" and isinstance(pictures := modalities[field], ImageModality):
            spec = {"background": pictures.background, **spec}
        modalities[field] = build(spec, MODALITIES, f"data.train.{name}.modalities.{field}: modality", Modality)
    return modalities
