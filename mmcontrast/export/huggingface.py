"""Export to transformers: a model of transformers as it was opened, or a CLIP of open_clip's as a CLIPModel."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.export.one_field import usage_of_one_field
from mmcontrast.export.open_clip import Half, image_half, preprocess_config, text_half
from mmcontrast.export.parity import Reopened, opened_pictures, unit
from mmcontrast.export.parts import image_and_text, kind_of, origin_of, scale_and_bias, unused
from mmcontrast.libraries import opening
from mmcontrast.modalities import AudioModality, TextModality
from mmcontrast.modalities.library import LibraryTexts
from mmcontrast.modalities.text import OPEN_CLIP, open_clip_tokenizer
from mmcontrast.models import ContrastiveModel, OpenClipTextTower, OpenClipTower, Origin, TransformersTower
from mmcontrast.models.transformers import FULL_LENGTH, OWN_POOLING, UNBOUNDED, positions_of

USAGE = """\
import torch
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("FOLDER").eval(), AutoProcessor.from_pretrained("FOLDER")
# SigLIP was trained on texts of one length: padding="max_length" there
inputs = processor(text=["a caption"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    features = model.get_text_features(**inputs)  # images: get_image_features, sounds: get_audio_features
    features = getattr(features, "pooler_output", features)  # of transformers 5
    texts = torch.nn.functional.normalize(features, dim=1)
"""
CLIP_NAMES = {  # of open_clip's two towers, and of a CLIPModel's
    "visual": {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
    },
    "text": {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final": "final_layer_norm",
    },
}
CLIP_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
CLIP_BLOCK |= {"attn.out_proj": "self_attn.out_proj"}


def write(model: ContrastiveModel, names: list[str], folder: Path) -> list[str]:
    """Write a model into an empty folder, and return notes.

    Raises:
        UserError: for towers that no model of transformers has.
    """
    origin = origin_of(model, names)
    if origin and origin.library == "transformers":
        return _write_transformers_model(model, names, folder, origin)
    towers = [type(model.towers[model.tower_of[name]]) for name in names]
    if all(issubclass(tower, OpenClipTower | OpenClipTextTower) for tower in towers):
        return _write_clip(model, names, folder)
    if any(issubclass(tower, TransformersTower) for tower in towers):
        raise UserError(
            "transformers composes two towers in a VisionTextDualEncoderModel alone, which pools by pooler_output, a layer that"
            " these towers do not have: export onnx or safetensors"
        )
    class_names = " and ".join(tower.__name__ for tower in towers)
    raise UserError(f"transformers has no model of a {class_names}: export open_clip, onnx or safetensors")


def _write_transformers_model(model: ContrastiveModel, names: list[str], folder: Path, origin: Origin) -> list[str]:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    towers = [model.towers[model.tower_of[name]] for name in names]
    networks: list[Any] = [tower.network for tower in towers]
    network, tensors = networks[0], dict(origin.rest)
    for tower_network in networks:
        tensors |= tower_network.state_dict()
    for name in names:
        if not isinstance(model.projections[model.tower_of[name]], nn.Identity):
            raise UserError(
                f"field {name!r}: a {type(network).__name__} has no place for the projection that follows its tower"
            )
    own_kinds = {kind for kind in ("image", "audio", "text") if hasattr(network, f"get_{kind}_features")}
    dual = len(own_kinds) > 1
    if dual and (sorted(own_kinds) != sorted(kind_of(model, name) for name in names)):
        fields = ",".join(name for name in model.modalities if kind_of(model, name) in own_kinds)
        raise UserError(f"a {type(network).__name__} is exported whole, and alone: --fields {fields}")
    if any(type(tower_network) is not type(network) for tower_network in networks):
        raise UserError(f"{', '.join(names)}: towers of different models of transformers are no one model: export onnx")
    if dual:
        network = type(network)(network.config)
        tensors |= _score_tensors(model, names, origin.rest, network.state_dict())
        network.load_state_dict(tensors)
        tensors = network.state_dict()
    if not dual and isinstance(towers[0], TransformersTower):
        setattr(network.config, OWN_POOLING, towers[0].pooling)  # `load` reads it
    network.eval().save_pretrained(folder, state_dict=tensors)
    parts = _preprocessors(model, names)
    processor: Any = PROCESSOR_MAPPING.get(type(network.config), None) if dual else None
    for part in [processor(**parts)] if processor else parts.values():
        part.save_pretrained(folder)
    return []


def usage(model: ContrastiveModel, names: list[str]) -> str:
    """Return lines that compute embeddings with transformers alone."""
    origin, tower = origin_of(model, names), model.towers[model.tower_of[names[0]]]
    if origin and origin.library == "transformers" and getattr(tower, "method", "__call__") == "__call__":
        length = getattr(model.modality(names[0]), "context_length", 0)
        return usage_of_one_field(tower, kind_of(model, names[0]), length)
    return USAGE


def _score_tensors(
    model: ContrastiveModel, names: list[str], original: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the logit scale, or CLAP's two, and the bias. We learn one scale for both directions; if it has not changed, the
    second scale keeps its original value."""
    log_scale, bias = scale_and_bias(model, names)
    tensors = {"logit_scale": log_scale, "logit_scale_a": log_scale, "logit_scale_t": log_scale}
    first = original.get("logit_scale_a")
    if first is not None and torch.allclose(first.exp(), log_scale.exp(), rtol=1e-6, atol=0):
        tensors["logit_scale_t"] = original["logit_scale_t"]
    if (bias is None) != ("logit_bias" not in expected):
        raise UserError(
            "the model has learnt a logit bias, for which there is no place" if bias is not None else "no logit bias"
        )
    tensors |= {} if bias is None else {"logit_bias": bias}
    return {name: value.reshape(expected[name].shape) for name, value in tensors.items() if name in expected}


def _preprocessors(model: ContrastiveModel, names: list[str]) -> dict[str, Any]:
    """Return the fields' preprocessors of transformers, by the names of a processor's arguments."""
    processors: dict[str, Any] = {}
    for name in names:
        modality: Any = model.modality(name)
        if kind_of(model, name) == "image":
            processors["image_processor"] = modality.prepare.args[0]
        elif kind_of(model, name) == "audio":
            processors["feature_extractor"] = modality.extract.args[0]
        else:
            processors["tokenizer"] = unused(modality.tokenize.tokenizer)
    return processors


def _write_clip(model: ContrastiveModel, names: list[str], folder: Path) -> list[str]:
    """Write a vision transformer and a causal text transformer of open_clip's as a CLIPModel."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    image, text = image_and_text(model, names, "a CLIPModel")
    origin = origin_of(model, names)
    config = origin.config.get("model_cfg", {}) if origin else {}
    visual = image_half(model, image, config.get("vision_cfg"))
    textual = text_half(model, text, config.get("text_cfg"))
    log_scale, bias = scale_and_bias(model, names)
    vision_network: Any = model.towers[model.tower_of[image]].network
    text_network: Any = model.towers[model.tower_of[text]].network
    for reason in (
        *_clip_mismatches(visual, textual, vision_network, text_network),
        *(["it has a logit bias"] if bias is not None else []),
    ):
        raise UserError(f"a CLIPModel of transformers does not fit: {reason}. Export open_clip, onnx or safetensors")
    _check_tokenizer(model, text)
    size = vision_network.image_size
    size = size if isinstance(size, int) else size[0]
    activation = "quick_gelu" if visual.quick_gelu else "gelu"
    shared = {"hidden_act": activation, "projection_dim": model.embed_dim}
    clip_config = CLIPConfig(
        vision_config=shared | _size_options(visual.tensors, vision_network) | {
            "image_size": size, "patch_size": visual.tensors["conv1.weight"].shape[-1],
            "layer_norm_eps": vision_network.ln_post.eps,
        },
        text_config=shared | _size_options(textual.tensors, text_network) | {
            "vocab_size": len(textual.tensors["token_embedding.weight"]),
            "max_position_embeddings": len(textual.tensors["positional_embedding"]),
            "layer_norm_eps": text_network.ln_final.eps,
            "bos_token_id": open_clip_tokenizer().sot_token_id, "eos_token_id": open_clip_tokenizer().eot_token_id,
            "pad_token_id": open_clip_tokenizer().eot_token_id,
        },
        projection_dim=model.embed_dim,
    )  # fmt: skip
    network = CLIPModel(clip_config).eval()
    tensors = {f"vision_model.{key}": value for key, value in _rename_tensors(visual.tensors, CLIP_NAMES["visual"]).items()}
    tensors |= {f"text_model.{key}": value for key, value in _rename_tensors(textual.tensors, CLIP_NAMES["text"]).items()}
    tensors["visual_projection.weight"] = visual.tensors["proj"].T
    tensors["text_projection.weight"] = textual.tensors["text_projection"].T
    network.load_state_dict(tensors | {"logit_scale": log_scale})
    network.save_pretrained(folder)
    preprocess = preprocess_config(origin, model.modality(image))
    size_option = {"height": size, "width": size}
    shortest = preprocess["resize_mode"] == "shortest"
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size} if shortest else size_option, crop_size=size_option, do_center_crop=shortest,
        resample={"bicubic": 3, "bilinear": 2}[preprocess["interpolation"]],
        image_mean=preprocess["mean"], image_std=preprocess["std"],
    )  # fmt: skip
    CLIPProcessor(image_processor, clip_tokenizer(len(textual.tensors["positional_embedding"]))).save_pretrained(folder)
    return [
        "texts go through CLIP's tokenizer of transformers, which leaves HTML entities, curly quotes, ligatures and full-width"
        " characters as they are: texts with them get other embeddings than from open_clip, which replaces them by"
        " ftfy.fix_text and html.unescape. <|startoftext|> and <|endoftext|> in a text become its special tokens, where"
        " open_clip reads words"
    ]


def _clip_mismatches(visual: Half, textual: Half, vision: Any, text: Any) -> list[str]:
    """Return why a CLIPModel does not fit; [] if it fits."""
    if type(vision).__name__ != "VisionTransformer":
        return [f"its image tower is a {type(vision).__name__}, not open_clip's VisionTransformer"]
    if type(text).__name__ != "TextTransformer":
        return [f"its text tower is a {type(text).__name__}, not open_clip's TextTransformer"]
    image_options = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "patch_dropout"}
    image_options |= {"timm_model_pretrained"}
    text_options = {"context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio", "pool_type", "eos_id", "pad_id"}
    default_values: dict[str, tuple[Any, ...]] = {
        "pool_type": ("tok", "argmax", "eos"),
        "norm_kwargs": (None, {}),
        "act_kwargs": (None, {}),
        "proj_type": ("linear",),
    }
    for half, names in ((visual, image_options), (textual, text_options)):
        for option, value in half.config.items():
            if option in default_values:
                unsupported = value not in default_values[option]
            else:
                unsupported = option not in names and not option.startswith(("hf_tokenizer", "tokenizer_")) and bool(value)
            if unsupported:
                return [f"open_clip's {option}: {value}"]
    if visual.quick_gelu != textual.quick_gelu:
        return ["one of its towers computes with QuickGELU, the other with GELU"]
    if not isinstance(textual.tensors.get("text_projection"), Tensor) or "proj" not in visual.tensors:
        return ["a tower of it has no projection"]
    return []


def _size_options(tensors: Mapping[str, Tensor], network: Any) -> dict[str, Any]:
    block = network.transformer.resblocks[0]
    return {
        "hidden_size": network.ln_post.weight.shape[0] if hasattr(network, "ln_post") else network.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(network.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
    }


def _rename_tensors(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a tower's tensors with the names of transformers; a joint projection of query, key and value becomes three."""
    renamed = {}
    for key, value in tensors.items():
        if key in ("proj", "text_projection"):
            continue
        if not key.startswith("transformer.resblocks."):
            layer, _, suffix = key.rpartition(".")
            renamed[names[key] if key in names else f"{names[layer]}.{suffix}"] = value
            continue
        number, inner = key.removeprefix("transformer.resblocks.").split(".", 1)
        block = f"encoder.layers.{number}"
        if inner.startswith("attn.in_proj_"):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{block}.self_attn.{name}_proj.{inner.removeprefix('attn.in_proj_')}"] = part
        else:
            layer, _, suffix = inner.rpartition(".")
            renamed[f"{block}.{CLIP_BLOCK[layer]}.{suffix}"] = value
    return renamed


def _check_tokenizer(model: ContrastiveModel, text: str) -> None:
    """Check that texts are tokenized by CLIP's byte-pair encoding.

    Raises:
        UserError: if they are not.
    """
    modality = model.modality(text)
    if isinstance(modality, LibraryTexts):
        tokenizer = modality.tokenize.tokenizer
        is_simple_tokenizer = type(tokenizer).__name__ == "SimpleTokenizer" and tokenizer.reduction_fn is None
        if (
            is_simple_tokenizer
            and tokenizer.clean_fn.__name__ == "_clean_lower"
            and tokenizer.vocab_size == open_clip_tokenizer().vocab_size
        ):
            return
    elif isinstance(modality, TextModality) and modality.name == OPEN_CLIP:
        return
    raise UserError(
        "a CLIPModel of transformers does not fit: its texts have another tokenizer than CLIP's, or another cleaning"
    )


def clip_tokenizer(length: int) -> Any:
    """Return open_clip's byte-pair encoding as a tokenizer of transformers."""
    import transformers

    ours = open_clip_tokenizer()
    first, last = "<|startoftext|>", "<|endoftext|>"
    names = {ours.sot_token_id: first, ours.eot_token_id: last}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary = {names.get(number, token): number for token, number in ours.encoder.items()}
        files[0].write_text(json.dumps(vocabulary), encoding="utf-8")
        merges = sorted(ours.bpe_ranks, key=ours.bpe_ranks.__getitem__)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        files[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
        return transformers.CLIPTokenizerFast.from_pretrained(  # type: ignore[attr-defined]
            folder, bos_token=first, eos_token=last, unk_token=last, pad_token=last, model_max_length=length
        )


def reopen(folder: Path, names: list[str], model: ContrastiveModel) -> Reopened:
    """Reopen an export with transformers.

    Raises:
        UserError: if transformers cannot open it.
    """
    import transformers as hf

    kinds = {name: kind_of(model, name) for name in names}
    with opening(folder):
        config = hf.AutoConfig.from_pretrained(folder)
        kind = (config.architectures or [""])[0]
        opener = getattr(hf, kind, hf.AutoModel) if len(names) == 1 else hf.AutoModel
        network = opener.from_pretrained(folder).eval()
        processor: Any = hf.AutoProcessor.from_pretrained(folder) if len(names) > 1 else None
        images: Any = hf.AutoImageProcessor.from_pretrained(folder) if "image" in kinds.values() else None
        extractor: Any = hf.AutoFeatureExtractor.from_pretrained(folder) if "audio" in kinds.values() else None
        tokenizer: Any = getattr(processor, "tokenizer", None) or (
            hf.AutoTokenizer.from_pretrained(folder) if "text" in kinds.values() else None
        )

    def prepare_inputs(name: str, values: list[Any]) -> list[Any]:
        """Return the model's inputs in batches; each sound is a batch of its own."""
        if kinds[name] == "image":
            pictures = opened_pictures(values)
            if not getattr(images, "do_convert_rgb", False):
                pictures = [picture.convert("RGB") for picture in pictures]
            return [images(images=pictures, return_tensors="pt")]
        if kinds[name] == "text":
            text_config = getattr(config, "text_config", config)
            length = min(tokenizer.model_max_length, positions_of(network, text_config) or UNBOUNDED)
            padding = "max_length" if text_config.model_type.startswith(FULL_LENGTH) else True
            return [tokenizer(values, padding=padding, truncation=True, max_length=length, return_tensors="pt")]
        modality = model.modality(name)
        assert isinstance(modality, AudioModality) and extractor is not None
        inputs = []
        for value in values:
            np.random.seed(0)  # noqa: NPY002 - CLAP cuts long sounds at random places
            sound = modality.decode(value).numpy()
            inputs.append(extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt"))
        return inputs

    @torch.no_grad()
    def embed(name: str, values: list[Any]) -> Tensor:
        batches = prepare_inputs(name, values)
        return unit(torch.cat([_field_features(network, kinds[name], model, name, inputs) for inputs in batches]))

    state = network.state_dict()
    log_scale = state.get("logit_scale", state.get("logit_scale_a")) if len(names) > 1 else None
    bias = state.get("logit_bias")
    scores = (None if log_scale is None else log_scale.exp().item(), None if bias is None else bias.item())
    origin = origin_of(model, names)
    if origin and origin.library == "transformers":
        return Reopened(embed, *scores)
    image = image_and_text(model, names, "a CLIPModel")[0]
    return Reopened(embed, *scores, lambda values: prepare_inputs(image, values)[0]["pixel_values"], images.image_std)


def _field_features(network: Any, kind: str, model: ContrastiveModel, name: str, inputs: Any) -> Tensor:
    """Return the features of a field by transformers; of a plain encoder, its pooled last hidden states."""
    method = getattr(network, f"get_{kind}_features", None)
    if method is not None:
        output = method(**inputs)
        return output if isinstance(output, Tensor) else output["pooler_output"]
    output, tower = network(**inputs), model.towers[model.tower_of[name]]
    if not isinstance(tower, TransformersTower):
        return output[f"{kind}_embeds"] if f"{kind}_embeds" in output else output["pooler_output"]
    hidden = output.last_hidden_state
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
    mask = inputs["attention_mask"] if kind == "text" else torch.ones(hidden.shape[:2], dtype=torch.long)
    if tower.pooling == "first":
        return hidden[:, 0]
    if tower.pooling == "last":
        return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
    return (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
