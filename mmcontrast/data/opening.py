"""Shards opened as options name them: patterns, or a mapping with columns and files of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmcontrast.components import nearest
from mmcontrast.data.dataset import ShardDataset
from mmcontrast.errors import UserError
from mmcontrast.modalities import Modality
from mmcontrast.options import ShardOptions, Shards


def open_dataset(
    shards: Shards | dict[str, Any],
    modalities: Mapping[str, Modality],
    keys: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
    training: bool = False,
    partial: bool = False,
) -> ShardDataset:
    """Open shards.

    Args:
        shards: patterns; or a mapping of `shards`, `keys` and `files`.
        keys: of fields, for shards that do not say otherwise.
        modalities, seed, training, partial: as `ShardDataset`.

    Raises:
        UserError: for shards that are not there; for keys of no field, or that no sample has.
    """
    given = ShardOptions.of(shards)
    for field in given.keys:
        if field not in modalities:
            raise UserError(f"{given.shards}: keys of a field {field!r}; {nearest(field, modalities)}")
    dataset = ShardDataset(given.shards, modalities, {**keys, **given.keys}, seed, training, partial, given.files)
    for field, wanted in given.keys.items():
        if wanted and not set(wanted) & set(dataset.keys.get(field, ())):
            have = ", ".join(sorted({extension for shard in dataset.shards for extension in shard.extensions}))
            raise UserError(
                f"{given.shards}: keys of the field {field!r}: no sample has {' or '.join(wanted)}; they have {have}"
            )
    return dataset
