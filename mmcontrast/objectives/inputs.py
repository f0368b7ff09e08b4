"""Check the inputs of `contrastive_loss`: fields, ids, scales, weights, teachers, extra and own negatives."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.objectives.base import Objective
from mmcontrast.objectives.pairing import Pairing
from mmcontrast.score import CrossSum
from mmcontrast.types import ABSENT

Teachers = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
NO_GROUP = -2  # the id of extra negatives that belong to no group
Scalars = Tensor | float | Mapping[Any, Tensor | float]  # by tuples of fields


@dataclass(frozen=True)
class LossInputs:
    """The checked inputs of `contrastive_loss` beside the embeddings.

    Attributes:
        ids: group ids [N] of every field; None: all different. sample_ids: int64 [N]. weights, values: [N] of samples.
        extras: per field, ([K, D], group ids [K]). own: per field, ([N, K, D], present [N, K]).
        teachers: of each teacher, ([N, E] per field, its scale).
    """

    ids: Mapping[str, Tensor] | None = None
    sample_ids: Tensor | None = None
    weights: Tensor | None = None
    values: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    own: Mapping[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    teachers: Sequence[tuple[Mapping[str, Tensor], float]] = ()

    def of_term(self, term: Sequence[str], keep: Tensor | None) -> "LossInputs":
        """Return the inputs of a term's fields, for the samples at the positions `keep`; None: for all.

        Raises:
            ValueError: if a teacher lacks a field.
        """

        def select(rows: Tensor) -> Tensor:
            return rows if keep is None else rows[keep]

        for rows, _ in self.teachers:
            if missing := [field for field in term if field not in rows]:
                raise ValueError(f"teacher lacks the field {missing[0]!r}, which is scored with {', '.join(term)}")
        return LossInputs(
            ids=None if self.ids is None else {field: select(self.ids[field]) for field in term},
            sample_ids=None if self.sample_ids is None else select(self.sample_ids),
            weights=None if self.weights is None else select(self.weights),
            values={name: select(values) for name, values in self.values.items()},
            extras={field: self.extras[field] for field in term if field in self.extras},
            own={field: (select(self.own[field][0]), select(self.own[field][1])) for field in term if field in self.own},
            teachers=[({field: select(rows[field]) for field in term}, scale) for rows, scale in self.teachers],
        )

    def prefix(self, width: int) -> "LossInputs":
        """Return the inputs with the first `width` numbers of all candidates, normalized."""

        def cut(candidates: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
            return {field: (F.normalize(rows[..., :width], dim=-1), other) for field, (rows, other) in candidates.items()}

        return replace(self, extras=cut(self.extras), own=cut(self.own))


def check_together(objective: Objective, pairing: Pairing, inputs: LossInputs, link: Any) -> None:
    """Check that the objective, the pairing, the inputs and the score go together.

    Raises:
        ValueError: if they do not; it says why.
    """
    name = type(objective).__name__
    distills = any(isinstance(reduction, CrossSum) for reduction in objective.reductions)
    if objective.teachers and not inputs.teachers:
        raise ValueError(f"{name} learns from a teacher: pass its embeddings as teacher")
    if inputs.teachers and not objective.teachers:
        raise ValueError(f"{name} takes no teacher: leave it out, or use objective distillation")
    if distills and (inputs.extras or inputs.own or pairing.same_field):
        raise ValueError(
            f"{name}: the teacher's softmax is over the candidates that it has embeddings of: extra_negatives, own_negatives"
            " and same_field are not among them"
        )
    if objective.guided and (inputs.extras or inputs.own):
        raise ValueError(f"{name}: the guide has no embeddings of extra_negatives and own_negatives: leave them or guide out")
    pairwise = {
        "teacher": inputs.teachers,
        "own_negatives": inputs.own,
        "false_negative_margin": objective.false_negative_margin,
    }
    for option, value in pairwise.items():
        if not pairing.takes_extra_negatives and value not in (None, [], {}):
            raise ValueError(f"{option} concerns scores of two fields: pairing multilinear takes none")
    check_link(objective, pairing, link)


def check_link(objective: Objective, pairing: Pairing, link: Any) -> None:
    """Check that the objective and the pairing can use other scores than cosines, if there is a link.

    Raises:
        ValueError: if they cannot.
    """
    if link is not None and not pairing.takes_extra_negatives:
        raise ValueError("score concerns scores of two fields: pairing multilinear takes none")
    if link is not None and objective.of_cosines:
        raise ValueError(f"{type(objective).__name__} is a formula of cosines: leave score out, or take another objective")


def ids_by_field(embeddings: Mapping[str, Tensor], ids: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return group ids [N] of every field, None without ids.

    Raises:
        ValueError: for embeddings or ids that do not fit; it names the field.
    """
    if not isinstance(embeddings, Mapping) or not all(isinstance(rows, Tensor) for rows in embeddings.values()):
        raise ValueError("embeddings are tensors by field: {'image': [N, D], 'text': [N, D]}")
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
    ids_of = dict(ids) if isinstance(ids, Mapping) else dict.fromkeys(embeddings, ids)
    for field, values in ids_of.items():
        if not isinstance(values, Tensor):
            raise ValueError(f"ids of field {field!r} must be an int64 tensor [{len(reference)}], not {type(values).__name__}")
        if field not in embeddings:
            raise ValueError(f"ids names a field {field!r} that embeddings lack; they have {', '.join(embeddings)}")
        if values.dtype != torch.int64 or values.shape != reference.shape[:1]:
            raise ValueError(
                f"ids of field {field!r} must be int64 [{len(reference)}], not {values.dtype} {tuple(values.shape)}"
            )
    stacked = torch.stack(list(ids_of.values()))
    sample_group = stacked.amax(0)
    if ((stacked != ABSENT) & ((stacked != sample_group) | (stacked < 0))).any():
        raise ValueError("ids: a group id is ≥ 0, or −1 where a sample lacks the field, and a sample has one id in all fields")
    if len(ids_of) < len(embeddings) and (sample_group == ABSENT).any():
        raise ValueError(f"ids: name every field, as some sample lacks all of {', '.join(ids_of)}")
    return {field: ids_of.get(field, sample_group) for field in embeddings}


def all_present(ids_of: Mapping[str, Tensor] | None, fields: Sequence[str]) -> Tensor | None:
    """Return the positions of the samples that have all of some fields; None if all samples have."""
    if ids_of is None:
        return None
    keep = torch.stack([ids_of[field] != ABSENT for field in fields]).all(0)
    return None if keep.all() else keep.nonzero().squeeze(1)


def scalar_of_fields(value: Scalars | None, fields: Sequence[str], name: str) -> Tensor | float | None:
    """Return the scale or bias of fields that are scored together, which may be named in any order.

    Raises:
        ValueError: if there is no entry for them.
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
    """Return extra negatives per field, (rows [K, D], group ids [K]).

    Raises:
        ValueError: for rows or ids that do not fit; it names the field.
    """
    extras = {}
    for field, negatives in extra_negatives.items():
        rows, ids = negatives if isinstance(negatives, Sequence) else (negatives, None)
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


def widths_of(matryoshka: Sequence[int] | Mapping[int, float], embeddings: Tensor) -> dict[int, float]:
    """Return the weight of each width.

    Raises:
        ValueError: for a width that the embeddings do not have.
    """
    widths = dict(matryoshka) if isinstance(matryoshka, Mapping) else dict.fromkeys(matryoshka, 1.0)
    for width in widths:
        if not 1 <= width <= embeddings.shape[1]:
            raise ValueError(f"matryoshka: width {width} of embeddings of width {embeddings.shape[1]}")
    if not widths:
        raise ValueError("matryoshka: no width is named")
    return widths


def total_weights(
    weights: Tensor | None,
    kept: Sequence[Tensor | None],
    counts: Sequence[int],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> list[float]:
    """Return the sum over all ranks of the weights of each term's samples; on a rank without weights each weight is 1."""
    if weights is None:
        sums = torch.tensor(counts, dtype=torch.float64, device=device)
    else:
        sums = torch.stack([(weights if keep is None else weights[keep]).sum(dtype=torch.float64) for keep in kept])
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums.tolist()


def values_by_name(sample_values: Mapping[str, Tensor], objective: Objective, embeddings: Tensor) -> dict[str, Tensor]:
    """Return values [N] of samples by name, without gradient.

    Raises:
        ValueError: for values that the objective does not take, or that are not [N].
    """
    for name, values in sample_values.items():
        if name not in objective.sample_values:
            names = ", ".join(objective.sample_values) or "none"
            raise ValueError(f"{type(objective).__name__} takes no sample_values {name!r}: it takes {names}")
        if values.shape != embeddings.shape[:1] or not values.is_floating_point():
            raise ValueError(f"sample_values {name!r} is {tuple(values.shape)} {values.dtype}, it must be [{len(embeddings)}]")
    return {name: values.detach().to(embeddings.device, non_blocking=True) for name, values in sample_values.items()}


def weights_of(sample_weights: Tensor | None, embeddings: Tensor) -> Tensor | None:
    """Return the weights [N] of samples in the loss's dtype.

    Raises:
        ValueError: for weights that are not [N] and at least 0.
    """
    if sample_weights is None:
        return None
    weights = sample_weights.detach().to(torch.promote_types(embeddings.dtype, torch.float32))
    if weights.shape != embeddings.shape[:1]:
        raise ValueError(f"sample_weights is {tuple(weights.shape)}, it must be [{len(embeddings)}], one a sample")
    if not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError("sample_weights: a weight is a finite number, at least 0")
    return weights.to(embeddings.device, non_blocking=True)


def teachers_by_field(
    embeddings: Mapping[str, Tensor], teacher: Teachers | None, teacher_scale: float | Sequence[float]
) -> list[tuple[Mapping[str, Tensor], float]]:
    """Return each teacher's embeddings per field, [N, E], with its scale.

    Raises:
        ValueError: for fields, rows or scales that do not fit.
    """
    if teacher is None:
        teachers: list[Mapping[str, Tensor]] = []
    else:
        teachers = [teacher] if isinstance(teacher, Mapping) else list(teacher)
    scales = list(teacher_scale) if isinstance(teacher_scale, Sequence) else [float(teacher_scale)] * len(teachers)
    if teachers and len(scales) != len(teachers):
        raise ValueError(f"teacher_scale has {len(scales)} entries for {len(teachers)} teachers")
    for rows_of in teachers:
        for field, rows in rows_of.items():
            if field not in embeddings:
                raise ValueError(f"teacher names a field {field!r} that embeddings lack; they have {', '.join(embeddings)}")
            if rows.dim() != 2 or len(rows) != len(embeddings[field]) or not rows.is_floating_point():
                raise ValueError(
                    f"teacher's field {field!r} is {tuple(rows.shape)} {rows.dtype}, it must be [{len(embeddings[field])}, E]"
                )
    return list(zip(teachers, scales, strict=False))


def own_by_field(
    embeddings: Mapping[str, Tensor], own_negatives: Mapping[str, Tensor | tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each anchor's own candidates per field, ([N, K, D], present [N, K]).

    Raises:
        ValueError: for candidates that do not fit; it names the field.
    """
    own = {}
    for field, negatives in own_negatives.items():
        rows, present = negatives if isinstance(negatives, Sequence) else (negatives, None)
        if field not in embeddings:
            raise ValueError(f"own_negatives names a field {field!r} that embeddings lack")
        (n, d), dtype = embeddings[field].shape, embeddings[field].dtype
        if rows.dim() != 3 or (rows.shape[0], rows.shape[2]) != (n, d) or rows.dtype != dtype:
            raise ValueError(
                f"own_negatives of field {field!r} are {tuple(rows.shape)} {rows.dtype}, they must be [{n}, K, {d}] {dtype}"
            )
        present = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device) if present is None else present
        if present.shape != rows.shape[:2] or present.dtype != torch.bool:
            raise ValueError(f"own_negatives of field {field!r}: which are there must be bool {tuple(rows.shape[:2])}")
        own[field] = rows, present
    return own
