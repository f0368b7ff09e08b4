"""`contrastive_loss`: the loss of a pairing and an objective, for any training script."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.components import build
from mmcontrast.objectives.base import Objective
from mmcontrast.objectives.hyperbolic import Hyperbolic
from mmcontrast.objectives.inputs import (
    LossInputs,
    Scalars,
    Teachers,
    all_present,
    check_together,
    extras_by_field,
    ids_by_field,
    own_by_field,
    scalar_of_fields,
    teachers_by_field,
    total_weights,
    values_by_name,
    weights_of,
    widths_of,
)
from mmcontrast.objectives.names import OBJECTIVES, PAIRINGS, SCORES
from mmcontrast.objectives.pairing import Pairing, TermInputs, term_name
from mmcontrast.objectives.signals import WATCHED, signals_of
from mmcontrast.score import score_statistics
from mmcontrast.score.exact import outside_autocast, scalar
from mmcontrast.score.ranks import Communication, Everyone, agreed, exchange, ranks_of_node

LOCAL_NEGATIVES = (
    "contrastive_loss: group=None in one of {} processes: only this process's samples are its negatives. Pass"
    " group=dist.group.WORLD for those of all; if this is meant, ignore the warning with warnings.filterwarnings"
)


@outside_autocast
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
    own_negatives: Mapping[str, Tensor | tuple[Tensor, Tensor]] | None = None,
    sample_weights: Tensor | None = None,
    sample_values: Mapping[str, Tensor] | None = None,
    teacher: Teachers | None = None,
    teacher_scale: float | Sequence[float] = 100.0,
    matryoshka: Sequence[int] | Mapping[int, float] | None = None,
    score: str | Mapping[str, Any] | Hyperbolic | None = None,
    backend: str = "auto",
    tile_size: int | tuple[int, int] | None = None,
    group: dist.ProcessGroup | None = None,
    communication: Communication = "auto",
    signals: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the exact contrastive loss of N samples in any number of fields, in O(N·D) memory, over the ranks of a group.

    It is the (weighted) mean over the pairs of fields (or whatever the pairing scores together) that are not empty of the mean
    over their anchors, in both directions if the objective has two.

    Args:
        embeddings: per field, unit rows [N, D]. Every rank has the same fields; N may differ between ranks, or be 0.
        objective: a name, a mapping like {"type": "siglip"}, or an Objective.
        pairing: a name, a mapping like {"type": "anchor", "field": "image"}, or a Pairing.
        logit_scale: 1/τ, a scalar (tensor or float); or one for each term, {(field, field): scalar}.
        logit_bias: added to every score (SigLIP: −10 at the start), likewise; None: no bias.
        ids: group ids, int64 [N], or one [N] per field. Equal ids are not negatives of each other; −1: the sample
            lacks the field. Default: all samples of all ranks are different, and complete. Ids on the host are checked
            there, without waiting for a GPU.
        sample_ids: int64 [N], unique and stable, for objectives that keep state per sample.
        extra_negatives: per field, more candidates for the anchors of every field it is paired with: [K, D], or with
            group ids ([K, D], [K]).
        own_negatives: per field, candidates of each anchor alone, for the anchors of the fields it is paired with:
            [N, K, D], or with a mask of those that are present ([N, K, D], bool [N, K]).
        sample_weights: [N] ≥ 0, of anchors in the mean, without gradient; the loss is Σ wℓ / Σ w. Default: equal weights.
        sample_values: further numbers of samples, [N] each, for objectives that take them: {"tau_plus": …} of `debiased`.
        teacher: for objectives that learn from another model: its unit rows of the same samples per field, [N, E] of any
            width, without gradient; or several such mappings.
        teacher_scale: its logit scale, or one for each.
        matryoshka: widths of prefixes of the embeddings, (64, 128, 256), or {width: weight}: the loss is the weighted sum of
            the losses of each prefix, normalized again (arXiv:2205.13147). Name the whole width too.
        score: {"type": "lorentz", "curvature": c}: hyperbolic distances instead of cosines; embeddings are then any
            vectors. See `mmcontrast.objectives.Hyperbolic`.
        backend, tile_size, communication: see `score_statistics`.
        group: a torch.distributed group; None: this process alone, with a warning where torch.distributed has several. Every
            rank must call this, and its backward.
        signals: receives, if given, numbers to log, [] each: of every pair "image-text/loss" and "/alignment" (the
            mean squared distance of positives), of every direction those of `signals_of`, "image_to_text/accuracy". Like
            the loss they are to be averaged over the ranks. Costs two more exponentials a score.

    Returns:
        Scalar, fp32 (float64 for float64 embeddings), also within autocast, which does not affect it. With a group, the
        mean over ranks is the loss of the whole batch, and the mean over ranks of the gradients is its gradient, as data
        parallelism takes it.

    Raises:
        ValueError: for shapes, names, ids or options that do not fit; it names the field.
    """
    if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(LOCAL_NEGATIVES.format(dist.get_world_size()), stacklevel=3)  # outside_autocast is between
    group_ids = ids_by_field(embeddings, ids)
    first = next(iter(embeddings.values()))
    scorer: Objective = build(objective, OBJECTIVES, "objective", Objective)
    if scorer.stateful and scorer is not objective:
        raise ValueError(f"objective {objective!r} remembers earlier calls: make a {type(scorer).__name__} once, and pass that")
    pairs: Pairing = build(pairing, PAIRINGS, "pairing", Pairing)
    pairs.check(scorer)
    inputs = LossInputs(
        ids=group_ids,
        sample_ids=None if sample_ids is None else sample_ids.to(first.device, non_blocking=True),
        weights=weights_of(sample_weights, first),
        values=values_by_name(sample_values or {}, scorer, first),
        extras=extras_by_field(embeddings, extra_negatives or {}, with_ids=ids is not None),
        own=own_by_field(embeddings, own_negatives or {}),
        teachers=teachers_by_field(embeddings, teacher, teacher_scale),
    )
    if sample_ids is not None and (sample_ids.shape != (len(first),) or sample_ids.dtype != torch.int64):
        raise ValueError(f"sample_ids must be int64 [{len(first)}], not {sample_ids.dtype} {list(sample_ids.shape)}")
    link: Hyperbolic | None = build(score, SCORES, "score", Hyperbolic)
    check_together(scorer, pairs, inputs, link)
    if link is not None:
        link.check(embeddings)
    options = {"backend": backend, "tile_size": tile_size, "group": group, "communication": communication}
    loss_of = partial(
        _loss, scorer=scorer, pairs=pairs, link=link, logit_scale=logit_scale, logit_bias=logit_bias, options=options
    )
    if matryoshka is None:
        return loss_of(embeddings, inputs, signals=signals)
    if scorer.stateful or link is not None:
        raise ValueError("matryoshka: prefixes need an objective without memory, and cosines")
    losses = []
    for width, weight in widths_of(matryoshka, first).items():
        prefixes = {field: F.normalize(rows[:, :width], dim=1) for field, rows in embeddings.items()}
        watched = signals if width == first.shape[1] else None
        losses.append(weight * loss_of(prefixes, inputs.prefix(width), signals=watched))
    return torch.stack(losses).sum()


def _loss(
    embeddings: Mapping[str, Tensor],
    inputs: LossInputs,
    *,
    scorer: Objective,
    pairs: Pairing,
    link: Hyperbolic | None,
    logit_scale: Scalars,
    logit_bias: Scalars | None,
    options: dict[str, Any],
    signals: dict[str, Tensor] | None,
) -> Tensor:
    """Return the loss of checked inputs."""
    first, group = next(iter(embeddings.values())), options["group"]
    weights = pairs.weighted_terms(list(embeddings))
    terms = [term for term, weight in weights.items() if weight]
    positions = [all_present(inputs.ids, term) for term in terms]
    term_counts = [len(first) if keep is None else len(keep) for keep in positions]
    to_device = partial(torch.Tensor.to, device=first.device, non_blocking=True)
    positions = [None if keep is None else to_device(keep) for keep in positions]
    if inputs.ids is not None:
        inputs = replace(inputs, ids={field: to_device(ids) for field, ids in inputs.ids.items()})
    draw = int(torch.randint(2**62, ())) if pairs.draws else 0
    weighted = int(inputs.weights is not None)
    extras = {field: len(inputs.extras[field][0]) for field in sorted(inputs.extras)}
    # the only exchange of a loss: the sizes of all ranks, and the first rank's draw
    by_rank = exchange([*term_counts, *extras.values(), weighted, draw, ranks_of_node()], group, first.device)
    extra_sizes = {field: [counts[len(term_counts) + k] for counts in by_rank] for k, field in enumerate(extras)}
    any_weighted = any(counts[-3] for counts in by_rank)
    totals = total_weights(inputs.weights, positions, term_counts, group, first.device) if any_weighted else None
    within = agreed([counts[-1] for counts in by_rank])
    reductions = tuple(dict.fromkeys((*scorer.reductions, *(WATCHED if signals is not None else ()))))
    dtype = torch.promote_types(first.dtype, torch.float32)

    loss, total_weight = torch.zeros((), device=first.device), 0.0
    for number, (term, keep) in enumerate(zip(terms, positions, strict=True)):
        sizes = [counts[number] for counts in by_rank]
        if sum(sizes) == 0 or (totals is not None and totals[number] == 0):
            continue
        rows = {field: embeddings[field] if keep is None else embeddings[field][keep] for field in term}
        of_term = inputs.of_term(term, keep)
        scale = scalar_of_fields(logit_scale, term, "logit_scale")
        bias = scalar_of_fields(logit_bias, term, "logit_bias")
        assert scale is not None
        everyone = Everyone(group, sizes)
        scale, bias = scalar(scale, dtype, first.device), None if bias is None else scalar(bias, dtype, first.device)
        term_inputs = TermInputs(
            rows=rows,
            ids=None if of_term.ids is None else of_term.ids[term[0]],
            sample_ids=of_term.sample_ids,
            given=of_term.values,
            extras=of_term.extras,
            own=of_term.own,
            teachers=of_term.teachers,
            sizes=sizes,
            extra_sizes=extra_sizes,
            draw=by_rank[0][-2],
            group=group,
            everyone=everyone,
            scale=partial(scorer.anchor_scale, scale=scale, sample_ids=of_term.sample_ids, everyone=everyone),
            bias=0.0 if bias is None else bias,
            reductions=reductions,
            both=scorer.both_directions or signals is not None,
            link=link,
            margin=scorer.false_negative_margin,
            guided=scorer.guided,
            statistics=partial(
                score_statistics,
                reductions=reductions,
                bias=bias,
                link=link,
                sizes=[(size, size) for size in sizes],
                within=within,
                **options,
            ),
        )
        share = len(sizes) / sum(sizes)  # the weight of an anchor in the mean over all ranks
        weigh = partial(_weighted_sum, weights=of_term.weights, share=share if totals is None else len(sizes) / totals[number])
        losses: list[Tensor] = []
        for index, direction in enumerate(pairs.directions(term_inputs)):
            if scorer.both_directions or len(term) > 2 or not direction.name.startswith(f"{term[1]}_to_"):
                losses.append(weigh(scorer(direction)))
            if signals is not None:
                if len(term) == 2 and index == 0:
                    similarity = (direction.positives.detach() - term_inputs.bias) / direction.scale
                    distance = 2.0 - 2.0 * similarity if link is None else similarity.square()
                    signals[f"{term_name(term)}/alignment"] = distance.sum().detach() * share
                signals |= {f"{direction.name}/{name}": number for name, number in signals_of(direction, share).items()}
        value = torch.stack(losses).mean()
        penalty = None if link is None else link.penalty(rows)
        if penalty is not None:
            value = value + weigh(penalty)
        if signals is not None:
            signals[f"{term_name(term)}/loss"] = value.detach()
        loss, total_weight = loss + weights[term] * value, total_weight + weights[term]
    if total_weight < sum(weights.values()) or len(terms) < len(weights):  # data parallelism expects all to take part
        loss = loss + sum(_zero(value, dtype) for value in (*embeddings.values(), logit_scale, logit_bias))
    return loss / (total_weight or 1.0)


def _zero(value: Any, dtype: torch.dtype) -> Tensor | float:
    """Return 0 with a gradient of 0 to a tensor, or to those of a mapping, whatever they hold."""
    if isinstance(value, Mapping):
        return sum(_zero(each, dtype) for each in value.values())
    return value.reshape(-1)[:0].sum(dtype=dtype) if isinstance(value, Tensor) else 0.0


def _weighted_sum(losses: Tensor, weights: Tensor | None, share: float) -> Tensor:
    """Sum the losses of this rank's anchors, so that the mean over the ranks is the mean over all anchors."""
    return (losses if weights is None else losses * weights).sum() * share
