"""Keeps the file of results: a line of JSON for each measurement that begins or ends; the last line of a key counts."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # part, key, state; limit and since of what has started; seconds, reason and values of what has ended
ENDED = {"done", "skipped", "missing", "failed", "out of memory", "died", "timed out", "complete"}  # not measured again
TROUBLE = {"failed", "out of memory", "died", "timed out"}  # unless a later call is asked to; "missing": by any later call
COMPLETE, PART = "(complete)", "(part)"  # keys: a part has nothing left to measure; what kept it from measuring


class Results:
    """Results known so far, by part and key. Several processes may hold one: `reload` sees what the others added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[tuple[str, str], Record] = {}
        self._read = 0
        self.reload()

    def reload(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        complete_lines = new[: new.rfind(b"\n") + 1]
        self._read += len(complete_lines)
        for line in complete_lines.splitlines():
            try:
                record = json.loads(line)
                self.records[record["part"], record["key"]] = record
            except (ValueError, KeyError, TypeError):  # cut off by a machine that went away
                continue

    def add(self, part: str, key: str, state: str, **values: Any) -> None:
        line = json.dumps({"part": part, "key": key, "state": state, **values}, allow_nan=True) + "\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + line.encode())
        finally:
            os.close(descriptor)
        self.reload()

    def of(self, part: str) -> list[Record]:
        """Return the ended measurements of a part, in the order of their first begin."""
        records = [record for (name, key), record in self.records.items() if name == part and key != COMPLETE]
        return [record for record in records if record["state"] not in ("started", "again")]

    def state(self, part: str, key: str) -> str | None:
        record = self.records.get((part, key))
        return record["state"] if record else None

    @property
    def device(self) -> str:
        """Name the device that was measured: cuda or cpu."""
        return self.records["machine", "machine"]["values"]["device"]

    def is_complete(self, part: str) -> bool:
        return self.state(part, COMPLETE) == "complete"

    def pending(self, part: str) -> list[Record]:
        return [record for (name, _), record in self.records.items() if name == part and record["state"] == "started"]

    def end_pending(self, part: str, state: str, reason: str) -> None:
        """Record the end of measurements that had begun. One that is cut off twice took too long."""
        for record in self.pending(part):
            cuts = record.get("cuts", 0) + (state == "cut")
            final = "timed out" if cuts > 1 else state
            seconds = round(time.time() - record["since"], 1)
            self.add(part, record["key"], final, reason=reason, seconds=seconds, cuts=cuts)

    def forgive(self, parts: Sequence[str], everything: bool) -> None:
        """Let the next call repeat measurements that were missing, and with `everything` those that failed too."""
        repeated = {"missing"} | (TROUBLE if everything else set())
        for (part, key), record in list(self.records.items()):
            if part not in parts:
                continue
            if record["state"] == "started":  # the whole call was ended
                self.end_pending(part, "cut", "the call was ended")
            elif record["state"] in repeated:
                self.add(part, key, "again")
                if self.is_complete(part):
                    self.add(part, COMPLETE, "again")
