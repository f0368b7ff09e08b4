"""What the libraries' models have in common: a tower around a network, a whole made of fields, errors in one line."""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import Tensor, nn

from mmcontrast.errors import UserError
from mmcontrast.library_messages import library_messages
from mmcontrast.modalities import Modality
from mmcontrast.model import ContrastiveModel
from mmcontrast.towers import Tower
from mmcontrast.trust import library_code_refused

NOT_REACHED = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError)
WRONG = (
    *(OSError, RuntimeError, ValueError, LookupError, TypeError, ImportError, EOFError),
    *(SafetensorError, pickle.UnpicklingError, HFValidationError, *NOT_REACHED),
)


class LibraryTower(Tower):
    """A library's network, its features as it computes them.

    Args:
        network: whose parameters are the tower's.
        features: (network, batch) → [N, width], or a tuple that begins with it; default: the network on the batch.
    """

    def __init__(self, network: nn.Module, features: Callable[[nn.Module, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.network, self._features = network, features

    def forward(self, batch: Tensor) -> Tensor:
        features = self._features(self.network, batch) if self._features else self.network(batch)
        return features[0] if isinstance(features, tuple) else features


def assembled(
    modalities: Mapping[str, Modality], towers: Mapping[str, Tower], scale: float = 1.0, bias: float | None = None
) -> ContrastiveModel:
    """The model of fields with a tower each, in fp32, in evaluation mode. Each tower is tried on a blank sample, which also
    says how many features it has.

    Args:
        scale, bias: of the logits, scale · cosine + bias.
    """
    for field, tower in towers.items():
        tower.float().eval()
        blank = modalities[field].collate([modalities[field].blank()])
        with torch.no_grad():
            tower.width = tower(modalities[field](blank)).shape[1]
    dim = next(iter(towers.values())).width
    return ContrastiveModel(modalities, towers, {f: f for f in towers}, dim, "none", scale, bias).eval()


@contextmanager
def in_one_line(name: str) -> Iterator[None]:
    """Turns what a library raises into a UserError that begins with the name, passes on what matters of its log, and keeps it
    from running code of the folder."""
    try:
        with library_messages(name), library_code_refused(name):
            yield
    except UserError:
        raise
    except WRONG as error:
        if reason := next((cause for cause in _chain(error) if isinstance(cause, NOT_REACHED)), None):
            raise UserError(
                f"{name}: neither a folder nor in the local cache, and the hub gave nothing ({_short(reason, 120)}):"
                " download it where there is a network, or give a folder that has it"
            ) from error
        raise UserError(f"{name}: {type(error).__name__}: {_short(error, 300)}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(error: BaseException, length: int) -> str:
    return " ".join(str(error).split())[:length]
