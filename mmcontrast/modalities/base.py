"""What a modality is: how one field's bytes become a tensor in a data worker, and what is left to do on the device."""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import default_collate


class DecodeError(Exception):
    """A member's bytes are not what its name says, or are beyond a limit. The message says which."""


class Modality(nn.Module):
    """Bytes → `decode` → `transform` → `collate` → (device) `forward` → the tower's input.

    The first three run in data workers on one sample; randomness comes from torch's generator, which the dataset seeds
    by (seed, epoch, sample id). `forward` runs on the device, on a batch: normalisation, spectrograms.
    """

    extensions: ClassVar[tuple[str, ...]]  # members of a sample that it reads, the first one present

    of_source: ClassVar[frozenset[str]] = frozenset()  # options that a source may have otherwise: none that changes the tensors

    @abstractmethod
    def decode(self, data: bytes) -> Any:
        """Raises DecodeError if the bytes cannot be decoded safely."""

    def suspicious(self, raw: Any) -> str | None:
        """Return what makes a decoded value worthless though it can be decoded, None for most: `data verify` lists it."""
        return None

    @abstractmethod
    def transform(self, raw: Any, training: bool) -> Tensor | None:
        """One decoded value as a tensor; augmented if training. None: the sample lacks the field after all."""

    @abstractmethod
    def blank(self) -> Tensor:
        """A transformed sample that means nothing, of a valid shape: it stands in where a whole batch lacks a field."""

    def for_training(self) -> "Modality":
        """Return what reads the samples of training: itself, unless they are decoded in another way there. What it makes is
        given to the `forward` of this one."""
        return self

    def encode(self, value: Any) -> Any:
        """A value as a person has it in a program (a string, a PIL image) as `decode` would give it."""
        return value

    def collate(self, samples: list[Tensor]) -> Tensor:
        return default_collate(samples)  # in a worker, right into shared memory

    def forward(self, batch: Tensor) -> Tensor:
        return batch
