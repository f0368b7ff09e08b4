"""Export to our own format: a model's composition and weights, which `mmcontrast.load` opens and training can start from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.export import huggingface, open_clip
from mmcontrast.export.parity import Reopened
from mmcontrast.export.parts import copied, kind_of, origin_of, scale_and_bias, unused
from mmcontrast.modalities import ImageModality, TextModality
from mmcontrast.modalities.text import OPEN_CLIP
from mmcontrast.models import ContrastiveModel, Origin, Tower, TransformersTower, open_model
from mmcontrast.models.bare import BARE_CONFIG, BARE_WEIGHTS, FORMAT, LIBRARY
from mmcontrast.models.open_clip import model_config, quick_gelu
from mmcontrast.options import Component
from mmcontrast.strict_json import dumps

USAGE = """\
import mmcontrast

model = mmcontrast.load("FOLDER")
texts = model.embed(texts=["a caption"])  # images=, audio=, vectors=: paths, bytes, or values
print(model.fields, model.model.log_logit_scale.exp())
"""
WEIGHTS_FROM = ("pretrained", "pretrained_image", "pretrained_text", "pretrained_image_path", "pretrained_text_path")
NOT_OF_A_CONFIG = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


def write(model: ContrastiveModel, names: list[str], folder: Path) -> list[str]:
    """Write a model into an empty folder, and return notes.

    Raises:
        UserError: for a model of unknown origin.
    """
    if model.origin is None:
        raise UserError("nothing says how this model was made: open it by mmcontrast.load, or compose it of a config")
    description: dict[str, Any] = {"format": FORMAT}
    origin = origin_of(model, names)
    assert origin
    if any(model.origin.starts.get(model.tower_of[name]) for name in names) and origin is model.origin:
        start_fields = [name for name in names if model.tower_of[name] in model.origin.starts]
        remedy = f", or --fields {','.join(start_fields)}" if len(start_fields) < len(names) else ""
        raise UserError(f"this format holds a model that is composed, or one that it began with, not both: export onnx{remedy}")
    if origin.library == "mmcontrast":
        parts, notes = _composed(model, names, folder)
        description |= parts
        used = {model.tower_of[name] for name in names}
        unused_towers = [tower for tower in model.towers if tower not in used]
        unused_prefixes = tuple(f"{kind}.{tower}." for kind in ("towers", "projections") for tower in unused_towers)
        unused_scales = {f"hyperbolic.log_scales.{tower}" for tower in unused_towers}
        tensors = {
            key: value
            for key, value in model.state_dict().items()
            if not key.startswith(unused_prefixes) and key not in unused_scales
        }
        if model.pairs:
            log_scale, _ = scale_and_bias(model, names) if len(names) == 2 else (model.log_logit_scale.detach(), None)
            tensors["log_logit_scale"] = log_scale.reshape(-1)
        save_file(copied(tensors), folder / BARE_WEIGHTS, {"format": "pt"})
    else:
        description["library"] = {"folder": LIBRARY, "pooling": origin.pooling}
        (folder / LIBRARY).mkdir()
        notes = write_library(model, names, folder / LIBRARY, origin)
    (folder / BARE_CONFIG).write_text(dumps(description, indent=1), encoding="utf-8")
    return notes


def write_library(model: ContrastiveModel, names: list[str], folder: Path, origin: Origin) -> list[str]:
    """Write a model of another library as that library's own folder."""
    if origin.library == "open_clip":
        return open_clip.write(model, names, folder)
    if origin.library == "transformers":
        return huggingface.write(model, names, folder)
    from timm.models import save_for_hf

    network: Any = model.towers[model.tower_of[names[0]]].network
    save_for_hf(network, str(folder), model_args=dict(origin.config), safe_serialization=True)
    return []


def _composed(model: ContrastiveModel, names: list[str], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return fields, towers and model as in a config, without references to other files, and notes."""
    assert model.origin
    config, fields, notes = model.origin.config, {}, []
    for name in names:
        options = {key: value for key, value in config["fields"][name].items() if key not in ("negative_of", "own")}
        modality, spec = model.modality(name), _mapping(options["modality"])
        if isinstance(modality, ImageModality) and spec.get("type") == "image":
            spec["background"] = modality.background  # its default is that of the tower's pretrained weights
        if isinstance(modality, TextModality) and modality.name != OPEN_CLIP:
            spec["tokenizer"] = f"tokenizers/{name}"
            unused(modality.tokenizer).save_pretrained(folder / spec["tokenizer"])
        fields[name] = options | {"modality": spec}
    towers = {}
    for name in dict.fromkeys(model.tower_of[field] for field in names):
        tower = model.towers[name]
        assert isinstance(tower, Tower)
        towers[name] = _without_weights(tower, _mapping(config["towers"][name]))
        source = towers[name].get("model")
        if isinstance(source, str) and (":" in source or Path(source).exists()):
            notes.append(f"its tower {name} is made of what lies at {source}, which must be there where the folder is opened")
        if ":" in str(towers[name]["type"]):
            notes.append(f"its tower {name} is code of your own, {towers[name]['type']}: it opens with trust_code=True")
    options = dict(config["model"])
    if isinstance(options.get("projection"), dict):
        options["projection"] = {tower: kind for tower, kind in options["projection"].items() if tower in towers}
    if len(names) < 3 and model.pairs:
        options["scale_per_pair"] = False
    description = {"fields": fields, "towers": towers, "model": options}
    return description | ({"score": model.score.model_dump(mode="json")} if model.score else {}), notes


def _mapping(spec: Component) -> dict[str, Any]:
    return {"type": spec} if isinstance(spec, str) else dict(spec)


def _without_weights(tower: Tower, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tower's options that build it without pretrained weights: ours are loaded afterwards."""
    kind, options = spec["type"], {option: value for option, value in spec.items() if option not in WEIGHTS_FROM}
    if kind == "open_clip" and isinstance(spec["model"], str):
        if quick_gelu(spec["model"], spec.get("pretrained")):  # by its tag
            options.setdefault("force_quick_gelu", True)
        if "hf_model_name" in model_config(spec["model"]).get("text_cfg", {}):
            options["pretrained_text"] = False
    if kind == "transformers" and isinstance(tower, TransformersTower):
        from transformers import CONFIG_MAPPING

        network_config = tower.network.config
        if network_config.model_type in CONFIG_MAPPING:
            config_values = json.loads(network_config.to_json_string(use_diff=True))
            options["config"] = {key: value for key, value in config_values.items() if key not in NOT_OF_A_CONFIG}
            options["model"] = network_config.model_type
    return options


def reopen(folder: Path, names: list[str], model: ContrastiveModel) -> Reopened:
    opened = open_model(str(folder), trust_code=True)  # our own, of a moment ago
    embedder = Embedder(opened, folder.name, "cpu")

    def embed(name: str, values: list[Any]) -> Any:
        query: dict[str, Any] = {
            {"image": "images", "text": "texts", "vector": "vectors"}.get(kind_of(model, name), "audio"): values
        }
        return embedder.embed(**query, field=name, progress=False)

    if len(names) > 2 and model.pairs:
        return Reopened(embed)
    log_scale, bias = scale_and_bias(opened, names)
    return Reopened(embed, log_scale.exp().item(), None if bias is None else bias.item())
