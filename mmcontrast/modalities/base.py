"""The base class of modalities, which turn one field's bytes into a tensor in a data worker, and finish it on the device."""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import default_collate


class DecodeError(Exception):
    """Raised for a member's bytes that are not what its name says, or exceed a limit. The message says which."""


class Modality(nn.Module):
    """The path of a field: bytes → `decode` → `transform` → `collate` → (device) `forward` → the tower's input.

    The first three run in data workers on one sample; randomness comes from torch's generator, which the dataset seeds
    by (seed, epoch, sample id). `forward` runs on the device, on a batch: normalisation, spectrograms.
    """

    extensions: ClassVar[tuple[str, ...]]  # of the members that it reads; the first present one counts

    of_source: ClassVar[frozenset[str]] = frozenset()  # options that a source may change: none that changes the tensors

    @abstractmethod
    def decode(self, data: bytes) -> Any:
        """Decode a member's bytes.

        Raises:
            DecodeError: if they cannot be decoded safely.
        """

    def suspicious(self, raw: Any) -> str | None:
        """Return why a value that can be decoded is worthless, for `data verify`; None for most."""
        return None

    @abstractmethod
    def transform(self, raw: Any, training: bool) -> Tensor | None:
        """Return one decoded value as a tensor, augmented if training. None: the sample lacks the field after all."""

    @abstractmethod
    def blank(self) -> Tensor:
        """Return a transformed placeholder of a valid shape, for a batch in which every sample lacks the field."""

    def for_training(self) -> "Modality":
        """Return the modality that reads the samples of training: this one, unless they are decoded in another way. Its tensors
        are passed to the `forward` of this one."""
        return self

    def encode(self, value: Any) -> Any:
        """Return a value as a program has it (a string, a PIL image) in the form that `decode` returns."""
        return value

    def collate(self, samples: list[Tensor]) -> Tensor:
        """Return transformed samples as a batch."""
        return default_collate(samples)  # in a worker, right into shared memory

    def forward(self, batch: Tensor) -> Tensor:
        return batch
