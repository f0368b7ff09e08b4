"""Pairing × objective → one loss: the public function that drops into any training script."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcontrast.components import build
from mmcontrast.objectives.base import Objective
from mmcontrast.objectives.names import OBJECTIVES, PAIRINGS
from mmcontrast.objectives.pairing import Pairing, pair_name
from mmcontrast.objectives.signals import WATCHED, signals_of
from mmcontrast.score import Direction, Reduction, score_statistics
from mmcontrast.score.ranks import Communication, exchange
from mmcontrast.types import ABSENT

Scalars = Tensor | float | Mapping[tuple[str, str], Tensor | float]
NO_GROUP, UNGROUPED = -2, -3  # ids of extra negatives of nobody's group, and of rows where nobody gave ids


def contrastive_loss(
    embeddings: Mapping[str, Tensor],
    *,
    objective: str | Mapping[str, Any] | Objective = "infonce",
    pairing: str | Mapping[str, Any] | Pairing = "all_pairs",
    logit_scale: Scalars,
    logit_bias: Scalars | None = None,
    ids: Tensor | Mapping[str, Tensor] | None = None,
    sample_ids: Tensor | None = None,
    extra_negatives: Mapping[str, Tensor | tuple[Tensor, Tensor]] | None = None,
    backend: str = "auto",
    tile_size: int | tuple[int, int] | None = None,
    group: dist.ProcessGroup | None = None,
    communication: Communication = "ring",
    signals: dict[str, Tensor] | None = None,
) -> Tensor:
    """The contrastive loss of N samples in any number of fields, in O(N·D) memory, exact, over the ranks of a group.

    The (weighted) mean over the pairs of fields that are not empty of the mean over their anchors, of both directions where
    the objective has two.

    Args:
        embeddings: per field, unit rows [N, D]. Every rank has the same fields; N may differ between ranks, or be 0.
        objective: a name, a mapping like {"type": "siglip"}, or an Objective.
        pairing: a name, a mapping like {"type": "anchor", "field": "image"}, or a Pairing.
        logit_scale: 1/τ, a scalar (tensor or float); or one for each pair, {(field, field): scalar}.
        logit_bias: added to every score (SigLIP: −10 at the start), likewise; None: no bias.
        ids: group ids, int64 [N], or one [N] per field. Equal ids are not negatives of each other; −1: the sample
            lacks the field. Default: all samples of all ranks are different, and complete.
        sample_ids: int64 [N], unique and stable, for objectives that keep state per sample.
        extra_negatives: per field, more candidates for the anchors of every field it is paired with: [K, D], or with
            group ids ([K, D], [K]).
        backend, tile_size, communication: see `score_statistics`.
        group: a torch.distributed group; None: this process alone. Every rank must call this, and its backward.
        signals: filled, if given, with numbers to watch, [] each: of every pair "image-text/loss" and "/alignment" (the
            mean squared distance of positives), of every direction what `signals_of` says, "image_to_text/accuracy". Like
            the loss they are to be averaged over the ranks. Costs two more exponentials a score.

    Returns:
        Scalar, fp32 (float64 for float64 embeddings). With a group, the mean over ranks is the loss of the whole
        batch, and the mean over ranks of the gradients is its gradient, as data parallelism takes it.

    Raises:
        ValueError: for shapes, names, ids or options that do not fit; it names the field.
    """
    scorer: Objective = build(objective, OBJECTIVES, "objective")
    ids_of = _ids_by_field(embeddings, ids)
    extras = _extras(embeddings, extra_negatives or {}, with_ids=ids is not None)
    if sample_ids is not None and len(sample_ids) != len(next(iter(embeddings.values()))):
        raise ValueError(f"sample_ids has {len(sample_ids)} entries for {len(next(iter(embeddings.values())))} samples")

    weights = build(pairing, PAIRINGS, "pairing").weighted_pairs(list(embeddings))
    pairs = [pair for pair, weight in weights.items() if weight]
    reductions = tuple(dict.fromkeys((*scorer.reductions, *(WATCHED if signals is not None else ()))))
    kept = {pair: _both_present(ids_of, *pair) for pair in pairs}
    device = next(iter(embeddings.values())).device
    local = [len(embeddings[a]) if (keep := kept[a, b]) is None else int(keep.sum()) for a, b in pairs]
    total = [sum(counts) for counts in zip(*exchange(local, group, device), strict=True)]
    ranks = 1 if group is None else dist.get_world_size(group)
    options: dict[str, Any] = {"backend": backend, "tile_size": tile_size, "group": group, "communication": communication}

    loss, total_weight = torch.zeros((), device=device), 0.0
    for (a, b), anchors in zip(pairs, total, strict=True):
        if anchors == 0:
            continue
        keep = kept[a, b]
        x, y = (embeddings[f] if keep is None else embeddings[f][keep] for f in (a, b))
        group_ids, samples = (
            t if t is None or keep is None else t[keep] for t in (None if ids_of is None else ids_of[a], sample_ids)
        )
        options["scale"] = _of_pair(logit_scale, a, b, "logit_scale")
        options["bias"] = _of_pair(logit_bias, a, b, "logit_bias")
        both = scorer.both_directions or signals is not None
        directions = score_statistics(x, y, reductions, ids=group_ids, columns=both, **options)
        share = ranks / anchors  # of an anchor in the mean over all ranks
        terms: list[Tensor] = []
        seen: dict[str, Tensor] = {}
        for direction, own, here, others in zip(directions, (x, y), (a, b), (b, a), strict=True):
            if direction is None:
                continue
            direction = replace(direction, sample_ids=samples)
            if others in extras:
                direction = direction.with_more(_further(own, group_ids, *extras[others], reductions, options))
            if here == a or scorer.both_directions:
                terms.append(scorer(direction).sum() * share)
            if signals is not None:
                seen |= {f"{here}_to_{others}/{name}": value.sum() * share for name, value in signals_of(direction).items()}
        term = torch.stack(terms).mean()
        if signals is not None:
            cosines = (
                (directions[0].positives - (0.0 if options["bias"] is None else options["bias"])) / directions[0].scale
            ).detach()
            seen |= {f"{pair_name(a, b)}/loss": term, f"{pair_name(a, b)}/alignment": (2.0 - 2.0 * cosines).sum() * share}
            signals.update({name: value.detach() for name, value in seen.items()})
        loss, total_weight = loss + weights[a, b] * term, total_weight + weights[a, b]
    if total_weight < sum(weights.values()) or len(pairs) < len(weights):  # all take part, as data parallelism expects
        loss = loss + sum(e.sum(dtype=torch.promote_types(e.dtype, torch.float32)) for e in embeddings.values()) * 0.0
    return loss / (total_weight or 1.0)


def _further(
    rows: Tensor,
    group_ids: Tensor | None,
    more: Tensor,
    more_ids: Tensor,
    reductions: Sequence[Reduction],
    options: Mapping[str, Any],
) -> Direction:
    """The rows' statistics against extra negatives."""
    ids = more_ids.new_full((len(rows),), UNGROUPED) if group_ids is None else group_ids
    return score_statistics(rows, more, reductions, ids=ids, column_ids=more_ids, paired=False, columns=False, **options)[0]


def _ids_by_field(embeddings: Mapping[str, Tensor], ids: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Group ids [N] of every field, checked."""
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


def _both_present(ids_of: dict[str, Tensor] | None, a: str, b: str) -> Tensor | None:
    """bool [N], or None if everybody has both fields."""
    if ids_of is None:
        return None
    keep = (ids_of[a] != ABSENT) & (ids_of[b] != ABSENT)
    return None if keep.all() else keep


def _of_pair(value: Scalars | None, a: str, b: str, name: str) -> Tensor | float | None:
    if not isinstance(value, Mapping):
        return value
    for pair in ((a, b), (b, a)):
        if pair in value:
            return value[pair]
    raise ValueError(f"{name} has no entry for the pair ({a!r}, {b!r})")


def _extras(
    embeddings: Mapping[str, Tensor], extra_negatives: Mapping[str, Tensor | tuple[Tensor, Tensor]], with_ids: bool
) -> dict[str, tuple[Tensor, Tensor]]:
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
