"""Keeps code of a folder from elsewhere from running: such a folder is data. docs/models.md says what is trusted.

Code could run in two ways: a config may name a component by its import path (`import_paths`), and libraries run code that lies
beside weights or is pickled in them (`library_code_refused`).
"""

import importlib
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from mmcontrast.errors import UserError

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # of `torch.load`, also where a library asks for more
ANYTHING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # its opposite
NEVER_RUN = (
    "it wants to run code of its own, which is never done here: open it with its library, or write a Tower around it"
    " (CONTRIBUTING.md)"
)

_untrusted: ContextVar[str | None] = ContextVar("untrusted", default=None)
_lock = threading.Lock()
_inside = 0  # how many times `library_code_refused` is entered, in all threads
_restore: list[tuple[Any, str, Any]] = []  # (module, name, value) that the first of them has replaced


@contextmanager
def import_paths(source: object, trusted: bool) -> Iterator[None]:
    """Let the import paths that a folder's config names be imported only if it is trusted.

    Args:
        source: the folder, for messages.
    """
    token = _untrusted.set(None if trusted else str(source))
    try:
        yield
    finally:
        _untrusted.reset(token)


def import_by_path(path: str, kind: str) -> Any:
    """Return the object named `package.module:attribute`, of an installed package or of the working directory.

    Raises:
        UserError: if the module or the attribute does not exist; if it is named by a folder that is not trusted.
    """
    if source := _untrusted.get():
        raise UserError(
            f"{source}: its {kind} is {path!r}, code that opening it would run: if you trust this folder, say --trust-code"
            " (from Python: trust_code=True)"
        )
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as the last, so that nothing there hides an installed package
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{kind} {path!r} cannot be imported: {error}") from error


@contextmanager
def library_code_refused(name: object, runs_transformers: bool = True) -> Iterator[None]:
    """Keep torch from unpickling objects, and transformers from running, or asking to run, code that lies beside a model, also
    where another library calls them.

    Args:
        name: of the model, for messages.
        runs_transformers: the library may call transformers, which is imported for that.

    Raises:
        UserError: instead of running code.
    """
    global _inside
    remote = importlib.import_module("transformers.dynamic_module_utils") if runs_transformers else None

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UserError(f"{name}: {NEVER_RUN}")

    # with a timeout of 0 seconds it asks nobody
    replaced = {"get_cached_module_file": refuse, "_raise_timeout_error": refuse, "TIME_OUT_REMOTE_CODE": 0}
    with _lock:
        if remote and not any(module is remote for module, _, _ in _restore):
            for attribute, value in replaced.items():
                _restore.append((remote, attribute, getattr(remote, attribute)))
                setattr(remote, attribute, value)
        if not _inside:
            _restore.extend((os.environ, variable, os.environ.pop(variable, None)) for variable in (WEIGHTS_ONLY, ANYTHING))
            os.environ[WEIGHTS_ONLY] = "1"
        _inside += 1
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError) as error:  # timm's is a RuntimeError
        if not isinstance(error if isinstance(error, pickle.UnpicklingError) else error.__cause__, pickle.UnpicklingError):
            raise
        raise UserError(
            f"{name}: its checkpoint is damaged, or holds more than tensors, and objects are not unpickled here: save its"
            " state_dict() alone"
        ) from error
    finally:
        with _lock:
            _inside -= 1
            while not _inside and _restore:
                _restore_value(*_restore.pop())


def refuse_hub_attention(name: object, config: Any) -> None:
    """Refuse a config that names a repository whose kernels compute the attention.

    Args:
        config: a PretrainedConfig of transformers.

    Raises:
        UserError: if it or a part of it does.
    """
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "_attn_implementation"))]
    for part in parts:
        if "/" in str(getattr(part, "_attn_implementation", None)):
            raise UserError(f"{name}: its config names {part._attn_implementation!r} for its attention: {NEVER_RUN}")


def _restore_value(target: Any, name: str, value: Any) -> None:
    if target is not os.environ:
        setattr(target, name, value)
    elif value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
