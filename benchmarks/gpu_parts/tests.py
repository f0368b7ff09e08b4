"""tests/gpu by pytest, in a process of its own: every test is a measurement, known as soon as it has ended."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_parts.results import Record, Results
from gpu_parts.runner import Context, Missing, OutOfTime

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 90  # seconds of one test


def run(context: Context) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise Missing("no module named pytest")
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--noconftest", "-q", "-p", "gpu_parts.pytest_results"]
    command += ["-p", "no:cacheprovider"]
    if context.device == "cuda" and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, len(os.sched_getaffinity(0))))]  # most of the time kernels are compiled
    environment = {**os.environ, "GPU_RESULTS": str(context.results.path.absolute())}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    context.results.reload()
    if code not in (0, 1, 5):  # passed, failed, none left
        raise RuntimeError(f"pytest ended with exit code {code}")
    if context.results.pending("tests"):
        raise OutOfTime


def table(records: list[Record], results: Results) -> str:
    outcomes = [record["values"]["outcome"] for record in records]
    counted = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
    reasons: dict[str, Any] = {r["values"]["why"]: None for r in records if r["values"]["outcome"] == "skipped"}
    return "\n".join([f"{counted or 'none ended'}.", *(f"- skipped: {reason}" for reason in reasons)])
