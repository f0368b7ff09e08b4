"""Vectors that someone else computed, `key.npy`: embeddings of a frozen model, measurements, a table's row."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcontrast.modalities.base import DecodeError, Modality

NUMBERS = "biuf"  # numpy's kinds of real numbers: bool, int, unsigned int, float of any width and byte order


class VectorModality(Modality):
    """float32 [width], of any real numbers: bool (0 and 1), integers, floats. Complex numbers, texts, dates and records are
    refused, as are NaN, infinity, and what float32 cannot hold.

    Args:
        width: the number of components; another shape is refused.
    """

    extensions = ("npy",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def decode(self, data: bytes) -> Tensor:
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError, TypeError, MemoryError) as error:
            raise DecodeError(f"not an array of numbers ({error})") from error
        if not isinstance(array, np.ndarray):
            raise DecodeError("not an array of numbers, but an archive of arrays (.npz): save one with numpy.save")
        return self.encode(array)

    def encode(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.float() if value.dtype == torch.bfloat16 else value
        array = np.asarray(value)
        if array.dtype.kind not in NUMBERS:
            raise DecodeError(f"not an array of numbers: its type is {str(array.dtype)[:60]}, a vector's is bool, int or float")
        if array.shape != (self.width,):
            raise DecodeError(f"an array of shape {array.shape} where width={self.width}")
        with np.errstate(over="ignore"):
            vector = torch.from_numpy(array.astype(np.float32))
        bad = torch.isfinite(vector).logical_not()
        if bad.any():
            first = int(bad.nonzero()[0])
            raise DecodeError(f"component {first} is {array[first]}, {int(bad.sum())} of {self.width} are no finite float32")
        return vector

    def transform(self, raw: Tensor, training: bool) -> Tensor:
        return raw

    def blank(self) -> Tensor:
        return torch.zeros(self.width)
