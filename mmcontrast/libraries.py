"""Wraps calls of other libraries: their messages that matter become lines of our log, their exceptions errors of one line."""

import importlib
import importlib.util
import logging
import os
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from mmcontrast.errors import UserError
from mmcontrast.trust import library_code_refused

LIBRARIES = ("", "transformers", "timm", "open_clip", "huggingface_hub", "torch")  # loggers; "": that of all others
NOISE_KINDS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
NOISE = re.compile(
    r"LOAD REPORT|newly initialized|were not used when|unauthenticated requests|hf_xet|Xet Storage|symlinks|use_fast"
    r"|fast (image )?processor|torch_dtype|deprecated",
    re.IGNORECASE,
)  # the first three: the code that opens a model checks the tensors itself
RANDOM = re.compile(r"No pretrained weights loaded|initialized (partially|randomly)", re.IGNORECASE)

ADAPTER = "adapter_config.json"  # of peft
PARTS = "open_clip_parts"  # a package of open_clip's files whose own first lines are not run

logger = logging.getLogger("mmcontrast")
_logged: set[str] = set()  # lines
_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def library_messages(name: object) -> Iterator[None]:
    """Collect what libraries log and warn of, and log the lines that matter at the end.

    Args:
        name: of the opened model, with which a line begins.
    """
    collector = _Collector()
    loggers = [logging.getLogger(library or None) for library in LIBRARIES]
    handlers_before = [library_logger.handlers for library_logger in loggers]
    for library_logger in loggers:
        has_handlers = library_logger.handlers or library_logger is logging.root
        library_logger.handlers = [collector] if has_handlers else []
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        for library_logger, handlers in zip(loggers, handlers_before, strict=True):
            library_logger.handlers = handlers
        kept_warnings = [str(warning.message) for warning in warned if not issubclass(warning.category, NOISE_KINDS)]
        for message in collector.messages + kept_warnings:
            if NOISE.search(message) or (_weights_follow.get() and RANDOM.search(message)):
                continue
            tell(f"{name}: {' '.join(message.split())[:300]}")


def tell(line: str) -> None:
    """Log a line that matters, on the first rank, if it was not logged before."""
    if line not in _logged and os.environ.get("RANK", "0") == "0":
        _logged.add(line)
        logger.warning("warning: %s", line)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Log no warnings of random weights, which a checkpoint replaces afterwards."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


@contextmanager
def opening(what: object, logged_as: object = None, runs_transformers: bool = True) -> Iterator[None]:
    """Open a model of another library: no code that lies beside it is run, lines of the library's log that matter are logged,
    and its exceptions become a UserError of one line.

    Args:
        what: the beginning of an error. logged_as: the beginning of a line of the log; default: the same.
        runs_transformers: the library may call transformers, which is imported for that.
    """
    with library_messages(logged_as or what), library_errors(what), library_code_refused(what, runs_transformers):
        yield


@contextmanager
def library_errors(what: object) -> Iterator[None]:
    """Turn a library's exceptions into a UserError of one line.

    Args:
        what: the beginning of the message.
    """
    try:
        yield
    except UserError:
        raise
    except refused() as error:
        if reason := next((cause for cause in _chain(error) if isinstance(cause, not_reached())), None):
            raise UserError(
                f"{what}: neither a folder nor in the local cache, and the hub gave nothing ({_short(reason, 120)}):"
                " download it where there is a network, or give a folder that has it"
            ) from error
        raise UserError(f"{what}: {type(error).__name__}: {_short(error, 300)}") from error


def refused() -> tuple[type[Exception], ...]:
    """Return the exceptions of libraries for a value, a name or a file that they cannot work with."""
    import huggingface_hub.errors
    from safetensors import SafetensorError

    strict = getattr(huggingface_hub.errors, "StrictDataclassError", ValueError)  # of a config, in newer versions
    builtin = (ValueError, TypeError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, OSError)
    return (*builtin, ImportError, EOFError, pickle.UnpicklingError, SafetensorError, strict, *not_reached())


def not_reached() -> tuple[type[Exception], ...]:
    """Return the exceptions of huggingface_hub for files that it does not have and cannot get."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(error: BaseException, length: int) -> str:
    return " ".join(str(error).split())[:length]


def part_of_open_clip(name: str) -> ModuleType:
    """Return a module of open_clip, as "tokenizer", without importing the package, which imports transformers."""
    if "open_clip" in sys.modules:
        return importlib.import_module(f"open_clip.{name}")
    if PARTS not in sys.modules:
        spec = importlib.util.find_spec("open_clip")
        assert spec
        package = ModuleSpec(PARTS, None, is_package=True)
        package.submodule_search_locations = spec.submodule_search_locations
        sys.modules[PARTS] = importlib.util.module_from_spec(package)
    return importlib.import_module(f"{PARTS}.{name}")


def refuse_adapter(name: str) -> None:
    """Refuse a folder of peft, which transformers would read with its adapter where peft is installed, else without.

    Raises:
        UserError: if it is one.
    """
    if (Path(name) / ADAPTER).is_file():
        raise UserError(
            f"{name} holds an adapter of peft ({ADAPTER}): merge it first, with peft:"
            f" AutoPeftModel.from_pretrained({name!r}).merge_and_unload().save_pretrained(OUT), or PeftModel on its base"
        )
