"""A plugin of pytest that writes each test's outcome to the file of results, and skips tests that have one."""

import os
import time
from pathlib import Path

import pytest

from gpu_parts.results import ENDED, Results

LONGEST = 90  # seconds of one test
MANY = "test_every_reduction"  # hundreds of small ones: after the others


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(is_worker=hasattr(config, "workerinput")))


class Outcomes:
    def __init__(self, is_worker: bool) -> None:
        self.results, self.is_worker = Results(Path(os.environ["GPU_RESULTS"])), is_worker
        self.reports: dict[str, list[pytest.TestReport]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if self.results.state("tests", item.nodeid) in ENDED]
        config.hook.pytest_deselected(items=left_out)
        items[:] = sorted((item for item in items if item not in left_out), key=lambda item: MANY in item.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.is_worker:
            reason = report.longreprtext.strip().splitlines()[-1].removeprefix("E").strip()[:300]
            state = "missing" if "ModuleNotFoundError" in reason else "failed"
            self.results.add("tests", report.nodeid, state, reason=reason)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self.is_worker:
            cuts = self.results.records.get(("tests", nodeid), {}).get("cuts", 0)
            self.results.add("tests", nodeid, "started", since=time.time(), limit=LONGEST, cuts=cuts)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.setdefault(report.nodeid, []).append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        reports = self.reports.pop(nodeid, [])
        if self.is_worker or not reports:
            return
        worst = next((r for r in reports if r.failed), next((r for r in reports if r.skipped), reports[-1]))
        seconds = round(sum(report.duration for report in reports), 2)
        if worst.failed:
            self.results.add("tests", nodeid, "failed", seconds=seconds, reason=reason_of(worst))
        else:
            values = {"outcome": worst.outcome, "why": reason_of(worst)}
            self.results.add("tests", nodeid, "done", seconds=seconds, values=values)


def reason_of(report: pytest.TestReport) -> str:
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else report.longreprtext).split())[:300]
