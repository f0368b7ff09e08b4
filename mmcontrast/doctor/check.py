"""One row of the doctor's table."""

from collections.abc import Mapping
from dataclasses import dataclass, field

OK, WARNING, BAD = "ok", "warning", "bad"


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and how it is judged.

    Attributes:
        state: ok; warning: a run works, but not as it could; bad: it fails, or is not what it seems.
        remedy: what to do about it, where it is not ok.
        numbers: what was measured, by name and unit.
    """

    name: str
    found: str
    state: str = OK
    remedy: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.state in (OK, WARNING, BAD) and bool(self.remedy) == (self.state != OK), self


def size(number: float) -> str:
    """Bytes, as 1.5 GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def one_line(error: object) -> str:
    """What an error says, or its kind where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
