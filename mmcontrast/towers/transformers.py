"""Any Hugging Face encoder as a tower: text, pictures, or spectrograms."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.library_messages import library_messages, tell
from mmcontrast.towers.base import PADDING, Tower, library_errors
from mmcontrast.trust import NEVER_RUN, library_code_refused, refuse_hub_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersTower(Tower):
    """The pooled last hidden state of a transformers model.

    Args:
        model: a name or folder with weights (`pretrained`) or with a config alone, a model type like "bert", or a model itself.
        config: overrides of its config; with a model type, the whole of it: {hidden_size: 192, num_hidden_layers: 3}.
        pretrained: load the weights.
        pooling: "mean" over the tokens that are not padding, "first", or "last" of them.
        input: the name of the model's argument; by default its own main input.
        length_chunks: texts of a batch are sorted by length and computed in so many parts, each padded to its own
            longest: the same features, less padding computed. Reading the lengths makes a GPU wait.
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
        what = f"transformers tower {model!r}"
        with library_errors(what), library_messages(f"transformers tower {model}"), library_code_refused(str(model)):
            self.network = model if isinstance(model, PreTrainedModel) else _network(model, overrides, pretrained)
            self.network.float()  # a checkpoint may be of half precision; the weights that learn are not
            self.width = _width(self.network.config)
        if getattr(self.network, "pooler", None) is not None:
            self.network.pooler = None  # we pool ourselves; data parallelism refuses parameters that nobody uses
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
        inputs: dict[str, Tensor] = {self.input: batch}
        mask = None
        if self.input == "input_ids":
            mask = batch != PADDING
            inputs = {self.input: batch.masked_fill(~mask, 0)}  # any token: the mask leaves it out
            inputs["attention_mask"] = mask.long()
        elif self.input == "input_values" and batch.isnan().any():
            if getattr(self.network.config, "feat_extract_norm", "layer") != "layer":
                raise UserError(
                    "transformers tower: this model's feat_extract_norm mixes padding into the features; set variable: false of"
                    " its audio modality, or take a model with feat_extract_norm: layer"
                )
            inputs = {self.input: batch.nan_to_num(0.0), "attention_mask": batch.isfinite().long()}
        hidden = self.network(**inputs).last_hidden_state
        if hidden.dim() == 4:  # a convolutional model's map: [N, C, H, W] → [N, H·W, C]
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
    """The most tokens of a text; None: any number. RoBERTa and its kin count positions from their padding's id on."""
    number: int | None = getattr(config, "max_position_embeddings", None) or None
    if number is None:
        return None
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return number - module.padding_idx - 1
    return number


def _network(model: str, overrides: dict[str, Any], pretrained: bool) -> "PreTrainedModel":
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    if model in CONFIG_MAPPING and not pretrained:
        config = AutoConfig.for_model(model, **overrides)
    else:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False, **overrides)
    refuse_hub_attention(model, config)
    if pretrained:
        network, info = AutoModel.from_pretrained(model, trust_remote_code=False, output_loading_info=True, **overrides)
        if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
            what = f"{len(missing)} tensors are not in its checkpoint and start random, as {missing[0]}"
            tell(f"transformers tower {model}: {what}")
        return network
    return AutoModel.from_config(config, trust_remote_code=False)


def _width(config: Any) -> int:
    """Of the last hidden state.

    Raises:
        ValueError: for models that have several.
    """
    if hasattr(config, "hidden_size"):
        return config.hidden_size
    if hasattr(config, "hidden_sizes"):
        return config.hidden_sizes[-1]
    raise ValueError(f"{config.model_type} has no one hidden size; name a single encoder, as clip_vision_model of clip")


def shortest_waveform(config: Any) -> int:
    """Return how many samples a network of waveforms needs for one frame; 1 for any other."""
    samples = 1
    for kernel, stride in zip(*(reversed(getattr(config, f"conv_{name}", ())) for name in ("kernel", "stride")), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples
