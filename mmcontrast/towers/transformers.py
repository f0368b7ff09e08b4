"""Any Hugging Face encoder as a tower: text, pictures, or spectrograms."""

from collections.abc import Mapping
from typing import Any, Literal

import huggingface_hub.errors
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedModel

from mmcontrast.errors import UserError
from mmcontrast.towers.base import Tower

WRONG_VALUE = getattr(huggingface_hub.errors, "StrictDataclassError", ValueError)  # of a config, in newer versions


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
        model: str | PreTrainedModel,
        config: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        pooling: Literal["mean", "first", "last"] = "mean",
        input: str | None = None,
        length_chunks: int = 1,
    ) -> None:
        super().__init__()
        overrides = dict(config or {})
        self.pad_id: int | None = None  # of the texts; set with the modality
        try:
            if isinstance(model, PreTrainedModel):
                self.network = model
            elif pretrained:
                self.network = AutoModel.from_pretrained(model, **overrides)
            elif model in CONFIG_MAPPING:
                self.network = AutoModel.from_config(AutoConfig.for_model(model, **overrides))
            else:
                self.network = AutoModel.from_config(AutoConfig.from_pretrained(model, **overrides))
            self.network.float()  # a checkpoint may be of half precision; the weights that learn are not
            self.width = _width(self.network.config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, WRONG_VALUE) as error:
            raise UserError(f"transformers tower {model!r}: {' '.join(str(error).split())[:300]}") from error
        if getattr(self.network, "pooler", None) is not None:
            self.network.pooler = None  # we pool ourselves; data parallelism refuses parameters that nobody uses
        if pooling not in ("mean", "first", "last"):
            raise UserError(f"transformers tower: pooling must be mean, first or last, not {pooling!r}")
        self.pooling, self.input = pooling, input or self.network.main_input_name
        self.length_chunks = length_chunks

    def forward(self, batch: Tensor) -> Tensor:
        if self.input != "input_ids" or self.length_chunks == 1:
            return self._features(batch)
        lengths = self._mask(batch).sum(1)
        order = lengths.argsort()
        parts = [self._features(batch[rows, : int(lengths[rows[-1]])]) for rows in order.chunk(self.length_chunks)]
        return torch.cat(parts)[order.argsort()]

    def _mask(self, tokens: Tensor) -> Tensor:
        return torch.ne(tokens, (self.network.config.pad_token_id or 0) if self.pad_id is None else self.pad_id)

    def _features(self, batch: Tensor) -> Tensor:
        inputs: dict[str, Tensor] = {self.input: batch}
        mask = None
        if self.input == "input_ids":
            mask = self._mask(batch)
            inputs = {self.input: batch.clamp(min=0)}  # a pad_id of −1 is no token's
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
