"""Defines a check, one row of the doctor's table."""

from collections.abc import Mapping
from dataclasses import dataclass, field

OK, WARNING, BAD = "ok", "warning", "bad"


@dataclass(frozen=True)
class Check:
    """A check: its subject, its finding, and the judgement.

    Attributes:
        state: ok; warning: a run works, but not as it could; bad: it fails, or is not what it seems.
        remedy: what to do, where it is not ok.
        numbers: the measures, by name and unit.
    """

    name: str
    found: str
    state: str = OK
    remedy: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.state in (OK, WARNING, BAD) and bool(self.remedy) == (self.state != OK), self


def size(number: float) -> str:
    """Return bytes as a person reads them: 1.5 GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def one_line(error: object) -> str:
    """Return an error's message in one line, or its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
