"""Print a plan: tables of the towers, the memory of a device and the time of a step."""

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mmcontrast.plan.result import GIB, Plan


def plan_table(plan: Plan) -> Group:
    """Return the tables and lines to print."""
    towers = Table("tower, with its projection", title=f"{plan.name}: computed, not measured", title_justify="left")
    for heading in ("parameters", "of which learn", "GFLOPs a sample, forward", f"kept for the backward of {plan.at_a_time}"):
        towers.add_column(heading, justify="right")
    for name, tower in plan.towers.items():
        figures = f"{tower.parameters / 1e6:.2f} M", f"{tower.learning / 1e6:.2f} M", f"{tower.flops / 1e9:.2f}"
        towers.add_row(name, *figures, f"{tower.saved / GIB:.2f} GiB")
    forward = sum(tower.flops for tower in plan.towers.values())
    saved = sum(tower.saved for tower in plan.towers.values())
    parameters = f"{plan.parameters / 1e6:.2f} M", f"{plan.learning / 1e6:.2f} M"
    towers.add_row("all", *parameters, f"{forward / 1e9:.2f}", f"{saved / GIB:.2f} GiB", style="bold")

    at_a_time = f", {plan.at_a_time} at a time" if plan.at_a_time < plan.per_device else ""
    memory = Table(f"each of {plan.devices} devices, {plan.per_device} samples{at_a_time}", "GiB")
    memory.columns[1].justify = "right"
    for name, bytes in plan.memory.items():
        memory.add_row(name, f"{bytes / GIB:.2f}")
    memory.add_row("all", f"{plan.total / GIB:.2f}", style="bold")
    again = " (gradient caching adds a forward)" if plan.cached else ""
    flops = f"forward and backward: {plan.flops_per_sample / 1e9:.1f} GFLOPs a sample{again}"
    notes = [f"note: {note}" for note in plan.notes]
    lines = [flops, *notes, f"{plan.available / GIB:.3g} GiB a device: {plan.verdict}"]
    return Group(towers, memory, *(Text(line) for line in lines), *time_tables(plan))


def time_tables(plan: Plan) -> Iterator[Table | Text]:
    """Yield the time of a step by parts, the loss's communication by scheme, and what is assumed."""
    time = plan.time
    parts = Table("a step, predicted", "seconds", "share")
    for column in parts.columns[1:]:
        column.justify = "right"
    for name, seconds in time.parts.items():
        parts.add_row(name, f"{seconds:.3g}", f"{seconds / time.total:.0%}")
    parts.add_row("all", f"{time.total:.3g}", "", style="bold")
    yield parts
    if plan.devices > 1:
        schemes = Table("communication of the loss", title="a device's, in a step", title_justify="left")
        for heading in ("calls", "GiB sent", "ms alone", "ms that it adds", "GiB of others' columns"):
            schemes.add_column(heading, justify="right")
        for name, scheme in time.schemes.items():
            milliseconds = f"{scheme.alone * 1e3:.3g}", f"{scheme.waits * 1e3:.3g}"
            figures = f"{scheme.calls:,}", f"{scheme.sent / GIB:.2f}", *milliseconds, f"{scheme.memory / GIB:.2f}"
            schemes.add_row(name, *figures, style="bold" if name == time.scheme else "")
        yield schemes
        if time.schemes[time.scheme].waits > 1.1 * time.schemes[time.fastest].waits + 1e-3:
            yield Text(f"with these links train.communication={time.fastest} is the fastest")
    yield Text(f"{plan.batch_size / time.total:,.0f} samples a second; most of it is {time.dominant}")
    if plan.largest_batch:
        yield Text(f"largest batch that fits so many devices, with gradient caching: {plan.largest_batch:,}")
    for assumption in plan.assumed:
        yield Text(f"assumed: {assumption}")
