"""Hugging Face transformers: dual encoders with all that belongs to them, halves of them, and plain encoders."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.modalities import Modality
from mmcontrast.model import ContrastiveModel
from mmcontrast.pretrained.base import LibraryTower, assembled
from mmcontrast.pretrained.modalities import LibraryAudio, LibraryImages, LibraryTexts
from mmcontrast.towers import PADDING, Tower, TransformersTower
from mmcontrast.towers.transformers import positions_of, shortest_waveform
from mmcontrast.trust import refuse_hub_attention

FIELD_OF = {"pixel_values": "image", "input_ids": "text", "input_values": "audio", "input_features": "audio"}
HALVES = ("clip_", "siglip_", "siglip2_", "clap_", "metaclip_2_")  # model types with pooled features of their own
FULL_LENGTH = "siglip"  # and siglip2: trained on texts of the whole context's length
UNBOUNDED = 512  # tokens of a text, where neither the tokenizer nor the model says


def open_transformers(name: str, pooling: str | None = None) -> ContrastiveModel:
    """A dual encoder's fields image and text, or audio and text; a single encoder's one. CLAP has a logit scale for each
    direction: the one of audio → text is taken.

    Args:
        name: a folder, or a name on the hub.
        pooling: of a plain encoder's last hidden states: "mean" (over the tokens that are not padding), "first" (the class
            token) or "last"; default: of pictures the class token if there is one, otherwise the mean.

    Raises:
        UserError: for models that embed nothing, or whose weights are not all there.
        others: as transformers does.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    refuse_hub_attention(name, config)
    kind = (config.architectures or [""])[0]
    half = kind.endswith("WithProjection") or config.model_type.startswith(HALVES)
    opener = getattr(transformers, kind, transformers.AutoModel) if half else transformers.AutoModel
    network, info = opener.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
    fields = [field for field in ("image", "audio", "text") if hasattr(network, f"get_{field}_features")]
    scales = [getattr(network, scale) for scale in ("logit_scale", "logit_scale_a") if hasattr(network, scale)]
    dual = len(fields) > 1 and bool(scales)
    plain = not dual and (not half or pooling is not None)
    missing = sorted(key for key in info["missing_keys"] if not (plain and key.startswith("pooler.")))
    if missing:
        raise UserError(f"{name}: its checkpoint lacks {len(missing)} tensors of {type(network).__name__}, as {missing[0]}")
    if pooling and dual:
        raise UserError(f"{name}: pooling={pooling!r} is for encoders of one field; a {type(network).__name__} has its own")
    if dual:
        parts = {field: getattr(config, f"{'vision' if field == 'image' else field}_config") for field in fields}
        modalities = {field: _modality(name, field, network, part) for field, part in parts.items()}
        towers = {field: _pooled(network, f"get_{field}_features", "pooler_output", modalities[field]) for field in fields}
        bias = getattr(network, "logit_bias", None)
        return assembled(modalities, towers, scales[0].exp().item(), None if bias is None else bias.item())
    if config.is_encoder_decoder or network.main_input_name not in FIELD_OF:
        raise UserError(f"{name}: a {type(network).__name__} is neither a dual encoder nor an encoder of one field")
    field = FIELD_OF[network.main_input_name]
    modality = _modality(name, field, network, config)
    output = f"{field}_embeds" if kind.endswith("WithProjection") else "pooler_output"
    tower = _plain(name, network, field, pooling) if plain else _pooled(network, "__call__", output, modality)
    return assembled({field: modality}, {field: tower})


def _pooled(network: nn.Module, method: str, output: str, modality: Modality) -> Tower:
    """The features that a method of the network calls its own."""

    def features(network: nn.Module, batch: Tensor) -> Tensor:
        found = getattr(network, method)(**_inputs(modality)(batch))
        return found if isinstance(found, Tensor) else found[output]  # transformers 4 gives some as they are

    return LibraryTower(network, features)


def _plain(name: str, network: Any, field: str, pooling: str | None) -> Tower:
    if network.main_input_name == "input_features":
        raise UserError(f"{name}: a {type(network).__name__} takes spectrograms of any length, which are not masked here")
    class_token = field == "image" and any("cls_token" in parameter for parameter, _ in network.named_parameters())
    return _PlainTower(network, pooling=pooling or ("first" if class_token else "mean"))  # type: ignore[arg-type]


class _PlainTower(TransformersTower):
    """Sounds of one length at a time, where the model's norm would mix padding into the features."""

    def _features(self, batch: Tensor) -> Tensor:
        if self.input != "input_values" or getattr(self.network.config, "feat_extract_norm", "layer") == "layer":
            return super()._features(batch)
        lengths = batch.isfinite().sum(1)
        features = batch.new_empty(len(batch), self.width)
        for length in lengths.unique().tolist():
            rows = lengths == length
            features[rows] = super()._features(batch[rows, :length]).to(features.dtype)
        return features


def _modality(name: str, field: str, network: nn.Module, config: Any) -> Modality:
    """Of the files beside the weights."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    if field == "image":
        side = getattr(config, "image_size", None) or 224
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        mode = None if getattr(processor, "do_convert_rgb", False) else "RGB"
        return LibraryImages(partial(_pixels, processor), side if isinstance(side, int) else max(side), mode)
    if field == "audio":
        extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
        return LibraryAudio(partial(_sound, extractor), extractor.sampling_rate, shortest_waveform(config))
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{name}: no tokenizer in it: save the model's own beside its weights")
    length = min(tokenizer.model_max_length, positions_of(network, config) or UNBOUNDED)
    full = config.model_type.startswith(FULL_LENGTH)
    return LibraryTexts(_Tokenizer(tokenizer, length, full), length)


def _pixels(processor: Any, image: Image.Image) -> Tensor:
    """Of patches (NaFlex): [patches, values], and a last row that begins with their rows and columns."""
    prepared = processor(images=image, return_tensors="pt")
    pixels = prepared["pixel_values"][0]
    if "spatial_shapes" not in prepared:
        return pixels
    shape = prepared["spatial_shapes"][0].to(pixels.dtype)
    return torch.cat([pixels, F.pad(shape, (0, pixels.shape[1] - 2))[None]])


def _sound(extractor: Any, sound: np.ndarray) -> Tensor:
    state = np.random.get_state()  # noqa: NPY002 - CLAP cuts long sounds at random places, also where nothing is trained
    np.random.seed(0)  # noqa: NPY002
    prepared = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    np.random.set_state(state)  # noqa: NPY002
    return prepared[extractor.model_input_names[0]][0].float()


@dataclass(frozen=True)
class _Tokenizer:
    """A text → its ids; a batch of them → what the network takes. Texts of the whole context have a mask only if the tokenizer
    gives one.

    Attributes:
        full: texts are padded to `length`.
    """

    tokenizer: Any
    length: int
    full: bool

    def __call__(self, text: str) -> Tensor:
        padding = "max_length" if self.full else False
        encoded = self.tokenizer(text, padding=padding, truncation=True, max_length=self.length, return_tensors="pt")
        ids = encoded["input_ids"][0]
        return ids.masked_fill(encoded["attention_mask"][0] == 0, PADDING) if "attention_mask" in encoded else ids

    def inputs(self, batch: Tensor) -> dict[str, Tensor]:
        mask = batch != PADDING
        ids = {"input_ids": batch.masked_fill(~mask, self.tokenizer.pad_token_id or 0)}
        masked = not self.full or "attention_mask" in self.tokenizer.model_input_names
        return ids | ({"attention_mask": mask.long()} if masked else {})


def _inputs(modality: Modality) -> Callable[[Tensor], dict[str, Tensor]]:
    """What the network takes, of a batch."""
    if isinstance(modality, LibraryTexts):
        return modality.tokenize.inputs
    return _audio_inputs if isinstance(modality, LibraryAudio) else _image_inputs


def _audio_inputs(batch: Tensor) -> dict[str, Tensor]:
    """CLAP with fusion takes one of a batch as longer, as the extractor does with each alone."""
    return {"input_features": batch, "is_longer": torch.ones(len(batch), 1, dtype=torch.bool, device=batch.device)}


def _image_inputs(batch: Tensor) -> dict[str, Tensor]:
    if batch.dim() == 4:
        return {"pixel_values": batch}
    pixels, shapes = batch[:, :-1], batch[:, -1, :2].long()
    mask = torch.arange(pixels.shape[1], device=batch.device) < shapes.prod(1, keepdim=True)
    return {"pixel_values": pixels, "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}
