"""`mmcontrast data filter`: keeps the samples that pass all rules, and counts those that each rule removes, first and alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from mmcontrast.curation.looking import Look, Missing, looks
from mmcontrast.curation.rules import Column, Rule, Rules
from mmcontrast.curation.stage import PRIVATE, Decisions, Judgement, Stage
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import FILE_COLUMNS
from mmcontrast.modalities import DecodeError

WHY = f"{PRIVATE}why."  # and the rule's number: why a rule drops a sample, null where it does not


@dataclass(frozen=True)
class Filter(Stage):
    """A stage of rules; the first that drops a sample is its reason.

    Attributes:
        config: the rules, and the keys of those that have none.
        files: the folder of files that tables name.
    """

    config: Rules
    files: str | None = None
    name = "filter"

    @property
    def options(self) -> dict[str, Any]:
        return {**self.config.model_dump(mode="json", by_alias=True, exclude_defaults=True), "files": self.files}

    @property
    def rules(self) -> list[Rule]:
        return list(self.config.rules)

    @cached_property
    def fields(self) -> dict[str, list[str]]:
        return {str(field): list(keys) for field, keys in self.config.keys.items()}

    @property
    def two_passes(self) -> bool:  # type: ignore[override]
        return any(isinstance(rule, Column) and rule.top is not None for rule in self.rules)

    @property
    def file_columns(self) -> frozenset[str]:
        keys = {key for rule in self.rules if rule.reads_files for key in rule.keys(self.fields)}
        return FILE_COLUMNS | {key for key in keys if ":" not in key}

    def measure(self, shard: ShardIndex, rows: np.ndarray, previous: pa.Table | None) -> pa.Table:
        members = {name for rule in self.rules for name in rule.members(self.fields)}
        keys = [rule.keys(self.fields) for rule in self.rules]
        names = {rule.name for rule in self.rules if isinstance(rule, Column)}
        measures = {name: previous[name].to_pylist() for name in names & set(previous.column_names)} if previous else {}
        values: list[list[Any]] = [[] for _ in keys]
        reasons: list[list[str | None]] = [[] for _ in keys]
        columns = list(zip(self.rules, keys, values, reasons, strict=True))
        for look in looks(shard, rows, members, measures):
            for rule, rule_keys, rule_values, rule_reasons in columns:
                value, reason = _apply(rule, look, rule_keys)
                rule_values.append(value)
                rule_reasons.append(reason)
        table = {rule.column: pa.array(values[k], rule.column_type) for k, rule in enumerate(self.rules)}
        return pa.table(table | {f"{WHY}{k}": pa.array(reasons[k], pa.string()) for k in range(len(self.rules))})

    def decide(self, tables: Iterator[pa.Table]) -> Decisions:
        """Return, by the number of each rule of a share, the least value that is kept; None: no sample has one."""
        shares = {k: rule for k, rule in enumerate(self.rules) if isinstance(rule, Column) and rule.top is not None}
        values: dict[int, list[np.ndarray]] = {k: [] for k in shares}
        samples = 0
        for table in tables:
            samples += len(table)
            for k, rule in shares.items():
                values[k].append(table[rule.column].drop_null().to_numpy())
        return {k: least_of_top(np.concatenate(values[k]), samples, rule.top or 0) for k, rule in shares.items() if values[k]}

    def judge(self, measured: pa.Table, decisions: Decisions, number: int) -> Judgement:
        reasons_of = [measured[f"{WHY}{k}"].to_pylist() for k in range(len(self.rules))]
        for k, least_kept in (decisions or {}).items():
            rule = self.rules[k]
            assert isinstance(rule, Column)
            below = f"{rule.column} < {least_kept:.6g}, the top {rule.top:g}" if least_kept is not None else ""
            values = measured[rule.column].to_pylist()
            reasons_of[k] = [
                reason if value is None or value >= least_kept else below
                for reason, value in zip(reasons_of[k], values, strict=True)
            ]
        reasons: list[str | None] = []
        kinds: list[str | None] = []
        counts: dict[str, int] = {f"{k} {count}": 0 for k in range(len(reasons_of)) for count in ("removed", "alone")}
        for sample_reasons in zip(*reasons_of, strict=True):
            dropped = [k for k, reason in enumerate(sample_reasons) if reason is not None]
            for k in dropped:
                counts[f"{k} alone"] += 1
            if dropped:
                counts[f"{dropped[0]} removed"] += 1
            reason = sample_reasons[dropped[0]] if dropped else None
            reasons.append(reason)
            kinds.append(None if reason is None else reason.partition(" (")[0])
        return Judgement(reasons, counts, kinds)

    def summary(self, counts: Mapping[str, int]) -> dict[str, Any]:
        rules = [
            {"rule": rule.describe(), "removed": counts.get(f"{k} removed", 0), "alone": counts.get(f"{k} alone", 0)}
            for k, rule in enumerate(self.rules)
        ]
        return {"rules": rules}


def _apply(rule: Rule, look: Look, keys: list[str]) -> tuple[Any, str | None]:
    """Return (what a rule measures of a sample, why it drops it)."""
    try:
        value = rule.measure(look, keys)
    except Missing as missing:
        return None, None if rule.missing == "keep" else str(missing)
    except DecodeError as error:
        kind = {"text": "text", "image": "picture", "audio": "sound"}[getattr(rule, "of", rule.field)]
        return None, f"{rule.column if isinstance(rule, Column) else kind} unreadable ({error})"
    return value, rule.reason(value)


def least_of_top(values: np.ndarray, samples: int, share: float) -> float | None:
    """Return the least value among the largest ones that are the share of all samples, those without a value being the last;
    None if there is no value."""
    if not len(values):
        return None
    number = min(len(values), max(1, math.floor(share * samples + 0.5)))
    return float(np.partition(values, len(values) - number)[len(values) - number])
