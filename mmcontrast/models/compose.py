"""Make a model from the `fields` and `towers` of a config and from starts, with initial weights."""

import copy
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
from mmcontrast.modalities.library import LibraryImages, LibraryTexts
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
PRETRAINED_BACKGROUNDS = {"open_clip": "open_clip", "timm": "drop"}  # other libraries put white under transparent pixels


Opener = Callable[[StartOptions, bool], ContrastiveModel]


def open_start(start: StartOptions, weights: bool = True, trust_code: bool = False) -> ContrastiveModel:
    """Open a start that is a model of another library; `mmcontrast.runs.open_start` opens runs too.

    Args:
        weights: False: the architecture with random weights; nothing large is read.
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
    """Make a model of towers with initial weights, which are a function of the seed; or of starts, and the towers added to
    them.

    Args:
        tokenizers: check that the tokenizers fit the towers.
        weights: False: do not read the weights of a start.
        opener: opens a start.
        score: of hyperbolic distances; default: the start's, or cosines.

    Raises:
        UserError: for a field without a tower, a tower without a field, or texts that a tower cannot read; for a start that
            cannot be opened, or does not go with the other options.
    """
    torch.manual_seed(seed)
    starts = [set_decoding(keep_fields(opener(start, weights), start.fields), start) for start in options.starts]
    start_fields = {field: (start, start.tower_of[field]) for start in starts for field in start.modalities}
    if sum(len(start.modalities) for start in starts) > len(start_fields):
        raise UserError("model.start: two of them have the same fields: name halves, one of each kind")
    fields = {field: FieldOptions() for field in start_fields} | dict(fields)
    tower_of = check_fields(fields, towers, options, start_fields)
    check_decoding(fields, starts, options.starts)
    torch.manual_seed(seed)  # new weights do not depend on the random numbers that a start has drawn
    of_starts = {field: start.modality(field) for field, (start, _) in start_fields.items()}
    modalities = of_starts | make_modalities(fields, towers, of_starts)
    modalities = {field: modalities[field] for field in fields}
    new_towers = {name: build(spec, TOWERS, f"towers.{name}: tower", Tower) for name, spec in towers.items()}
    start_towers = {tower: start.towers[tower] for start, tower in start_fields.values()}
    for field, modality in modalities.items():
        if isinstance(modality, LibraryTexts) and tokenizers:
            modality.open()
        tower = (start_towers | new_towers)[tower_of[field]]
        if isinstance(modality, TextModality) and not isinstance(modality, LibraryTexts) and tokenizers:
            try:
                tower.read(modality.text_ids)
            except (UserError, DecodeError) as error:
                raise UserError(f"fields.{field}: {error}") from error
        if isinstance(modality, AudioModality) and isinstance(tower, TransformersTower):
            check_sound_length(field, modality, tower)
    model = join(starts, modalities, new_towers, tower_of, options, score)
    if not options.update_batch_norms:
        pairs = zip(starts, options.starts, strict=True)
        pretrained = [name for start, start_options in pairs if start_options.pretrained is not False for name in start.towers]
        modules = [module for name in pretrained for module in model.towers[name].modules()]
        model.fixed = [module for module in modules if isinstance(module, _BatchNorm)]
    if options.lora:
        adapt(model, options.lora, start_towers, is_whole(starts), weights, options.starts)
    if model.origin is None:
        field_options = {name: field.model_dump(mode="json") for name, field in fields.items()}
        config = {"fields": field_options, "towers": dict(towers), "model": options.model_dump(mode="json")}
        config |= {"score": model.score.model_dump(mode="json")} if model.score else {}
        origins = {tower: start.origin for start, tower in start_fields.values() if start.origin}
        model.origin = Origin("mmcontrast", config=config, starts=origins)
    return model


def keep_fields(model: ContrastiveModel, fields: Sequence[str]) -> ContrastiveModel:
    """Remove all fields of a model but some, with their towers; none if `fields` is empty.

    Raises:
        UserError: for a field that the model does not have.
    """
    for field in fields:
        if field not in model.modalities:
            raise UserError(f"model.start.fields: no field {field!r}; {suggestion(field, model.modalities)}")
    removed = [field for field in model.modalities if fields and field not in fields]
    if not removed:
        return model
    for field in removed:
        del model.modalities[field], model.tower_of[field]
    for tower in model.towers.keys() - set(model.tower_of.values()):
        del model.towers[tower], model.projections[tower]
        if model.hyperbolic is not None:
            del model.hyperbolic.log_scales[tower]
    if model.pairs:
        kept = [k for k, pair in enumerate(model.pairs) if not set(pair) & set(removed)]
        model.pairs = [model.pairs[k] for k in kept]
        model.log_logit_scale = nn.Parameter(model.log_logit_scale.detach()[kept or [0]])
    return model


def check_fields(
    fields: Mapping[str, FieldOptions],
    towers: Mapping[str, Component],
    options: ModelOptions,
    start_fields: Mapping[str, tuple[ContrastiveModel, str]],
) -> dict[str, str]:
    """Return the name of each field's tower.

    Args:
        start_fields: for each field of a start, the start and the name of its tower.

    Raises:
        UserError: for a field without a tower or a modality, a tower without a field.
    """
    start_towers = {tower for _, tower in start_fields.values()}
    if duplicates := start_towers & towers.keys():
        raise UserError(f"towers.{min(duplicates)}: model.start has a tower of this name: give yours another")
    tower_of = {}
    for field, field_options in fields.items():
        if field not in start_fields and not field_options.modality:
            raise UserError(
                f"fields.{field}: say its modality, as {{modality: text, tower: text}}: model.start has no such field"
            )
        tower = field_options.tower or (start_fields[field][1] if field in start_fields else "")
        if tower not in towers and tower not in start_towers:
            raise UserError(
                f"fields.{field}.tower: no tower {tower!r} under towers; {suggestion(tower, [*towers, *start_towers])}"
            )
        tower_of[field] = tower
    for tower in towers:
        if tower not in tower_of.values():
            raise UserError(f"towers.{tower} serves no field: name it in fields.<field>.tower, or remove it")
    for tower in options.projection if isinstance(options.projection, dict) else ():
        if tower not in towers and tower not in start_towers:
            raise UserError(f"model.projection: no tower {tower!r} under towers; {suggestion(tower, [*towers, *start_towers])}")
    if start_fields and len(fields) < 2:
        raise UserError(f"fields: a model needs two or more to contrast, there is {', '.join(fields) or 'none'}")
    return tower_of


def check_decoding(
    fields: Mapping[str, FieldOptions], starts: Sequence[ContrastiveModel], start_options: Sequence[StartOptions]
) -> None:
    """Check that a start's `decoding` has an effect.

    Raises:
        UserError: if all of its fields of pictures have a modality of their own.
    """
    for start, options in zip(starts, start_options, strict=True):
        pictures = [field for field in start.modalities if isinstance(start.modality(field), ImageModality)]
        if options.decoding != "library" and all(fields[field].modality for field in pictures):
            raise UserError(
                f"fields.{pictures[0]}.modality says how its pictures are read, and decoding={options.decoding} of model.start"
                " another way: leave out one of the two"
            )


def join(
    starts: Sequence[ContrastiveModel],
    modalities: Mapping[str, Modality],
    new_towers: Mapping[str, Tower],
    tower_of: Mapping[str, str],
    options: ModelOptions,
    score: ScoreOptions | None,
) -> ContrastiveModel:
    """Return the model of the starts' towers and the new ones. A whole model keeps its projections, logit scale and bias, and,
    if it is hyperbolic, its curvature and lengths; halves get new projections, as new towers do.

    Raises:
        UserError: for an embed_dim that is not the start's.
    """
    whole = starts[0] if is_whole(starts) else None
    arguments = options.model_dump(exclude={"start", "lora", "update_batch_norms"}, exclude_none=True)
    halves: dict[str, Tower] = {}
    if whole:
        if options.embed_dim not in (None, whole.embed_dim):
            raise UserError(f"model.embed_dim={options.embed_dim}: that of model.start is {whole.embed_dim}: leave it out")
        kinds = options.projection if isinstance(options.projection, dict) else dict.fromkeys(whole.towers, options.projection)
        for name, kind in kinds.items():
            if name in whole.towers and kind != "linear":  # the default
                raise UserError(f"model.projection={kind}: tower {name!r} keeps that of model.start: name new towers alone")
        arguments = {"max_logit_scale": whole.max_logit_scale} | arguments | {"embed_dim": whole.embed_dim}
        arguments["scale_per_pair"] = options.scale_per_pair or bool(whole.pairs)
    else:
        halves = {name: cast(Tower, tower) for start in starts for name, tower in start.towers.items()}
        arguments = {"embed_dim": 512} | arguments
    score = score or (whole.score if whole else None)
    model = ContrastiveModel(modalities, halves | dict(new_towers), tower_of, **arguments, score=score)
    if whole:
        model.towers = nn.ModuleDict({**whole.towers, **model.towers})
        model.projections = nn.ModuleDict({**whole.projections, **model.projections})
        if options.logit_scale is None:
            model.log_logit_scale = nn.Parameter(log_scales(model, whole))
        if options.logit_bias is None:
            model.logit_bias = whole.logit_bias
        if model.hyperbolic is not None:
            model.hyperbolic.begin_with(whole.towers, whole.hyperbolic)
        model.origin = None if new_towers else whole.origin
    return model


def log_scales(model: ContrastiveModel, start: ContrastiveModel) -> Tensor:
    """Return the logarithms of a start's logit scales in a model's form: one, or one for each pair of fields; a pair that the
    start does not have gets the mean."""
    logs = start.log_logit_scale.detach()
    if not model.pairs:
        return logs
    by_pair = {frozenset(pair): log for pair, log in zip(start.pairs, logs, strict=False)}
    return torch.stack([by_pair.get(frozenset(pair), logs.mean()) for pair in model.pairs])


def is_whole(starts: Sequence[ContrastiveModel]) -> bool:
    """Return whether the starts are one model of several fields, whose projections, logit scale and bias are kept."""
    return len(starts) == 1 and len(starts[0].modalities) > 1


def adapt(
    model: ContrastiveModel,
    lora: LoraOptions,
    start_towers: Mapping[str, Any],
    whole: bool,
    weights: bool,
    starts: Sequence[StartOptions],
) -> None:
    """Lock the weights of a start, and add low-rank updates to all or some of its towers.

    Args:
        start_towers: its towers. whole: the projections, the logit scale and the bias come from it too.
        weights: its weights were read, and are left out of checkpoints.
        starts: the options by which it was opened.

    Raises:
        UserError: for new tokens, which would be locked; for towers that are not a start's, or have nothing to adapt.
    """
    if not start_towers:
        raise UserError("model.lora adapts the weights of a model.start: name one")
    if any(start.new_tokens for start in starts):
        raise UserError("model.start.new_tokens: their embeddings are new, and model.lora locks them: leave out one of the two")
    for name in lora.towers:
        if name not in start_towers:
            raise UserError(f"model.lora.towers: no tower {name!r} of model.start; {suggestion(name, start_towers)}")
    locked = [model.towers[name] for name in start_towers]
    if whole:
        locked += [model.projections[name] for name in start_towers]
    if whole and len(model.towers) == len(start_towers):
        model.log_logit_scale.requires_grad_(False)
        if model.logit_bias is not None:
            model.logit_bias.requires_grad_(False)
        if model.hyperbolic is not None and model.hyperbolic.of_start:
            model.hyperbolic.requires_grad_(False)
    for module in locked:
        module.requires_grad_(False)
    unchanged = {id(tensor) for module in locked for tensor in (*module.parameters(), *module.buffers())}
    for name in lora.towers or start_towers:
        try:
            add_lora(cast(Tower, model.towers[name]), lora.rank, lora.alpha, lora.targets, lora.dropout)
        except UserError as error:
            raise UserError(f"model.lora: towers.{name}: {error}") from error
    if weights:
        tensors = model.state_dict(keep_vars=True)
        model.keep_start(name for name, tensor in tensors.items() if id(tensor) in unchanged)


def check_sound_length(field: str, modality: AudioModality, tower: TransformersTower) -> None:
    """Check that waveforms are long enough for a tower's convolutions.

    Raises:
        UserError: if one may be shorter.
    """
    samples = min(modality.window, modality.length) if modality.variable else modality.length
    needed = shortest_waveform(tower.network.config)
    if modality.representation == "waveform" and samples < needed:
        option = "window" if modality.length >= needed else "seconds"
        raise UserError(f"fields.{field}: sounds may have {samples} samples, its tower needs {needed}: set a longer {option}")


def make_modalities(
    fields: Mapping[str, FieldOptions],
    towers: Mapping[str, Component] | None = None,
    of_starts: Mapping[str, Modality] | None = None,
) -> dict[str, Modality]:
    """Return the modality of each field that names one. Transparent pictures for pretrained weights of a library are treated as
    it does, unless `background` is set.

    Args:
        of_starts: the modalities of a start's fields, whose tokenizer or normalisation stays where a field names none.

    Raises:
        UserError: for wrong options of a modality.
    """
    modalities = {}
    for field, options in fields.items():
        spec, tower = options.modality, (towers or {}).get(options.tower or "")
        if spec is None:
            continue
        spec = {"type": spec} if isinstance(spec, str) else spec
        if isinstance(spec, dict) and spec.get("type") == "image" and isinstance(tower, dict) and _has_weights(tower):
            spec = {"background": PRETRAINED_BACKGROUNDS.get(str(tower.get("type")), "white"), **spec}
        place, own = f"fields.{field}.modality", (of_starts or {}).get(field)
        modalities[field] = (
            changed_modality(place, own, spec) if own else build(spec, MODALITIES, f"{place}: modality", Modality)
        )
    return modalities


def changed_modality(place: str, own: Modality, spec: Component) -> Modality:
    """Return a modality with options that are changed. What they do not name stays: the tokenizer of texts; of pictures the
    size, the normalisation and what else our own path takes.

    Args:
        place: of the options in the config, for messages.

    Raises:
        UserError: for wrong options; for those that the library's own path does not have.
    """
    changed = {"type": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, dict) else {}
    if changed.get("type") == "text" and isinstance(own, TextModality) and "tokenizer" not in changed:
        build(spec, MODALITIES, f"{place}: modality", Modality)  # for its errors
        length = changed.get("context_length", own.context_length)
        if isinstance(own, LibraryTexts) and length != own.context_length:
            raise UserError(f"{place}.context_length={length}: that of the start is {own.context_length}: set model.start")
        modality = copy.copy(own)
        for option, value in changed.items():
            if option != "type":
                setattr(modality, option, value)
        return modality
    if changed.get("type") == "image" and isinstance(own, ImageModality):
        if isinstance(own, LibraryImages):
            defaults = own.as_ours
        else:
            names = ("size", "channels", "mean", "std", "background", "interpolation", "resize", "resize_to", "max_pixels")
            defaults = {name: getattr(own, name) for name in names}
        if isinstance(defaults, str) and not {"mean", "std"} <= changed.keys():
            raise UserError(f"{place}: name mean and std, as those of model.start cannot be taken over: {defaults}")
        if not isinstance(defaults, str):
            spec = {name: value for name, value in defaults.items() if name != "resize_to" or "size" not in changed} | changed
    return build(spec, MODALITIES, f"{place}: modality", Modality)


def _has_weights(tower: Mapping[str, Any]) -> bool:
    """Return whether a tower has pretrained weights; an open_clip model named with a schema, as hf-hub:, has its own."""
    return bool(tower.get("pretrained")) or (tower.get("type") == "open_clip" and ":" in str(tower.get("model")))
