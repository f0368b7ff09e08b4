"""Precomputed vectors, `key.npy`: embeddings of a frozen model, measurements, a table's row."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcontrast.modalities.base import DecodeError, Modality

NUMBERS = "biuf"  # numpy's kinds of real numbers: bool, int, unsigned int, float of any width and byte order


class VectorModality(Modality):
    """Vectors float32 [width] of any real numbers: bool (0 and 1), integers, floats. Complex numbers, texts, dates and records
    are refused, as are NaN, infinity, and what float32 cannot hold.

    Args:
        width: the number of components; another shape is refused.
    """

    extensions = ("npy",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def decode(self, data: bytes) -> Tensor:
        return self._checked(read_numbers(data))

    def encode(self, value: Any) -> Tensor:
        return self._checked(numbers(value))

    def _checked(self, vector: Tensor) -> Tensor:
        """Return a vector after checking its width."""
        if vector.shape != (self.width,):
            raise DecodeError(f"an array of shape {tuple(vector.shape)} where width={self.width}")
        return vector

    def transform(self, raw: Tensor, training: bool) -> Tensor:
        return raw

    def blank(self) -> Tensor:
        return torch.zeros(self.width)


def read_numbers(data: bytes) -> Tensor:
    """Return the array of an .npy file as float32, of any shape.

    Raises:
        DecodeError: if it is no array, or not of finite real numbers.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, TypeError, MemoryError) as error:
        raise DecodeError(f"not an array of numbers ({error})") from error
    if not isinstance(array, np.ndarray):
        raise DecodeError("not an array of numbers, but an archive of arrays (.npz): save one with numpy.save")
    return numbers(array)


def numbers(value: Any) -> Tensor:
    """Return an array, a tensor or a list of numbers as float32.

    Raises:
        DecodeError: if it is not of finite real numbers.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    array = np.asarray(value)
    if array.dtype.kind not in NUMBERS:
        raise DecodeError(f"not an array of numbers: its type is {str(array.dtype)[:60]}, a vector's is bool, int or float")
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(array.astype(np.float32))
    bad = torch.isfinite(tensor).logical_not().flatten()
    if bad.any():
        first = int(bad.nonzero()[0])
        count = f"{int(bad.sum())} of {len(bad)} are no finite float32"
        raise DecodeError(f"component {first} is {array.reshape(-1)[first]}, {count}")
    return tensor
