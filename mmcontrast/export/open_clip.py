"""Export to open_clip, which opens the folder by "local-dir:FOLDER", or from the hub: config, weights, tokenizer.

A model has two halves, each a part of `model_cfg` and tensors: as open_clip made them, or composed of timm's networks,
open_clip's text transformer and linear projections, which open_clip has, too. What its config cannot express is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.export.parity import Reopened, opened_pictures
from mmcontrast.export.parts import copied, image_and_text, origin_of, projection_of, scale_and_bias, tower_options, unused
from mmcontrast.libraries import library_messages, opening, weights_follow
from mmcontrast.modalities import ImageModality, Modality, TextModality
from mmcontrast.modalities.library import LibraryImages, LibraryTexts
from mmcontrast.modalities.text import OPEN_CLIP
from mmcontrast.models import ContrastiveModel, OpenClipTextTower, OpenClipTower, Origin, TimmTower, Tower, TransformersTower
from mmcontrast.models.open_clip import OPEN_CLIP_CONFIG, model_config

WEIGHTS = "open_clip_model.safetensors"
IN_TRAINING = {"drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "pos_drop_rate"}
USAGE = """\
import open_clip, torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
model.eval()
with torch.no_grad():
    images = model.encode_image(preprocess(Image.open("picture.jpg")).unsqueeze(0), normalize=True)
    texts = model.encode_text(tokenizer(["a caption"]), normalize=True)
    bias = 0 if model.logit_bias is None else model.logit_bias
    logits = model.logit_scale.exp() * images @ texts.T + bias
"""


@dataclass(frozen=True)
class Half:
    """One half of a model of open_clip's.

    Attributes:
        config: `vision_cfg` or `text_cfg`.
        tensors: of `visual` or `text`.
        quick_gelu: whether it computes with QuickGELU; None: open_clip's flag does not apply to it.
        notes: for readers of the folder.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    quick_gelu: bool | None = None
    notes: list[str] = field(default_factory=list)


def write(model: ContrastiveModel, names: list[str], folder: Path) -> list[str]:
    """Write a model into an empty folder, and return notes.

    Raises:
        UserError: for what open_clip cannot express.
    """
    image, text = image_and_text(model, names, "open_clip")
    original: Mapping[str, Any] = {}
    origin = origin_of(model, names)
    if origin and origin.library == "open_clip":
        original = origin.config["model_cfg"]
    visual, textual = image_half(model, image, original.get("vision_cfg")), text_half(model, text, original.get("text_cfg"))
    log_scale, bias = scale_and_bias(model, names)
    activations = {half.quick_gelu for half in (visual, textual)} - {None}
    if len(activations) > 1:
        raise UserError("open_clip has one activation for both towers: here one computes with QuickGELU, the other with GELU")
    config = {
        **{key: value for key, value in original.items() if key not in ("quick_gelu", "custom_text", "init_logit_bias")},
        "embed_dim": model.embed_dim,
        "vision_cfg": visual.config,
        "text_cfg": textual.config,
    }
    config |= {"quick_gelu": True} if activations == {True} else {}
    config |= {} if bias is None else {"init_logit_bias": bias.item()}
    if not original or original.get("custom_text"):
        config["custom_text"] = True
    prefix = "text." if config.get("custom_text") or "hf_model_name" in textual.config else ""
    shape = [1] if config.get("nonscalar_logit_scale") else []
    tensors = {f"visual.{key}": value for key, value in visual.tensors.items()}
    tensors |= {f"{prefix}{key}": value for key, value in textual.tensors.items()}
    tensors |= {"logit_scale": log_scale.reshape(shape)} | ({} if bias is None else {"logit_bias": bias.reshape(shape)})
    tensors |= dict(origin.rest) if original and origin else {}
    config["text_cfg"], notes = _save_tokenizer(model.modality(text), textual.config, folder)
    description = {"model_cfg": config, "preprocess_cfg": preprocess_config(origin, model.modality(image))}
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(description, indent=2), encoding="utf-8")
    save_file(copied(tensors), folder / WEIGHTS, {"format": "pt"})
    return [*visual.notes, *textual.notes, *notes]


def image_half(model: ContrastiveModel, name: str, config: Mapping[str, Any] | None) -> Half:
    """Return the image half of a model.

    Args:
        config: the `vision_cfg` of a model that open_clip made.

    Raises:
        UserError: for what open_clip cannot express.
    """
    tower, options = model.towers[model.tower_of[name]], tower_options(model, name)
    projection, label = projection_of(model, name), f"field {name!r}"
    if isinstance(tower, OpenClipTower) and tower.part == "image":
        config = dict(config or _model_config(model, name, options)["vision_cfg"])
        config.pop("timm_model_pretrained", None)
        size = getattr(tower.network, "image_size", config.get("image_size"))
        config["image_size"] = size[0] if isinstance(size, tuple) and len(set(size)) == 1 else size
        if "timm_model_name" in config:
            refuse_resized_trunk(tower.network.trunk, config["timm_model_name"], label)
        tensors = fold_projection(tower.network, projection, label)
        return Half(config, tensors, None if "timm_model_name" in config else _uses_quick_gelu(tower.network))
    if not isinstance(tower, TimmTower) or not options:
        raise UserError(f"{label}: open_clip has no tower like its {type(tower).__name__}: give it one of timm or open_clip")
    return _timm_half(model, name, tower, options, projection)


def refuse_resized_trunk(trunk: Any, name: str, label: str) -> None:
    """Refuse a network of timm's whose weights are those of another image size than its name's: open_clip builds it by its
    name, whatever image_size says, and resizes it only after its weights are loaded.

    Raises:
        UserError: for such a network.
    """
    import timm

    own_size = trunk.default_cfg.get("input_size")
    if own_size is None or not hasattr(trunk, "set_input_size"):
        return
    with library_messages(name):
        shapes = {key: tensor.shape for key, tensor in timm.create_model(name, num_classes=0).state_dict().items()}
    for key, tensor in trunk.state_dict().items():
        if shapes.get(key, tensor.shape) != tensor.shape:
            raise UserError(
                f"{label}: open_clip makes timm's {name} for pictures of {own_size[-1]} pixels alone, and this one's {key} is"
                " of another size: begin with the architecture whose name says this size, or export onnx"
            )


def _model_config(model: ContrastiveModel, name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `model_cfg` of the model that a tower is a half of: of a start, or of the architecture in its options."""
    origin = origin_of(model, [name])
    if origin and origin.library == "open_clip":
        return origin.config["model_cfg"]
    return model_config(str(options["model"]))


def _timm_half(model: ContrastiveModel, name: str, tower: TimmTower, options: Mapping[str, Any], projection: nn.Module) -> Half:
    modality, network, label = model.modality(name), tower.network, f"field {name!r}"
    if not isinstance(modality, ImageModality) or modality.channels != 3:
        raise UserError(f"{label}: open_clip's pictures have 3 channels, these have {getattr(modality, 'channels', 'none')}")
    default = getattr(network, "default_cfg", {}).get("input_size")
    expressed = {"type", "model", "pretrained", "num_classes", "in_chans"} | IN_TRAINING
    extra = {option: value for option, value in options.items() if option not in expressed}
    if default and extra.get("img_size") in (default[-1], list(default[1:]), tuple(default[1:])):
        del extra["img_size"]
    pool = extra.pop("global_pool", "")
    if extra:
        raise UserError(
            f"{label}: open_clip makes a tower of timm's of its name alone, not with {', '.join(sorted(extra))}: choose the"
            " architecture whose name says so, or export onnx"
        )
    config = {"timm_model_name": options["model"], "timm_pool": pool, "timm_proj": "linear", "image_size": modality.size}
    tensors = {f"trunk.{key}": value for key, value in network.state_dict().items()}
    if isinstance(projection, nn.Linear):
        tensors["head.proj.weight"] = projection.weight
    elif isinstance(projection, nn.Identity):  # without one, open_clip would use timm's classifier, or leave out the pool
        tensors["head.proj.weight"] = torch.eye(tower.width)
    else:
        layers: Any = projection
        hidden, last = layers[0], layers[-1]
        if hidden.out_features != 2 * model.embed_dim:
            raise UserError(
                f"{label}: the hidden layer of open_clip's mlp projection has twice embed_dim, {2 * model.embed_dim}, here it"
                f" has {hidden.out_features}: take projection: linear"
            )
        config["timm_proj"] = "mlp"
        tensors |= {"head.mlp.fc1.weight": hidden.weight, "head.mlp.fc1.bias": hidden.bias, "head.mlp.fc2.weight": last.weight}
    return Half(config, tensors)


def text_half(model: ContrastiveModel, name: str, config: Mapping[str, Any] | None) -> Half:
    """Return the text half of a model.

    Args:
        config: the `text_cfg` of a model that open_clip made.

    Raises:
        UserError: for what open_clip cannot express.
    """
    from open_clip import CLIPTextCfg

    tower, options = model.towers[model.tower_of[name]], tower_options(model, name)
    projection, label = projection_of(model, name), f"field {name!r}"
    if isinstance(tower, OpenClipTower) and tower.part == "text":
        config = dict(config or _model_config(model, name, options)["text_cfg"])
        config.pop("hf_model_pretrained", None)
        tensors = fold_projection(tower.network, projection, label)
        if tower.masks:
            return Half(config, tensors, notes=[_external_config_note(config["hf_model_name"])])
    elif isinstance(tower, OpenClipTextTower):
        known_options = {option.name for option in fields(CLIPTextCfg)}
        if unknown := sorted(options.keys() - known_options - {"type"}):
            raise UserError(f"{label}: open_clip's config has no words for {', '.join(unknown)} of its text tower")
        config = {key: value for key, value in options.items() if key != "type"}
        tensors = dict(tower.network.state_dict())
        if isinstance(projection, nn.Linear):
            tensors["text_projection"] = projection.weight.T
        elif isinstance(projection, nn.Identity):
            config["proj_type"] = "none"
        else:
            raise UserError(f"{label}: the text towers of open_clip have no mlp projection: take projection: linear")
    elif isinstance(tower, TransformersTower):
        return _transformers_half(tower, options, projection, label)
    else:
        raise UserError(f"{label}: open_clip has no tower like its {type(tower).__name__}")
    config["vocab_size"], config["context_length"] = tower.network.vocab_size, tower.network.context_length
    modality = model.modality(name)
    if isinstance(modality, TextModality) and modality.context_length < tower.network.context_length:
        config["context_length"] = modality.context_length
        tensors = _shorten_context(tower, tensors, modality.context_length, label)
    return Half(config, tensors, _uses_quick_gelu(tower.network))


def _shorten_context(tower: Tower, tensors: dict[str, Tensor], length: int, label: str) -> dict[str, Tensor]:
    """Return a text tower's tensors for texts that are shorter than its context: open_clip has one length for both. The output
    of a causal tower does not depend on the positions after a text.

    Raises:
        UserError: for a tower that reads the positions after a text.
    """
    network: Any = tower.network
    if network.attn_mask is None or network.cls_emb is not None or network.pool_type not in ("argmax", "eos", "first"):
        raise UserError(
            f"{label}: its texts are cut to {length} tokens, its tower reads {network.context_length}, padding included, and"
            " open_clip has one number for both: set the modality's context_length to the tower's"
        )
    return tensors | {"positional_embedding": tensors["positional_embedding"][:length]}


def _transformers_half(tower: TransformersTower, options: Mapping[str, Any], projection: nn.Module, label: str) -> Half:
    from transformers import CONFIG_MAPPING

    poolers = {"mean": "mean_pooler", "first": "cls_last_hidden_state_pooler"}
    model = str(options.get("model", ""))
    if not model or model in CONFIG_MAPPING or options.get("config"):
        raise UserError(
            f"{label}: open_clip makes a text tower of transformers of its name on the hub or its folder alone, not of a type"
            " or with a config of one's own: export onnx or safetensors"
        )
    if tower.pooling not in poolers or isinstance(projection, nn.Sequential):
        raise UserError(
            f"{label}: open_clip has no text tower of transformers with pooling {tower.pooling} and such a projection"
        )
    tensors = {f"transformer.{key}": value for key, value in tower.network.state_dict().items()}
    tensors |= {"proj.weight": projection.weight} if isinstance(projection, nn.Linear) else {}
    model = str(Path(model).absolute()) if Path(model).is_dir() else model
    config = {
        "hf_model_name": model,
        "hf_pooler_type": poolers[tower.pooling],
        "hf_proj_type": "linear" if isinstance(projection, nn.Linear) else None,
    }
    return Half(config, tensors, notes=[_external_config_note(model)])


def _external_config_note(name: str) -> str:
    return f"open_clip reads the config of the text tower from {name}, which must be there where the folder is opened"


def fold_projection(network: nn.Module, projection: nn.Module, label: str) -> dict[str, Tensor]:
    """Return the tensors of a half of open_clip's, with the linear projection after it folded into its own last layer.

    Raises:
        UserError: for a projection that is not linear, or a network without such a layer.
    """
    tensors = dict(network.state_dict())
    if isinstance(projection, nn.Identity):
        return tensors
    if isinstance(projection, nn.Linear):
        weight = projection.weight.detach()
        for name in ("proj", "text_projection"):
            if isinstance(tensors.get(name), Tensor):  # a parameter [width, embed_dim]
                return tensors | {name: tensors[name] @ weight.T}
        for layer in ("text_projection", "attnpool.c_proj", "head.proj", "head.mlp.fc2", "proj", "proj.2"):
            if f"{layer}.weight" in tensors:
                replaced = {f"{layer}.weight": weight @ tensors[f"{layer}.weight"]}
                if f"{layer}.bias" in tensors:
                    replaced[f"{layer}.bias"] = weight @ tensors[f"{layer}.bias"]
                return tensors | replaced
    raise UserError(f"{label}: open_clip has no place for the projection that follows its tower: take projection: none")


def _uses_quick_gelu(network: nn.Module) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in network.modules())


def preprocess_config(origin: Origin | None, modality: Modality) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg`: that of the model, or the equivalent of our image options."""
    if isinstance(modality, LibraryImages) and origin and "preprocess_cfg" in origin.config:
        config = dict(origin.config["preprocess_cfg"])
        return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key != "size"}
    assert isinstance(modality, ImageModality)
    return {"mean": modality.mean, "std": modality.std, "interpolation": modality.interpolation, "resize_mode": modality.resize}


def _save_tokenizer(modality: Modality, config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Save the tokenizer, unless it is open_clip's own; return the `text_cfg` that names it, and notes."""
    if isinstance(modality, LibraryTexts):
        tokenizer = modality.tokenize.tokenizer  # open_clip's
        if not hasattr(tokenizer, "save_pretrained"):
            return config, []
        unused(tokenizer.tokenizer).save_pretrained(folder)
        if "hf_tokenizer_name" not in config:  # open_clip knew it by the architecture's name
            config = config | {"hf_tokenizer_name": "tokenizer", "tokenizer_kwargs": {"clean": "canonicalize"}}
    else:
        assert isinstance(modality, TextModality)
        if modality.name == OPEN_CLIP:
            return config, []
        unused(modality.tokenizer).save_pretrained(folder)
        config = config | {"hf_tokenizer_name": modality.name, "context_length": modality.context_length}
    notes = ["before this folder goes to the hub, set hf_tokenizer_name in open_clip_config.json to its name there"]
    if not isinstance(modality, LibraryTexts):
        notes.append(
            "open_clip cleans texts before the tokenizer (ftfy.fix_text, html.unescape, white space), and this model was"
            " trained without: texts with curly quotes, ligatures or HTML entities get other embeddings there"
        )
    return config, notes


def reopen(folder: Path, names: list[str], model: ContrastiveModel) -> Reopened:
    """Reopen an export with open_clip.

    Raises:
        UserError: if open_clip cannot open it.
    """
    import open_clip

    image, _ = image_and_text(model, names, "open_clip")
    with opening(folder), library_messages(folder), weights_follow():
        network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    network.eval()

    def pixels(values: list[bytes]) -> Tensor:
        return torch.stack([preprocess(picture) for picture in opened_pictures(values)])

    @torch.no_grad()
    def embed(name: str, values: list[Any]) -> Tensor:
        if name == image:
            return network.encode_image(pixels(values), normalize=True)
        return network.encode_text(tokenizer(values), normalize=True)

    bias = None if network.logit_bias is None else network.logit_bias.item()
    scale = network.logit_scale.exp().item()
    origin = origin_of(model, names)
    if origin and origin.library == "open_clip":  # pictures of any mode, and no pixel apart
        return Reopened(embed, scale, bias)
    return Reopened(embed, scale, bias, pixels, network.visual.preprocess_cfg["std"])
