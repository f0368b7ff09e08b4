"""Keep the precision of a loss's inputs: no autocast around it, no rounding of Python's numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that turns off the autocast of a device's type."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that runs with autocast off on the device of its first tensor, alone or in a mapping.

    A backward that is called within autocast is under it again, so code that multiplies matrices there turns it off itself.
    """

    @wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> T:
        first = next(_tensors((*args, *kwargs.values())), None)
        with nullcontext() if first is None else without_autocast(first.device):
            return function(*args, **kwargs)

    return exact


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values and in mappings."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


def scalar(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number, also Python's or numpy's, as a tensor [] (several: [N]); `torch.as_tensor` alone rounds floats to
    fp32."""
    return torch.as_tensor(value, dtype=dtype, device=device).squeeze()
