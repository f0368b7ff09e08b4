"""A model composed of the `fields` and `towers` of a config, with initial weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmcontrast.components import build, suggestion
from mmcontrast.errors import UserError
from mmcontrast.libraries import weights_follow
from mmcontrast.modalities import MODALITIES, AudioModality, DecodeError, ImageModality, Modality, TextModality
from mmcontrast.modalities.library import LibraryTexts
from mmcontrast.models.base import Origin, Tower
from mmcontrast.models.contrastive import ContrastiveModel
from mmcontrast.models.decoding import set_decoding
from mmcontrast.models.linear import LinearTower
from mmcontrast.models.lora import add_lora
from mmcontrast.models.names import open_model
from mmcontrast.models.open_clip import OpenClipTextTower, OpenClipTower
from mmcontrast.models.options import FieldOptions, LoraOptions, ModelOptions, ScoreOptions, StartOptions
from mmcontrast.models.timm import TimmTower
from mmcontrast.models.transformers import TransformersTower, shortest_waveform
from mmcontrast.options import Component

TOWERS = {
    "timm": TimmTower,
    "transformers": TransformersTower,
    "open_clip": OpenClipTower,
    "open_clip_text": OpenClipTextTower,
    "linear": LinearTower,
}
PRETRAINED_BACKGROUNDS = {"open_clip": "open_clip", "timm": "drop"}  # others put white under transparent pixels


Opener = Callable[[StartOptions, bool], ContrastiveModel]


def open_start(start: StartOptions, weights: bool = True, trust_code: bool = False) -> ContrastiveModel:
    """Open the model of another library that an option names; `mmcontrast.runs.open_start` opens runs too.

    Args:
        weights: False: its architecture, with random ones; nothing large is read.
    """
    weights = weights and start.pretrained is not False
    with nullcontext() if weights else weights_follow():
        return open_model(start.model, start.pretrained or None, start.pooling, weights, trust_code, start.sizes)


def make_model(
    fields: Mapping[str, FieldOptions],
    towers: Mapping[str, Component],
    options: ModelOptions,
    seed: int,
    tokenizers: bool = True,
    weights: bool = True,
    opener: Opener = open_start,
    score: ScoreOptions | None = None,
) -> ContrastiveModel:
    """Make a model of towers with initial weights, a function of the seed; or of a start, and what is added to it.

    Args:
        tokenizers: they are those of the texts, and must fit the towers.
        weights: False: those of a start are not read.
        opener: opens a start.
        score: of hyperbolic distances; default: the start's, or cosines.

    Raises:
        UserError: for a field without a tower, a tower without a field, or texts that a tower cannot read; for a start that
            cannot be opened, or does not go with the rest.
    """
    torch.manual_seed(seed)
    started = [set_decoding(taken(opener(start, weights), start.fields), start) for start in options.starts]
    mine = {field: (one, one.tower_of[field]) for one in started for field in one.modalities}
    if sum(len(one.modalities) for one in started) > len(mine):
        raise UserError("model.start: two of them have the same fields: name halves, one of each kind")
    fields = {field: FieldOptions() for field in mine} | dict(fields)
    tower_of = check_fields(fields, towers, options, mine)
    refuse_unread(fields, started, options.starts)
    torch.manual_seed(seed)  # what is added does not depend on what a start has drawn
    modalities = {field: mine[field][0].modality(field) for field in mine} | make_modalities(fields, towers)
    modalities = {field: modalities[field] for field in fields}
    made = {name: build(spec, TOWERS, f"towers.{name}: tower", Tower) for name, spec in towers.items()}
    inherited = {tower: one.towers[tower] for one, tower in mine.values()}
    for field, modality in modalities.items():
        if isinstance(modality, LibraryTexts) and tokenizers:
            modality.open()
        tower = (inherited | made)[tower_of[field]]
        if isinstance(modality, TextModality) and not isinstance(modality, LibraryTexts) and tokenizers:
            try:
                tower.read(modality.text_ids)
            except (UserError, DecodeError) as error:
                raise UserError(f"fields.{field}: {error}") from error
        if isinstance(modality, AudioModality) and isinstance(tower, TransformersTower):
            refuse_short_sounds(field, modality, tower)
    model = joined(started, modalities, made, tower_of, options, score)
    if not options.update_batch_norms:
        trained = [
            name
            for one, start in zip(started, options.starts, strict=True)
            if start.pretrained is not False
            for name in one.towers
        ]
        model.fixed = [module for name in trained for module in model.towers[name].modules() if isinstance(module, _BatchNorm)]
    if options.lora:
        adapt(model, options.lora, inherited, is_whole(started), weights, options.starts)
    if model.origin is None:
        composed = {field: of.model_dump(mode="json") for field, of in fields.items()}
        config = {"fields": composed, "towers": dict(towers), "model": options.model_dump(mode="json")}
        config |= {"score": model.score.model_dump(mode="json")} if model.score else {}
        origins = {tower: one.origin for one, tower in mine.values() if one.origin}
        model.origin = Origin("mmcontrast", config=config, starts=origins)
    return model


def taken(model: ContrastiveModel, fields: Sequence[str]) -> ContrastiveModel:
    """Return a model with some of its fields alone, and with what encodes them; with all if none is named.

    Raises:
        UserError: for a field that it has not.
    """
    for field in fields:
        if field not in model.modalities:
            raise UserError(f"model.start.fields: no field {field!r}; {suggestion(field, model.modalities)}")
    left = [field for field in model.modalities if fields and field not in fields]
    if not left:
        return model
    for field in left:
        del model.modalities[field], model.tower_of[field]
    for tower in model.towers.keys() - set(model.tower_of.values()):
        del model.towers[tower], model.projections[tower]
        if model.hyperbolic is not None:
            del model.hyperbolic.log_scales[tower]
    if model.pairs:
        kept = [k for k, pair in enumerate(model.pairs) if not set(pair) & set(left)]
        model.pairs = [model.pairs[k] for k in kept]
        model.log_logit_scale = nn.Parameter(model.log_logit_scale.detach()[kept or [0]])
    return model


def check_fields(
    fields: Mapping[str, FieldOptions],
    towers: Mapping[str, Component],
    options: ModelOptions,
    mine: Mapping[str, tuple[ContrastiveModel, str]],
) -> dict[str, str]:
    """Return the name of each field's tower.

    Args:
        mine: of the fields that a start brings, itself and the name of the tower there.

    Raises:
        UserError: for a field without a tower or a modality, a tower without a field.
    """
    inherited = {tower for _, tower in mine.values()}
    if both := inherited & towers.keys():
        raise UserError(f"towers.{min(both)}: model.start has a tower of this name: give yours another")
    tower_of = {}
    for field, of in fields.items():
        if field not in mine and not of.modality:
            raise UserError(
                f"fields.{field}: say its modality, as {{modality: text, tower: text}}: model.start has no such field"
            )
        tower = of.tower or (mine[field][1] if field in mine else "")
        if tower not in towers and tower not in inherited:
            raise UserError(
                f"fields.{field}.tower: no tower {tower!r} under towers; {suggestion(tower, [*towers, *inherited])}"
            )
        tower_of[field] = tower
    for tower in towers:
        if tower not in tower_of.values():
            raise UserError(f"towers.{tower} serves no field: name it in fields.<field>.tower, or remove it")
    for tower in options.projection if isinstance(options.projection, dict) else ():
        if tower not in towers and tower not in inherited:
            raise UserError(f"model.projection: no tower {tower!r} under towers; {suggestion(tower, [*towers, *inherited])}")
    if mine and len(fields) < 2:
        raise UserError(f"fields: a model needs two or more to contrast, there is {', '.join(fields) or 'none'}")
    return tower_of


def refuse_unread(
    fields: Mapping[str, FieldOptions], started: Sequence[ContrastiveModel], starts: Sequence[StartOptions]
) -> None:
    """
    Raises:
        UserError: where a start's `decoding` says how pictures are read, and fields say another way for all of them.
    """
    for one, start in zip(started, starts, strict=True):
        pictures = [field for field in one.modalities if isinstance(one.modality(field), ImageModality)]
        if start.decoding != "library" and all(fields[field].modality for field in pictures):
            raise UserError(
                f"fields.{pictures[0]}.modality says how its pictures are read, and decoding={start.decoding} of model.start"
                " another way: leave out one of the two"
            )


def joined(
    started: Sequence[ContrastiveModel],
    modalities: Mapping[str, Modality],
    made: Mapping[str, Tower],
    tower_of: Mapping[str, str],
    options: ModelOptions,
    score: ScoreOptions | None,
) -> ContrastiveModel:
    """Return the model of the starts' towers and of those that were made. A whole keeps its projections, logit scale
    and bias, and where it is hyperbolic its curvature and lengths; halves get projections of their own,
    as the towers that were made do.

    Raises:
        UserError: for an embed_dim that is not the start's.
    """
    whole = started[0] if is_whole(started) else None
    given = options.model_dump(exclude={"start", "lora", "update_batch_norms"}, exclude_none=True)
    halves: dict[str, Tower] = {}
    if whole:
        if options.embed_dim not in (None, whole.embed_dim):
            raise UserError(f"model.embed_dim={options.embed_dim}: that of model.start is {whole.embed_dim}: leave it out")
        given = {"max_logit_scale": whole.max_logit_scale} | given | {"embed_dim": whole.embed_dim}
        given["scale_per_pair"] = options.scale_per_pair or bool(whole.pairs)
    else:
        halves = {name: cast(Tower, tower) for one in started for name, tower in one.towers.items()}
        given = {"embed_dim": 512} | given
    score = score or (whole.score if whole else None)
    model = ContrastiveModel(modalities, halves | dict(made), tower_of, **given, score=score)
    if whole:
        model.towers = nn.ModuleDict({**whole.towers, **model.towers})
        model.projections = nn.ModuleDict({**whole.projections, **model.projections})
        if options.logit_scale is None:
            model.log_logit_scale = nn.Parameter(scales_of(model, whole))
        if options.logit_bias is None:
            model.logit_bias = whole.logit_bias
        if model.hyperbolic is not None:
            model.hyperbolic.begin_with(whole.towers, whole.hyperbolic)
        model.origin = None if made else whole.origin
    return model


def scales_of(model: ContrastiveModel, whole: ContrastiveModel) -> Tensor:
    """Return the logarithms of a start's logit scales as a model has them: one, or one for each pair of fields, that of a pair
    which the start has not being the mean of its own."""
    logs = whole.log_logit_scale.detach()
    if not model.pairs:
        return logs
    known = {frozenset(pair): one for pair, one in zip(whole.pairs, logs, strict=False)}
    return torch.stack([known.get(frozenset(pair), logs.mean()) for pair in model.pairs])


def is_whole(started: Sequence[ContrastiveModel]) -> bool:
    """Return whether it is one model of several fields, whose projections, logit scale and bias mean something."""
    return len(started) == 1 and len(started[0].modalities) > 1


def adapt(
    model: ContrastiveModel,
    lora: LoraOptions,
    inherited: Mapping[str, Any],
    whole: bool,
    weights: bool,
    starts: Sequence[StartOptions],
) -> None:
    """Lock what a start has brought, and add low-rank updates to its towers, or to some.

    Args:
        inherited: its towers. whole: their projections, the logit scale and the bias are its own too.
        weights: its weights are there, and left out of checkpoints.
        starts: the options by which it was opened.

    Raises:
        UserError: for new tokens, which would be locked; for towers that are not a start's, or have nothing to adapt.
    """
    if not inherited:
        raise UserError("model.lora adapts the weights of a model.start: name one")
    if any(start.new_tokens for start in starts):
        raise UserError("model.start.new_tokens: their embeddings are new, and model.lora locks them: leave out one of the two")
    for name in lora.towers:
        if name not in inherited:
            raise UserError(f"model.lora.towers: no tower {name!r} of model.start; {suggestion(name, inherited)}")
    kept = [model.towers[name] for name in inherited]
    if whole:
        kept += [model.projections[name] for name in inherited]
    if whole and len(model.towers) == len(inherited):
        model.log_logit_scale.requires_grad_(False)
        if model.logit_bias is not None:
            model.logit_bias.requires_grad_(False)
        if model.hyperbolic is not None and model.hyperbolic.of_start:
            model.hyperbolic.requires_grad_(False)
    for module in kept:
        module.requires_grad_(False)
    before = {id(tensor) for module in kept for tensor in (*module.parameters(), *module.buffers())}
    for name in lora.towers or inherited:
        try:
            add_lora(cast(Tower, model.towers[name]), lora.rank, lora.alpha, lora.targets, lora.dropout)
        except UserError as error:
            raise UserError(f"model.lora: towers.{name}: {error}") from error
    if weights:
        model.keep_start(name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in before)


def refuse_short_sounds(field: str, modality: AudioModality, tower: TransformersTower) -> None:
    """
    Raises:
        UserError: if a waveform may be shorter than what the tower's convolutions take.
    """
    samples = min(modality.window, modality.length) if modality.variable else modality.length
    needed = shortest_waveform(tower.network.config)
    if modality.representation == "waveform" and samples < needed:
        option = "window" if modality.length >= needed else "seconds"
        raise UserError(f"fields.{field}: sounds may have {samples} samples, its tower needs {needed}: set a longer {option}")


def make_modalities(fields: Mapping[str, FieldOptions], towers: Mapping[str, Component] | None = None) -> dict[str, Modality]:
    """Return the modality of each field that says one. Pictures for weights that a library pretrained are treated as it does
    where they are transparent, unless `background` says otherwise."""
    made = {}
    for field, options in fields.items():
        spec, tower = options.modality, (towers or {}).get(options.tower or "")
        if spec is None:
            continue
        spec = {"type": spec} if isinstance(spec, str) else spec
        if isinstance(spec, dict) and spec.get("type") == "image" and isinstance(tower, dict) and _has_weights(tower):
            spec = {"background": PRETRAINED_BACKGROUNDS.get(str(tower.get("type")), "white"), **spec}
        made[field] = build(spec, MODALITIES, f"fields.{field}.modality: modality", Modality)
    return made


def _has_weights(tower: Mapping[str, Any]) -> bool:
    """Whether they are a library's; a model of open_clip's that is named with its place has some without `pretrained`."""
    return bool(tower.get("pretrained")) or (tower.get("type") == "open_clip" and ":" in str(tower.get("model")))
