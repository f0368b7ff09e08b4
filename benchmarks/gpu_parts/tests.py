"""Runs tests/gpu by pytest: every test is a measurement, recorded as soon as it has ended."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from gpu_parts.results import Record, Results
from gpu_parts.runner import Context, OutOfTime

ROOT = Path(__file__).resolve().parents[2]
FILES = [f"tests/gpu/test_{name}.py" for name in ("training", "objectives", "evaluation", "kernels")]  # most compiles last


def run(context: Context) -> None:
    """Run the tests in this process, without tests/conftest.py, which makes a corpus that no GPU test needs."""
    import pytest

    os.chdir(ROOT)
    os.environ["GPU_RESULTS"] = str(context.results.path)
    options = ["--noconftest", "--continue-on-collection-errors", "-q", "-p", "no:cacheprovider"]
    if context.device == "cuda" and importlib.util.find_spec("xdist"):
        options += ["-n", str(min(16, len(os.sched_getaffinity(0))))]  # most of the time kernels are compiled
    code = pytest.main([*FILES, *options, "-p", "gpu_parts.pytest_results"])
    context.results.reload()
    if code not in (0, 1, 5):  # passed, failed, none left
        raise RuntimeError(f"pytest ended with exit code {int(code)}")
    if context.results.pending("tests"):
        raise OutOfTime


def table(records: list[Record], results: Results) -> str:
    outcomes = [record["values"]["outcome"] for record in records]
    counted = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
    reasons: dict[str, Any] = {r["values"]["why"]: None for r in records if r["values"]["outcome"] == "skipped"}
    return "\n".join([f"{counted or 'none ended'}.", *(f"- skipped: {reason}" for reason in reasons)])
