"""What `contrastive_loss` is given, checked: fields, ids, extra negatives, scales."""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from mmcontrast.types import ABSENT

NO_GROUP = -2  # the id of extra negatives of nobody's group
Scalars = Tensor | float | Mapping[Any, Tensor | float]  # by tuples of fields


def ids_by_field(embeddings: Mapping[str, Tensor], ids: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Group ids [N] of every field.

    Raises:
        ValueError: for embeddings or ids that do not fit; it names the field.
    """
    if len(embeddings) < 2:
        raise ValueError(f"a contrastive loss needs two fields at least, not {list(embeddings)}")
    first, reference = next(iter(embeddings.items()))
    for field, rows in embeddings.items():
        if rows.dim() != 2 or rows.shape != reference.shape or rows.dtype != reference.dtype:
            raise ValueError(
                f"field {field!r} is {tuple(rows.shape)} {rows.dtype}, field {first!r} {tuple(reference.shape)}"
                f" {reference.dtype}: all fields are [N, D] of one dtype, absent samples marked by an id of −1"
            )
        if not rows.is_floating_point():
            raise ValueError(f"field {field!r} is {rows.dtype}: embeddings are floating point")
    if ids is None:
        return None
    given = dict.fromkeys(embeddings, ids) if isinstance(ids, Tensor) else dict(ids)
    for field, values in given.items():
        if field not in embeddings:
            raise ValueError(f"ids names a field {field!r} that embeddings lack; they have {', '.join(embeddings)}")
        if values.dtype != torch.int64 or values.shape != reference.shape[:1]:
            raise ValueError(
                f"ids of field {field!r} must be int64 [{len(reference)}], not {values.dtype} {tuple(values.shape)}"
            )
    stacked = torch.stack(list(given.values()))
    owner = stacked.amax(0)
    if ((stacked != ABSENT) & ((stacked != owner) | (stacked < 0))).any():
        raise ValueError("ids: a group id is ≥ 0, or −1 where a sample lacks the field, and a sample has one id in all fields")
    if len(given) < len(embeddings) and (owner == ABSENT).any():
        raise ValueError(f"ids: name every field, as some sample lacks all of {', '.join(given)}")
    return {field: given.get(field, owner) for field in embeddings}


def all_present(ids_of: Mapping[str, Tensor] | None, fields: Sequence[str]) -> Tensor | None:
    """bool [N], who has all of some fields; None if everybody has."""
    if ids_of is None:
        return None
    keep = torch.stack([ids_of[field] != ABSENT for field in fields]).all(0)
    return None if keep.all() else keep


def of_term(value: Scalars | None, fields: Sequence[str], name: str) -> Tensor | float | None:
    """The scale or bias of some fields that are scored together, named in any order.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(value, Mapping):
        return value
    for order in permutations(fields):
        if order in value:
            return value[order]
    raise ValueError(f"{name} has no entry for {tuple(fields)}")


def extras_by_field(
    embeddings: Mapping[str, Tensor], extra_negatives: Mapping[str, Tensor | tuple[Tensor, Tensor]], with_ids: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per field, (rows [K, D], group ids [K]).

    Raises:
        ValueError: for rows or ids that do not fit; it names the field.
    """
    extras = {}
    for field, given in extra_negatives.items():
        rows, ids = given if isinstance(given, Sequence) else (given, None)
        if field not in embeddings:
            raise ValueError(f"extra_negatives names a field {field!r} that embeddings lack")
        if rows.dim() != 2 or rows.shape[1:] != embeddings[field].shape[1:] or rows.dtype != embeddings[field].dtype:
            raise ValueError(
                f"extra_negatives of field {field!r} are {tuple(rows.shape)} {rows.dtype}, its embeddings"
                f" {tuple(embeddings[field].shape)} {embeddings[field].dtype}"
            )
        if ids is None:
            ids = torch.full((len(rows),), NO_GROUP, device=rows.device)
        elif ids.shape != rows.shape[:1] or ids.dtype != torch.int64:
            raise ValueError(f"extra_negatives of field {field!r}: ids must be int64 [{len(rows)}]")
        elif not with_ids:
            raise ValueError(f"extra_negatives of field {field!r} have ids, the samples have none: pass ids")
        extras[field] = (rows, ids)
    return extras
