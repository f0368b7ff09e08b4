"""Writes OUT/summary.md: a table of each part, as its module makes it, and the measurements that did not finish."""

import importlib
from pathlib import Path

from gpu_parts import PARTS
from gpu_parts.results import Results

NO_GPU = (
    "**No GPU was here. These are the smallest sizes in Triton's interpreter on a CPU: they show that the code runs, and"
    " say nothing about the speed of anything.**"
)


def write_summary(out: Path, results: Results) -> None:
    machine = results.records.get(("machine", "machine"))
    if machine is None:
        return
    details = machine["values"]
    versions = ", ".join(f"{name} {number}" for name, number in details["versions"].items())
    if details["device"] == "cuda":
        memory = details["memory"] / 2**30
        card = f"{details['card']} (compute capability {details['capability']}, {memory:.0f} GiB, driver {details['driver']})"
        head = ["# GPU benchmarks", f"{card}, CUDA {details['cuda']}"]
    else:
        head = ["# GPU benchmarks without a GPU", NO_GPU]
    head += [f"{details['cores']} cores of {details['cpu']}; Python {details['python']}, {versions}; {details['date']}."]
    lines = ["\n\n".join(head)]
    for part, (_, title) in PARTS.items():
        records = results.of(part)
        if not records:
            continue
        unfinished = "" if results.is_complete(part) else " (not all of it)"
        table = importlib.import_module(f"gpu_parts.{part}").table
        lines.append(f"## {part}: {title}{unfinished}")
        done = [record for record in records if record["state"] == "done"]
        lines.append(table(done, results) if done else "")
        unfinished_lines = [f"- {r['key']}: {r['state']}: {r.get('reason')}" for r in records if r["state"] != "done"]
        lines.append("\n".join(unfinished_lines))
    text = "\n\n".join(line for line in lines if line) + "\n"
    partial = out / ".summary.partial"
    partial.write_text(text)
    partial.rename(out / "summary.md")


def progress(results: Results) -> str:
    """Return a line for each part: how many measurements ended how."""
    lines = []
    for part, (seconds, title) in PARTS.items():
        states = [record["state"] for record in results.of(part)]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "nothing yet"
        state_of_part = "complete" if results.is_complete(part) else "to do"
        lines.append(f"{part:<11} {seconds:>4.0f} s  {state_of_part:<9} {counted}\n{'':>19}{title}")
    return "\n".join(lines)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, "" without rows."""
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
