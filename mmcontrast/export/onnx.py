"""Export to ONNX: a file for each field, from prepared values to unit embeddings, usable without torch or this package."""

import contextlib
import copy
import io
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # noqa: F401 - with the next: a missing package is reported before the work
import onnxscript  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.export import onnx_embed
from mmcontrast.export.huggingface import clip_tokenizer
from mmcontrast.export.open_clip import preprocess_config
from mmcontrast.export.parity import Reopened
from mmcontrast.export.parts import kind_of, origin_of, scale_and_bias, unused
from mmcontrast.modalities import PADDING, AudioModality, ImageModality, TextModality, VectorModality
from mmcontrast.modalities.image import LIBRARIES
from mmcontrast.modalities.library import LibraryAudio, LibraryImages, LibraryTexts
from mmcontrast.modalities.text import OPEN_CLIP
from mmcontrast.models import ContrastiveModel, TransformersTower
from mmcontrast.models.open_clip import OpenClipTextReader
from mmcontrast.strict_json import dumps

OPSET = 18
LARGEST = 2**31 - 2**27  # bytes of weights in the ONNX file: beyond, they get a file of their own
FORMAT = "mmcontrast onnx 1"
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
USAGE = """\
from embed import Embedder  # embed.py of this folder: numpy, Pillow, onnxruntime, tokenizers, ftfy

model = Embedder("FOLDER")
print(model.about["fields"])  # per field: its ONNX file, and how values are prepared
rows = model.embed("text", ["a caption"])  # unit rows; pictures: paths, bytes or PIL images
"""


class FieldModel(nn.Module):
    """The model of one field, from the ONNX file's inputs to unit embeddings.

    Args:
        prepare: the inputs of the ONNX file → what the field's tower takes.
        fp16: the tower and its projection compute in half precision, in a copy.
    """

    def __init__(self, model: ContrastiveModel, field: str, prepare: Any, fp16: bool = False) -> None:
        super().__init__()
        tower = model.tower_of[field]
        self.tower, self.projection, self.prepare = model.towers[tower], model.projections[tower], prepare
        self.fp16 = fp16
        if fp16:
            self.tower, self.projection = copy.deepcopy(self.tower).half(), copy.deepcopy(self.projection).half()

    def forward(self, *inputs: Tensor) -> Tensor:
        prepared = self.prepare(*inputs)
        if self.fp16 and prepared.is_floating_point():
            prepared = prepared.half()
        return F.normalize(self.projection(self.tower(prepared)).float(), dim=1)


def write(model: ContrastiveModel, names: list[str], folder: Path, fp16: bool = False) -> list[str]:
    """Write a model into an empty folder, and return notes.

    Raises:
        UserError: for a field that cannot be exported, or whose preprocessing preprocess.json cannot describe.
    """
    fields: dict[str, Any] = {}
    notes: list[str] = []
    for name in names:
        if Path(name).name != name:
            raise UserError(f"field {name!r} gives a file no name")
        description, inputs, prepare = _describe_field(model, name, folder, notes)
        description["file"] = f"{name}.onnx"
        _export(FieldModel(model, name, prepare, fp16).eval(), inputs, folder / description["file"], name)
        fields[name] = description
    if len(names) == 2 or not model.pairs:
        log_scale, bias = scale_and_bias(model, names)
        scores = {"logit_scale": log_scale.exp().item(), "logit_bias": None if bias is None else bias.item()}
    else:
        scores = {"logit_scale": None, "logit_bias": None}
    description = {"format": FORMAT, "opset": OPSET, "precision": "fp16" if fp16 else "fp32", "embed_dim": model.embed_dim}
    description |= {**scores, "fields": fields}
    (folder / "preprocess.json").write_text(dumps(description, indent=1), encoding="utf-8")
    shutil.copyfile(onnx_embed.__file__, folder / "embed.py")
    return notes


def _describe_field(
    model: ContrastiveModel, name: str, folder: Path, notes: list[str]
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, dict[int, str]]], Any]:
    """Return (a field's entry in preprocess.json, the inputs by name, each with its dynamic axes, the module that prepares
    them)."""
    modality, kind = model.modality(name), kind_of(model, name)
    blank = modality.collate([modality.blank()] * 2)
    batch = {0: "batch"}
    if isinstance(modality, ImageModality):
        pixels = modality(blank)
        if pixels.dim() != 4:
            raise UserError(f"field {name!r}: pictures in patches of any number (NaFlex) are not exported: use a fixed size")
        return {"kind": kind} | _describe_images(model, name, modality), {"pixel_values": (pixels, batch)}, nn.Identity()
    if isinstance(modality, TextModality):
        return _describe_texts(model, name, modality, folder, notes)
    if isinstance(modality, LibraryAudio):
        features = modality(blank)
        if features.dim() != 4:
            raise UserError(f"field {name!r}: sounds of any length are not exported; a model of spectrograms of one size is")
        extractor: Any = modality.extract
        extractor.args[0].save_pretrained(folder / f"{name}_extractor")
        description = {"kind": kind, "sample_rate": modality.sample_rate, "extractor": f"{name}_extractor"}
        notes.append(f"{name}: its features are computed by transformers' feature extractor, which embed.py calls")
        return description, {"input_features": (features, batch)}, nn.Identity()
    if isinstance(modality, AudioModality):
        if modality.variable:
            raise UserError(f"field {name!r}: sounds that keep their own length are not exported: set variable: false")
        description = {"kind": kind, "sample_rate": modality.sample_rate, "samples": modality.length}
        return description, {"waveform": (torch.rand(2, modality.length) - 0.5, batch)}, _WaveformInput(modality)
    if isinstance(modality, VectorModality):
        return {"kind": kind, "width": modality.width}, {"vector": (torch.rand(2, modality.width), batch)}, nn.Identity()
    raise UserError(f"field {name!r}: a {type(modality).__name__} is not exported")


class _WaveformInput(nn.Module):
    """Maps samples in [-1, 1] to the tower's input, such as spectrograms."""

    def __init__(self, modality: AudioModality) -> None:
        super().__init__()
        self.modality = modality

    def forward(self, waveform: Tensor) -> Tensor:
        return self.modality((waveform * 32768).round().clamp(-32767, 32767))


class _MaskedIds(nn.Module):
    """Maps ids and their mask to ids that end with `PADDING`, as towers take them."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return ids.masked_fill(mask == 0, PADDING)


def _describe_images(model: ContrastiveModel, name: str, modality: ImageModality) -> dict[str, Any]:
    """Describe the preprocessing of pictures.

    Raises:
        UserError: if preprocess.json cannot describe it.
    """
    origin = origin_of(model, [name])
    library = origin.library if origin else ""
    if not isinstance(modality, LibraryImages):
        background = None if modality.background in LIBRARIES else list(modality.colour)
        resize = modality.resize_to
        options: dict[str, Any] = {"resize": resize if modality.resize == "shortest" else [resize, resize]}
        options |= {"crop": [modality.size] * 2, "interpolation": modality.interpolation}
        options |= {"mean": modality.mean, "std": modality.std, "channels": modality.channels, "background": background}
        return options | {"deep": background is not None}  # 16 bits are scaled to 8; libraries clip them
    common: dict[str, Any] = {"channels": 3, "background": None, "deep": False}
    prepare: Any = modality.prepare
    if library == "open_clip":
        config = preprocess_config(origin, modality)
        sides = modality(modality.collate([modality.blank()])).shape[-2:]
        if config["resize_mode"] in ("shortest", "squash") and (config["resize_mode"] == "squash" or sides[0] == sides[1]):
            options = (
                {"resize": sides[0], "crop": list(sides)}
                if config["resize_mode"] == "shortest"
                else {"resize": list(sides), "crop": None}
            )
            return common | options | {key: config[key] for key in ("interpolation", "mean", "std")}
        raise UserError(f"field {name!r}: open_clip's resize_mode {config['resize_mode']} has no words in preprocess.json")
    if library == "transformers":
        return common | _describe_processor(prepare.args[0], name)
    import timm

    network: Any = model.towers[model.tower_of[name]].network
    config = timm.data.resolve_model_data_config(network)
    height, width = config["input_size"][1:]
    if config["crop_mode"] != "center" or height != width:
        raise UserError(f"field {name!r}: timm's crop_mode {config['crop_mode']} has no words in preprocess.json")
    options = {"resize": int(height / config["crop_pct"]), "crop": [height, width], "interpolation": config["interpolation"]}
    options |= {"mean": list(config["mean"]), "std": list(config["std"]), "channels": config["input_size"][0]}
    return common | options


def _describe_processor(processor: Any, name: str) -> dict[str, Any]:
    """Describe an image processor of transformers by the keys of preprocess.json."""
    size = dict(processor.size)
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    resize = size.get("shortest_edge") or [size.get("height"), size.get("width")]
    exact = {side for side, value in size.items() if value} in ({"shortest_edge"}, {"height", "width"})
    supported = (
        exact
        and processor.do_resize
        and abs(processor.rescale_factor * 255 - 1) < 1e-6
        and int(processor.resample) in RESAMPLING
    )
    if not supported or not processor.do_normalize or (crop is None and isinstance(resize, int)):
        raise UserError(f"field {name!r}: a {type(processor).__name__} with these options has no words in preprocess.json")
    return {
        "resize": resize,
        "crop": [crop["height"], crop["width"]] if crop else None,
        "interpolation": RESAMPLING[int(processor.resample)],
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "background": [255, 255, 255] if getattr(processor, "do_convert_rgb", False) else None,
    }


def _describe_texts(
    model: ContrastiveModel, name: str, modality: TextModality, folder: Path, notes: list[str]
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, dict[int, str]]], Any]:
    """Describe and save the tokenizer of a field of texts; returns as `_describe_field`."""
    tower: Any = model.towers[model.tower_of[name]]
    fixed_length = isinstance(tower, OpenClipTextReader)
    length, clean, pads_fully, repair = modality.context_length, "", False, True  # open_clip repairs texts
    if isinstance(modality, LibraryTexts) and fixed_length:  # open_clip's own
        library_tokenizer = modality.tokenize.tokenizer
        clean = {"_clean_whitespace": "whitespace", "_clean_canonicalize": "canonicalize", "_clean_lower": ""}.get(
            getattr(getattr(library_tokenizer, "clean_fn", None), "__name__", "_clean_canonicalize"), "?"
        )
        unsupported = (
            getattr(library_tokenizer, "reduction_fn", None)
            or getattr(library_tokenizer, "strip_sep_token", False)
            or getattr(library_tokenizer, "tokenizer_mode", "")
        )
        if clean == "?" or unsupported:
            raise UserError(
                f"field {name!r}: its tokenizer cuts or cleans texts in a way that preprocess.json has no words for"
            )
        tokenizer = unused(library_tokenizer.tokenizer) if hasattr(library_tokenizer, "tokenizer") else clip_tokenizer(length)
        pad_id = tokenizer.pad_token_id if hasattr(library_tokenizer, "tokenizer") else 0
    elif isinstance(modality, LibraryTexts):
        repair = False
        tokenizer, pads_fully = unused(modality.tokenize.tokenizer), modality.tokenize.full
        pad_id = tokenizer.pad_token_id
    else:
        repair = modality.name == OPEN_CLIP
        tokenizer = clip_tokenizer(length) if repair else unused(modality.tokenizer)
        pad_id = modality.pad_id
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"field {name!r}: a {type(tokenizer).__name__} has no tokenizer.json, by which embed.py could read texts"
        )
    tokenizer.save_pretrained(folder / f"{name}_tokenizer")
    constant_width = fixed_length or pads_fully
    pads_left = tokenizer.padding_side == "left" and constant_width
    context = tower.network.context_length if fixed_length and not tower.masks else length
    description: dict[str, Any] = {"kind": "text", "tokenizer": f"{name}_tokenizer", "length": length, "clean": clean}
    description |= {"pad_id": pad_id or 0, "pad_left": pads_left, "pad_to": context if constant_width else None}
    # of open_clip's own encoding: the names that transformers gives its special tokens are words like others
    literal = repair and "<|startoftext|>" in tokenizer.all_special_tokens
    description |= {"mask": not fixed_length, "repair": repair, "literal": literal}
    if isinstance(tower, TransformersTower):
        tower.length_chunks = 1  # reading the lengths has no place in a graph
    ids = torch.ones(2, context if constant_width else 7, dtype=torch.int64)
    axes = {0: "batch"} if constant_width else {0: "batch", 1: "sequence"}
    if fixed_length:
        return description, {"input_ids": (ids, axes)}, nn.Identity()
    return description, {"input_ids": (ids, axes), "attention_mask": (torch.ones_like(ids), axes)}, _MaskedIds()


def _export(model: FieldModel, inputs: dict[str, tuple[Tensor, dict[int, str]]], file: Path, name: str) -> None:
    """Export one field's model to a file.

    Raises:
        UserError: for a tower that torch's exporter refuses.
    """
    loggers = [logging.getLogger(logger) for logger in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    axes = {axis_name for _, dynamic in inputs.values() for axis_name in dynamic.values()}
    shared = {axis_name: torch.export.Dim(axis_name, max=512 if axis_name == "sequence" else 2**16) for axis_name in axes}
    shapes = tuple({axis: shared[axis_name] for axis, axis_name in dynamic.items()} for _, dynamic in inputs.values())
    num_bytes = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, tuple(value for value, _ in inputs.values()), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=list(inputs), output_names=["embeddings"], dynamic_shapes=(shapes,), optimize=True,
            )  # fmt: skip
            assert program is not None
            program.save(str(file), external_data=num_bytes > LARGEST)
            _check_and_strip(file)
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"field {name!r}: torch's ONNX exporter refuses its tower: {reason}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_and_strip(file: Path) -> None:
    """Check that a file takes any batch size, and strip its nodes' source locations: local paths, and most of a small file.

    Raises:
        ValueError: if its batch size is fixed.
    """
    exported = onnx.load(str(file), load_external_data=False)
    if not all(model_input.type.tensor_type.shape.dim[0].dim_param for model_input in exported.graph.input):
        raise ValueError("it computes with the number of samples that it was traced with")
    graph = exported.graph
    for part in (exported, graph, *graph.node, *graph.value_info, *graph.initializer, *exported.functions):
        for name in ("metadata_props", "doc_string"):
            part.ClearField(name)
    onnx.save(exported, str(file))


def reopen(folder: Path, names: list[str], model: ContrastiveModel) -> Reopened:
    embedder = onnx_embed.Embedder(folder)

    def embed(name: str, values: list[Any]) -> Tensor:
        alone = embedder.embed(name, values[:1])  # a batch of one, and of all
        rows = torch.from_numpy(embedder.embed(name, values))
        return torch.cat([torch.from_numpy(alone), rows[1:]])

    image = next((name for name in names if kind_of(model, name) == "image"), None)
    std = embedder.about["fields"][image]["std"] if image else [1.0]

    def pixels(values: list[bytes]) -> Tensor:
        return torch.from_numpy(embedder.prepare(str(image), values)["pixel_values"])

    return Reopened(embed, embedder.scale, embedder.bias, pixels if image else None, std)
