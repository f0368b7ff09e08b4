"""`mmcontrast doctor`: checks whether this machine is ready and a config fits it, and says what to do if not."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from mmcontrast.doctor.check import BAD, OK, WARNING, Check
from mmcontrast.doctor.packages import package_checks

__all__ = ["BAD", "OK", "WARNING", "Check", "examine", "table_of"]
COLOURS = {OK: "green", WARNING: "yellow", BAD: "bold red"}


def examine(config: Path | None, overrides: Sequence[str] = (), rate: float | None = None) -> Iterator[Check]:
    """Check packages, devices, the machine; with a config also its data and its disks. Nothing is trained, and no file is left.

    Args:
        rate: samples a second that the training takes, on all processes: the check says how many workers feed it.
    """
    yield from package_checks()
    from mmcontrast.doctor.devices import device_checks

    yield from device_checks()
    try:  # these need all packages; missing ones are reported above
        from mmcontrast.doctor.host import host_checks
        from mmcontrast.doctor.run import run_checks
    except ImportError as error:
        yield Check("the rest", f"not looked at: {error}", BAD, "install what is named above, and ask again")
        return
    if config:
        yield from run_checks(config, overrides, rate)
    else:
        yield from host_checks()


def table_of(checks: Sequence[Check]) -> Table:
    """Return the checks as a table for the console."""
    table = Table("check", "found", "", "what to do")
    for check in checks:
        table.add_row(check.name, Text(check.found), Text(check.state, COLOURS[check.state]), Text(check.remedy))
    return table
