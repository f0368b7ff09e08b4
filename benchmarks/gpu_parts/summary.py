"""OUT/summary.md: a table a part, as the part's module makes it, and what did not come to an end."""

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
    about = machine["values"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    if about["device"] == "cuda":
        memory = about["memory"] / 2**30
        where = f"{about['card']} (compute capability {about['capability']}, {memory:.0f} GiB, driver {about['driver']})"
        head = ["# GPU benchmarks", f"{where}, CUDA {about['cuda']}"]
    else:
        head = ["# GPU benchmarks without a GPU", NO_GPU]
    head += [f"{about['cores']} cores of {about['cpu']}; Python {about['python']}, {versions}; {about['date']}."]
    lines = ["\n\n".join(head)]
    for part, (_, what) in PARTS.items():
        records = results.of(part)
        if not records:
            continue
        unfinished = "" if results.is_complete(part) else " (not all of it)"
        table = importlib.import_module(f"gpu_parts.{part}").table
        lines.append(f"## {part}: {what}{unfinished}")
        done = [record for record in records if record["state"] == "done"]
        lines.append(table(done, results) if done else "")
        others = [f"- {r['key']}: {r['state']}: {r.get('reason')}" for r in records if r["state"] != "done"]
        lines.append("\n".join(others))
    text = "\n\n".join(line for line in lines if line) + "\n"
    partial = out / ".summary.partial"
    partial.write_text(text)
    partial.rename(out / "summary.md")


def progress(results: Results) -> str:
    """A line a part: how many measurements ended how."""
    lines = []
    for part, (seconds, what) in PARTS.items():
        states = [record["state"] for record in results.of(part)]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "nothing yet"
        whole = "complete" if results.is_complete(part) else "to do"
        lines.append(f"{part:<11} {seconds:>4.0f} s  {whole:<9} {counted}\n{'':>19}{what}")
    return "\n".join(lines)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; nothing of no rows."""
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
