"""Prepare pictures, sounds and texts with the processors of transformers, and make a network's inputs of a batch of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmcontrast.modalities import PADDING, Modality
from mmcontrast.modalities.image import INTERPOLATIONS
from mmcontrast.modalities.library import LibraryAudio, LibraryTexts

RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def as_ours(processor: Any, prepare: Callable[[Image.Image], Tensor]) -> dict[str, Any] | str:
    """Return the options of `ImageModality` that do what an image processor does, which augments nothing; or why there are
    none. `models/decoding.py` compares the pixels, and so finds anything else that it does."""
    size = {side: value for side, value in dict(getattr(processor, "size", None) or {}).items() if value}
    crop = dict(getattr(processor, "crop_size", None) or {}) if getattr(processor, "do_center_crop", False) else {}
    method = RESAMPLING.get(int(getattr(processor, "resample", None) or 0), "")
    if size.keys() not in ({"shortest_edge"}, {"height", "width"}) or not getattr(processor, "do_resize", True):
        return f"a {type(processor).__name__} that scales to {size or 'nothing'}"
    if len(set((crop or size).values())) > 1 or len(set(size.values())) > 1:
        return f"pictures of {crop or size} are no squares"
    if method not in INTERPOLATIONS:
        return f"resample {processor.resample}: ours is {' or '.join(INTERPOLATIONS)}"
    resize_to = next(iter(size.values()))
    side = next(iter(crop.values()), resize_to)
    options = {"size": side, "resize_to": resize_to, "interpolation": method, "augment": []}
    options["resize"] = "shortest" if "shortest_edge" in size else "squash"
    if getattr(processor, "do_normalize", True):
        options |= {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    else:
        options |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    white = getattr(processor, "do_convert_rgb", False) and prepare(Image.new("RGBA", (side, side))).mean() > 0
    return options | {"background": "white" if white else "drop"}  # before version 5 transparency was dropped


def prepare_pixels(processor: Any, image: Image.Image) -> Tensor:
    """Return a picture's pixels; with NaFlex its patches [patches, values], and a last row that begins with their rows and
    columns."""
    prepared = processor(images=image, return_tensors="pt")
    pixels = prepared["pixel_values"][0]
    if "spatial_shapes" not in prepared:
        return pixels
    shape = prepared["spatial_shapes"][0].to(pixels.dtype)
    return torch.cat([pixels, F.pad(shape, (0, pixels.shape[1] - 2))[None]])


def extract_sound(extractor: Any, sound: np.ndarray) -> Tensor:
    """Return a sound's features, always the same."""
    state = np.random.get_state()  # noqa: NPY002 - CLAP crops long sounds at random, also in evaluation
    np.random.seed(0)  # noqa: NPY002
    prepared = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    np.random.set_state(state)  # noqa: NPY002
    return prepared[extractor.model_input_names[0]][0].float()


@dataclass(frozen=True)
class Tokenizer:
    """A text → its ids; a batch of ids → the network's inputs. Texts of the whole context have a mask only if the tokenizer
    returns one.

    Attributes:
        full: pad texts to `length`.
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
        """Return the network's inputs of a batch of ids."""
        mask = batch != PADDING
        ids = {"input_ids": batch.masked_fill(~mask, self.tokenizer.pad_token_id or 0)}
        masked = not self.full or "attention_mask" in self.tokenizer.model_input_names
        return ids | ({"attention_mask": mask.long()} if masked else {})


def network_inputs(modality: Modality) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return the function that makes a network's inputs of a batch."""
    if isinstance(modality, LibraryTexts):
        return modality.tokenize.inputs
    return _audio_inputs if isinstance(modality, LibraryAudio) else _image_inputs


def _audio_inputs(batch: Tensor) -> dict[str, Tensor]:
    """Return CLAP's inputs. With fusion it treats one sample of a batch as longer, as the extractor does with a single one."""
    return {"input_features": batch, "is_longer": torch.ones(len(batch), 1, dtype=torch.bool, device=batch.device)}


def _image_inputs(batch: Tensor) -> dict[str, Tensor]:
    """Return a vision network's inputs; those of NaFlex are patches with their shapes."""
    if batch.dim() == 4:
        return {"pixel_values": batch}
    pixels, shapes = batch[:, :-1], batch[:, -1, :2].long()
    mask = torch.arange(pixels.shape[1], device=batch.device) < shapes.prod(1, keepdim=True)
    return {"pixel_values": pixels, "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}
