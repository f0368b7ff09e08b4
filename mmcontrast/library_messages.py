"""What other libraries say while they open a model: what matters is a line of our log, once; the rest is not passed on."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LIBRARIES = ("", "transformers", "timm", "open_clip", "huggingface_hub", "torch")  # loggers; "": that of all others
NOISE_KINDS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
NOISE = re.compile(
    r"LOAD REPORT|newly initialized|were not used when|unauthenticated requests|hf_xet|Xet Storage|symlinks|use_fast"
    r"|fast (image )?processor|torch_dtype|deprecated",
    re.IGNORECASE,
)  # the first three: whoever opens the model looks at the tensors themselves
RANDOM = re.compile(r"No pretrained weights loaded|initialized (partially|randomly)", re.IGNORECASE)

logger = logging.getLogger("mmcontrast")
_told: set[str] = set()
_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def library_messages(name: object) -> Iterator[None]:
    """Collect what libraries log and warn of, and pass on what matters when it is over.

    Args:
        name: what is opened, with which a line begins.
    """
    collector = _Collector()
    loggers = [logging.getLogger(library or None) for library in LIBRARIES]
    before = [one.handlers for one in loggers]
    for one in loggers:
        one.handlers = [collector] if one.handlers or one is logging.root else []
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        for one, handlers in zip(loggers, before, strict=True):
            one.handlers = handlers
        seen = collector.messages + [str(one.message) for one in warned if not issubclass(one.category, NOISE_KINDS)]
        for message in seen:
            tell(f"{name}: {' '.join(message.split())[:300]}")


def tell(line: str) -> None:
    """Log a line that matters, on the first rank, if it was not logged before."""
    noise = NOISE.search(line) or (_weights_follow.get() and RANDOM.search(line))
    if not noise and line not in _told and os.environ.get("RANK", "0") == "0":
        _told.add(line)
        logger.warning("warning: %s", line)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Networks are made with random weights, which a checkpoint then replaces: nobody need hear of that."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)
