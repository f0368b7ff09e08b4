"""Open Hugging Face transformers: whole dual encoders, halves of them, and encoders of texts, pictures or sounds as towers."""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.libraries import opening, refuse_adapter
from mmcontrast.modalities import PADDING, Modality
from mmcontrast.modalities.library import LibraryAudio, LibraryImages, LibraryTexts
from mmcontrast.models.base import Origin, Tower
from mmcontrast.models.contrastive import ContrastiveModel, assembled
from mmcontrast.models.processors import Tokenizer, as_ours, extract_sound, network_inputs, prepare_pixels
from mmcontrast.models.sentence_transformers import SentenceSettings, sentence_settings
from mmcontrast.models.sizes import OWN_SIZES, Sizes, add_tokens, resize_positions, resized_processor
from mmcontrast.trust import NEVER_RUN, refuse_hub_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# what opens a config or a model takes beside the config's options
NO_CONFIG = {"attn_implementation", "dtype", "torch_dtype", "revision", "subfolder", "cache_dir", "token", "local_files_only"}
FIELD_OF = {"pixel_values": "image", "input_ids": "text", "input_values": "audio", "input_features": "audio"}
HALVES = ("clip_", "siglip_", "siglip2_", "clap_", "metaclip_2_")  # model types whose halves have pooled features
FULL_LENGTH = "siglip"  # and siglip2: trained on texts of the whole context's length
UNBOUNDED = 512  # tokens of a text, if neither the tokenizer nor the model has a limit
OWN_POOLING = "mmcontrast_pooling"  # in the config of an encoder that we export


class TransformersTower(Tower):
    """A tower of a transformers model; its features are the pooled last hidden states.

    Args:
        model: a name or folder with weights (`pretrained`) or only a config, a model type like "bert", or a network.
        config: overrides of its config; with a model type, the whole config: {hidden_size: 192, num_hidden_layers: 3}.
        pretrained: load the weights.
        pooling: "mean" over the tokens that are not padding, "first", or "last" of them.
        input: the name of the model's argument; default: its main input.
        length_chunks: sort the texts of a batch by length, and compute them in so many parts, each padded to its own longest:
            the same features with less padding. Reading the lengths makes a GPU wait.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel",
        config: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        pooling: Literal["mean", "first", "last"] = "mean",
        input: str | None = None,
        length_chunks: int = 1,
    ) -> None:
        super().__init__()
        from transformers import PreTrainedModel

        overrides = dict(config or {})
        if overrides.pop("trust_remote_code", False):
            raise UserError(f"transformers tower {model!r}: trust_remote_code: {NEVER_RUN}")
        if isinstance(pretrained, str):
            raise UserError(f"transformers tower: pretrained={pretrained!r} must be true or false: name the folder in model")
        if length_chunks < 1:
            raise UserError(f"transformers tower: length_chunks={length_chunks} must be 1 or more")
        with opening(f"transformers tower {model!r}", f"transformers tower {model}"):
            self.network = model if isinstance(model, PreTrainedModel) else _make_network(model, overrides, pretrained)
            self.network.float()  # a checkpoint may be in half precision; trainable weights are not
            self.width = _width(self.network.config)
        if getattr(self.network, "pooler", None) is not None:
            self.network.pooler = None  # pooled here; data parallelism refuses unused parameters
        if pooling not in ("mean", "first", "last"):
            raise UserError(f"transformers tower: pooling must be mean, first or last, not {pooling!r}")
        self.pooling, self.input = pooling, input or self.network.main_input_name
        self.length_chunks = length_chunks
        if self.input != "input_ids":
            if length_chunks != 1:
                raise UserError(f"transformers tower: length_chunks is for texts, this model's input is {self.input}")
            return
        if "attention_mask" not in inspect.signature(self.network.forward).parameters:
            name = type(self.network).__name__
            raise UserError(f"transformers tower: a {name} takes no attention_mask, so padding would mix into the features")
        self.context_length = positions_of(self.network, self.network.config)
        self.vocab_size = getattr(self.network.config, "vocab_size", None)

    def forward(self, batch: Tensor) -> Tensor:
        if self.input != "input_ids" or self.length_chunks == 1:
            return self._features(batch)
        lengths = (batch != PADDING).sum(1)
        order = lengths.argsort()
        parts = [self._features(batch[rows, : int(lengths[rows[-1]])]) for rows in order.chunk(self.length_chunks)]
        return torch.cat(parts)[order.argsort()]

    def _features(self, batch: Tensor) -> Tensor:
        """Return the pooled features of a batch."""
        inputs: dict[str, Tensor] = {self.input: batch}
        mask = None
        if self.input == "input_ids":
            mask = batch != PADDING
            inputs = {self.input: batch.masked_fill(~mask, 0)}  # any token: it is masked
            inputs["attention_mask"] = mask.long()
        elif self.input == "input_values" and batch.isnan().any():
            if getattr(self.network.config, "feat_extract_norm", "layer") != "layer":
                raise UserError(
                    "transformers tower: this model's feat_extract_norm mixes padding into the features; set variable: false of"
                    " its audio modality, or take a model with feat_extract_norm: layer"
                )
            inputs = {self.input: batch.nan_to_num(0.0), "attention_mask": batch.isfinite().long()}
        hidden = self.network(**inputs).last_hidden_state
        if hidden.dim() == 4:  # a convolutional model's feature map: [N, C, H, W] → [N, H·W, C]
            hidden = hidden.flatten(2).transpose(1, 2)
        if self.input == "input_values" and "attention_mask" in inputs:
            mask = self.network._get_feature_vector_attention_mask(hidden.shape[1], inputs["attention_mask"])
        elif mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1).clamp(min=1) - 1]
        weight = mask.unsqueeze(2).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def positions_of(network: nn.Module, config: Any) -> int | None:
    """Return the most tokens of a text; None: any number. RoBERTa and similar models count positions from their padding's
    id."""
    number: int | None = getattr(config, "max_position_embeddings", None) or None
    if number is None:
        return None
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return number - module.padding_idx - 1
    return number


def _make_network(model: str, overrides: dict[str, Any], pretrained: bool) -> "PreTrainedModel":
    """Return a network of the library, with its weights or random ones."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    refuse_adapter(model)
    known = model in CONFIG_MAPPING and not pretrained
    make = (
        partial(AutoConfig.for_model, model) if known else partial(AutoConfig.from_pretrained, model, trust_remote_code=False)
    )
    config = make(**overrides)
    refuse_hub_attention(model, config)
    if pretrained:
        network, info = AutoModel.from_pretrained(
            model, trust_remote_code=False, output_loading_info=True, **{"dtype": torch.float32} | overrides
        )  # else transformers rounds the weights to the dtype that the config names
        if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
            raise UserError(f"{model}: {len(missing)} tensors are not in its checkpoint, as {missing[0]}")
        return network
    plain = make(**{option: value for option, value in overrides.items() if option in NO_CONFIG})
    for option in sorted(overrides.keys() - NO_CONFIG):  # the library would keep what nothing reads
        if not hasattr(plain, option):
            names = plain.to_dict()
            raise UserError(f"transformers tower {model!r}: config has no option {option!r}; {suggestion(option, names)}")
    return AutoModel.from_config(config, trust_remote_code=False)


def _width(config: Any) -> int:
    """Return the width of the last hidden state.

    Raises:
        ValueError: for models with several encoders.
    """
    if hasattr(config, "hidden_size"):
        return config.hidden_size
    if hasattr(config, "hidden_sizes"):
        return config.hidden_sizes[-1]
    raise ValueError(f"{config.model_type} has no one hidden size; name a single encoder, as clip_vision_model of clip")


def shortest_waveform(config: Any) -> int:
    """Return the samples that a network of waveforms needs for one frame; 1 for any other network."""
    samples = 1
    kernels, strides = getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ())
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def open_transformers(
    name: str, pooling: str | None = None, weights: bool = True, sizes: Sizes = OWN_SIZES
) -> ContrastiveModel:
    """Open a dual encoder with the fields image and text, or audio and text, or a single encoder with its field. Of CLAP's
    two logit scales, the one of audio → text is used.

    Args:
        name: a folder, or a name on the hub.
        weights: False: random ones.
        sizes: position embeddings of pictures are resized as transformers does; texts can only be cut earlier.
        pooling: of a plain encoder's last hidden states: "mean" (over the tokens that are not padding), "first" (the class
            token) or "last"; default: the class token of pictures if there is one, else the mean.

    Raises:
        UserError: for models without embeddings, or with missing weights; for a size that the model does not support.
        others: as transformers raises them.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    refuse_hub_attention(name, config)
    settings = sentence_settings(name, pooling)
    pooling = settings.pooling or getattr(config, OWN_POOLING, None)
    kind = (config.architectures or [""])[0]
    is_half = kind.endswith("WithProjection") or config.model_type.startswith(HALVES)
    opener: Any = getattr(transformers, kind, transformers.AutoModel) if is_half else transformers.AutoModel
    if weights:
        network, info = opener.from_pretrained(name, trust_remote_code=False, output_loading_info=True, dtype=torch.float32)
    else:
        network, info = opener._from_config(config) if is_half else opener.from_config(config), {"missing_keys": ()}
    network.float().eval()
    fields = [field for field in ("image", "audio", "text") if hasattr(network, f"get_{field}_features")]
    scales = [getattr(network, scale) for scale in ("logit_scale", "logit_scale_a") if hasattr(network, scale)]
    dual = len(fields) > 1 and bool(scales)
    plain = not dual and (not is_half or pooling is not None)
    missing = sorted(key for key in info["missing_keys"] if not (plain and key.startswith("pooler.")))
    if missing:
        raise UserError(f"{name}: its checkpoint lacks {len(missing)} tensors of {type(network).__name__}, as {missing[0]}")
    if pooling and dual:
        raise UserError(f"{name}: pooling={pooling!r} is for encoders of one field; a {type(network).__name__} has its own")
    kinds = fields if dual else [FIELD_OF.get(network.main_input_name, "")]
    for option, field in (("image_size", "image"), ("context_length", "text"), ("new_tokens", "text")):
        if field not in kinds:
            sizes.refuse(name, option, f"a {type(network).__name__} has no field of {field}s: leave it out")
    if sizes.image_size:
        resize_positions(name, network, sizes.image_size)
    tensors = network.state_dict()
    if dual:
        configs = {field: getattr(config, f"{'vision' if field == 'image' else field}_config") for field in fields}
        modalities = {field: _make_modality(name, field, network, configs[field], sizes, settings) for field in fields}
        towers = {}
        for field, modality in modalities.items():
            method = f"get_{field}_features"
            towers[field] = PooledTower(_half(network, method, modality), method, "pooler_output", network_inputs(modality))
            if isinstance(modality, LibraryTexts):  # for texts of another tokenizer, if a config gives one
                towers[field].context_length, towers[field].vocab_size = modality.context_length, configs[field].vocab_size
        model = assembled(modalities, towers, scales[0], getattr(network, "logit_bias", None))
        model.origin = Origin("transformers", name, rest=_other_tensors(tensors, towers))
        return model
    if config.is_encoder_decoder or network.main_input_name not in FIELD_OF:
        raise UserError(f"{name}: a {type(network).__name__} is neither a dual encoder nor an encoder of one field")
    field = FIELD_OF[network.main_input_name]
    modality = _make_modality(name, field, network, config, sizes, settings)
    output = f"{field}_embeds" if kind.endswith("WithProjection") else "pooler_output"
    if plain:
        tower: Tower = _make_plain_tower(name, network, field, pooling)
    else:
        tower = PooledTower(network, "__call__", output, network_inputs(modality))
    model = assembled({field: modality}, {field: tower})
    model.origin = Origin("transformers", name, pooling=pooling, rest=_other_tensors(tensors, {field: tower}))
    return model


def _other_tensors(tensors: Mapping[str, Tensor], towers: Mapping[str, Tower]) -> dict[str, Tensor]:
    """Return a network's tensors that no tower has: an unused pooler, the original scales and biases."""
    names = {name for tower in towers.values() for name in tower.network.state_dict()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in names}


class PooledTower(Tower):
    """A tower whose features a method of a transformers model returns.

    Args:
        network: for a dual encoder, the half with the modules that the method uses.
        method, output: the names of the method, and of the features in its output.
        inputs: a batch → the method's arguments.
    """

    def __init__(self, network: nn.Module, method: str, output: str, inputs: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.network, self.method, self.output, self.inputs = network, method, output, inputs

    def forward(self, batch: Tensor) -> Tensor:
        output = getattr(self.network, self.method)(**self.inputs(batch))
        return output if isinstance(output, Tensor) else output[self.output]  # some of transformers 4 return the tensor


def _half(network: nn.Module, method: str, modality: Modality) -> nn.Module:
    """Return a copy of a dual encoder with only the modules that a method of one field uses: which weights are locked, decay or
    learn at another rate is decided by their names."""
    used: set[str] = set()
    hooks = [child.register_forward_pre_hook(lambda *_, name=name: used.add(name)) for name, child in network.named_children()]
    with torch.no_grad():
        getattr(network, method)(**network_inputs(modality)(modality.collate([modality.blank()])))
    for hook in hooks:
        hook.remove()
    half = copy.copy(network)
    half._modules = {name: child for name, child in network._modules.items() if name in used}
    half._parameters = {
        name: parameter for name, parameter in network._parameters.items() if not name.startswith(("logit_scale", "logit_bias"))
    }
    return half


def _make_plain_tower(name: str, network: Any, field: str, pooling: str | None) -> Tower:
    """Return a tower of an encoder without pooled features.

    Raises:
        UserError: for an encoder of spectrograms.
    """
    if network.main_input_name == "input_features":
        raise UserError(f"{name}: a {type(network).__name__} takes spectrograms of any length, which are not masked here")
    class_token = field == "image" and any("cls_token" in parameter for parameter, _ in network.named_parameters())
    return _PlainTower(network, pooling=pooling or ("first" if class_token else "mean"))  # type: ignore[arg-type]


class _PlainTower(TransformersTower):
    """A tower that computes sounds of one length at a time, if the model's norm would mix padding into the features."""

    def _features(self, batch: Tensor) -> Tensor:
        if self.input != "input_values" or getattr(self.network.config, "feat_extract_norm", "layer") == "layer":
            return super()._features(batch)
        lengths = batch.isfinite().sum(1)
        features = batch.new_empty(len(batch), self.width)
        for length in lengths.unique().tolist():
            rows = lengths == length
            features[rows] = super()._features(batch[rows, :length]).to(features.dtype)
        return features


def _make_modality(
    name: str, field: str, network: nn.Module, config: Any, sizes: Sizes, settings: SentenceSettings
) -> Modality:
    """Return the modality of a field, from the files beside the weights."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    if field == "image":
        side = sizes.image_size or getattr(config, "image_size", None) or 224
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        if sizes.image_size:
            processor = resized_processor(name, processor, sizes.image_size)
        mode = None if getattr(processor, "do_convert_rgb", False) else "RGB"
        prepare, side = partial(prepare_pixels, processor), side if isinstance(side, int) else max(side)
        return LibraryImages(prepare, side, mode, as_ours=as_ours(processor, prepare))
    if field == "audio":
        extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
        return LibraryAudio(partial(extract_sound, extractor), extractor.sampling_rate, shortest_waveform(config))
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{name}: no tokenizer in it: save the model's own beside its weights")
    if sizes.new_tokens:
        config.vocab_size = add_tokens(name, network, tokenizer, sizes.new_tokens)
    positions = positions_of(network, config)
    length = min(tokenizer.model_max_length, positions or UNBOUNDED, settings.max_length or UNBOUNDED)
    if settings.lower and tokenizer.tokenize("A") != tokenizer.tokenize("a"):
        raise UserError(f"{name}: sentence-transformers lowers its texts, and its tokenizer does not: that is not read here")
    if sizes.context_length:
        if positions is not None and sizes.context_length > positions:
            reason = (
                f"it has {positions} positions, which transformers cannot resize: set at most that, or take open_clip's version"
            )
            sizes.refuse(name, "context_length", f"{reason} of the model, whose positions open_clip resizes")
        length = tokenizer.model_max_length = sizes.context_length  # the latter is saved with it
    full = config.model_type.startswith(FULL_LENGTH)
    return LibraryTexts(Tokenizer(tokenizer, length, full), length)
