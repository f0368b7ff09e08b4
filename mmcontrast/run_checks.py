"""Check the parts of a run's config against each other, and against its model."""

import torch

from mmcontrast.components import build, suggestion
from mmcontrast.config import RunConfig
from mmcontrast.errors import UserError
from mmcontrast.libraries import tell
from mmcontrast.modalities import ImageModality
from mmcontrast.models import (
    ContrastiveModel,
    FieldOptions,
    make_modalities,
)
from mmcontrast.objectives import OBJECTIVES, PAIRINGS, Hyperbolic, Objective, Pairing
from mmcontrast.objectives.inputs import LossInputs, check_link, check_together


def check_components_ahead(config: RunConfig) -> None:
    """Check the components of a config before its model is there. With `model.start`, whose fields are the model's, these are
    the objective and the pairing, each by itself.

    Raises:
        UserError: as `check_components`.
    """
    if config.model.starts:
        build(config.objective, OBJECTIVES, "objective", Objective)
        build(config.pairing, PAIRINGS, "pairing", Pairing)
    else:
        check_components(config)


def check_components(config: RunConfig) -> tuple[Objective, Pairing]:
    """Build the objective and the pairing, and check them and the modalities before anything large is made.

    Raises:
        UserError: for an unknown type or option.
    """
    make_modalities(config.fields)
    objective = build(config.objective, OBJECTIVES, "objective", Objective)
    pairing = build(config.pairing, PAIRINGS, "pairing", Pairing)
    negatives = negative_fields(config)
    try:
        terms = pairing.weighted_terms(list(contrasted_fields(config)))
        pairing.check(objective)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.model.scale_per_pair and any(len(term) > 2 for term in terms):
        raise UserError("model.scale_per_pair: the pairing scores more than two fields at once; leave it false")
    check_teaching(config, objective, pairing)
    check_score(config, objective, pairing)
    if not pairing.takes_extra_negatives and (negatives or config.train.queue_size):
        options = [f"fields.{field}.negative_of" for field in negatives if field not in config.data.mined]
        options += ["data.negatives"] if config.data.mined else []
        options += ["train.queue_size"]
        raise UserError(
            f"{options[0]}: a product needs a partner in every other field, so pairing multilinear takes no more negatives"
        )
    return objective, pairing


def check_score(config: RunConfig, objective: Objective, pairing: Pairing) -> None:
    """Check that a hyperbolic score goes with the fields, the objective and the pairing.

    Raises:
        UserError: for a general field that is not contrasted; for an option that needs cosines.
    """
    if (score := score_of(config)) is None:
        return
    try:
        score.check(list(contrasted_fields(config)))
        check_link(objective, pairing, score)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.train.matryoshka:
        raise UserError("train.matryoshka: prefixes are of cosines, and score is hyperbolic: leave out one of the two")


def score_of(config: RunConfig) -> Hyperbolic | None:
    """Return how the loss scores two embeddings; None: by their cosine."""
    score = config.score
    return None if score is None else Hyperbolic(score.curvature, score.general, score.entailment)


def check_teaching(config: RunConfig, objective: Objective, pairing: Pairing) -> None:
    """Check that the teachers go with the objective and the pairing.

    Raises:
        UserError: for an objective without the teacher that it needs, a teacher without an objective that takes one, or options
            that do not go with a teacher.
    """
    teachers = config.train.teachers
    if objective.teachers and not teachers:
        raise UserError(f"objective {type(objective).__name__} learns from a teacher: name a model in train.teacher")
    if teachers and not objective.teachers:
        raise UserError(
            f"train.teacher: objective {type(objective).__name__} takes no teacher: set objective: {{type: distillation}}, or"
            " leave train.teacher out"
        )
    if objective.guided and len(teachers) > 1:
        raise UserError(f"train.teacher: a guide is one model, there are {len(teachers)}")
    if teachers:
        names = [*negative_fields(config).values(), *(["queue"] if config.train.queue_size else [])]
        extras = dict.fromkeys(names, (torch.empty(0, 1), torch.empty(0)))
        try:
            check_together(objective, pairing, LossInputs(extras=extras, teachers=[({}, 1.0)]), None)
        except ValueError as error:
            hint = " (train.queue_size and negative_of make extra_negatives)" if extras else ""
            raise UserError(f"train.teacher: {error}{hint}") from error


def check_widths(config: RunConfig, model: ContrastiveModel, objective: Objective) -> None:
    """Check the widths of `train.matryoshka`.

    Raises:
        UserError: for widths that the embeddings do not have, or without the whole width; for an objective with a memory of
            embeddings.
    """
    widths = config.train.matryoshka
    if widths is None:
        return
    if objective.stateful:
        raise UserError(f"train.matryoshka: objective {type(objective).__name__} remembers one embedding of each sample")
    if max(widths) != model.embed_dim:
        raise UserError(
            f"train.matryoshka: its largest width is {max(widths)}, that of the embeddings {model.embed_dim}: it must be one of"
            " them, as what lies beyond would not learn"
        )


def tell_of_normalisation(config: RunConfig, model: ContrastiveModel) -> None:
    """Warn of pictures that are normalised by the default, where the pretrained weights of their tower had another mean."""
    for name, field in config.fields.items():
        spec, tower, modality = field.modality, config.towers.get(field.tower or ""), model.modality(name)
        if not isinstance(tower, dict) or not tower.get("pretrained") or not isinstance(modality, ImageModality):
            continue
        network = getattr(model.towers[str(field.tower)], "network", None)
        published = getattr(network, "pretrained_cfg", None) or getattr(network, "preprocess_cfg", None) or {}
        mean, std = published.get("mean"), published.get("std")
        if mean and std and "mean" not in (spec or {}) and [*mean] != modality.mean and len(mean) == modality.channels:
            tell(
                f"fields.{name}.modality: pictures are normalised by mean 0.5 and std 0.5, the weights of towers.{field.tower}"
                f" had mean {[*mean]} and std {[*std]}: set them"
            )


def check_bridge(config: RunConfig, model: ContrastiveModel) -> None:
    """Check the fields and the score of `train.bridge`.

    Raises:
        UserError: for a bridge of fields that are not contrasted, or of hyperbolic scores.
    """
    if (bridge := config.train.bridge) is None:
        return
    fields = list(contrasted_fields(config))
    for field in [bridge.through, *(field for pair in bridge.pairs_of(fields) for field in pair)]:
        if field not in fields:
            raise UserError(f"train.bridge: no field {field!r} that is contrasted; {suggestion(field, fields)}")
    for pair in bridge.pairs_of(fields):
        if bridge.through in pair or pair[0] == pair[1]:
            raise UserError(f"train.bridge.pairs: {' and '.join(pair)}: two fields beside {bridge.through!r} learn through it")
    if not bridge.pairs_of(fields):
        raise UserError(f"train.bridge: there are no two fields beside {bridge.through!r}")
    if model.hyperbolic is not None:
        raise UserError("train.bridge: a bank is compared by cosines, and score is hyperbolic: leave out one of the two")


def scored_fields(config: RunConfig, pairing: Pairing) -> list[str]:
    """Return the fields that some term of the loss scores."""
    terms = [term for term, weight in pairing.weighted_terms(list(contrasted_fields(config))).items() if weight]
    return list(dict.fromkeys(field for term in terms for field in term))


def negative_fields(config: RunConfig) -> dict[str, str]:
    """Return the fields that only provide negatives, and for which field; mined negatives by their names in a batch.

    Raises:
        UserError: for one that is a negative of no field, or of one that is not contrasted.
    """
    negatives = {name: field.negative_of for name, field in config.fields.items() if field.negative_of}
    for field, options in config.fields.items():
        if options.own and not options.negative_of:
            raise UserError(f"fields.{field}.own: set fields.{field}.negative_of, the field of which it is a negative")
    anchors = contrasted_fields(config)
    for field, target in negatives.items():
        if target not in anchors:
            raise UserError(
                f"fields.{field}.negative_of: no field {target!r} that is contrasted; {suggestion(target, anchors)}"
            )
    for name, table in config.data.mined.items():
        if table.field not in anchors:
            hint = suggestion(table.field, anchors)
            raise UserError(f"data.negatives.field: no field {table.field!r} that is contrasted; {hint}")
        negatives[name] = table.field
    return negatives


def contrasted_fields(config: RunConfig) -> dict[str, FieldOptions]:
    """Return the fields that are contrasted and evaluated: all that do not only provide negatives."""
    return {name: field for name, field in config.fields.items() if not field.negative_of}
