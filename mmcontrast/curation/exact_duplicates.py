"""`mmcontrast data dedup`: keeps one of several samples whose members are the same, byte for byte or once decoded.

Every shard's members are hashed to 128 bits; then one process sorts all hashes, in about 80 bytes of memory a sample. The kept
sample depends on the order of the shards and of the samples in them alone.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmcontrast.curation.looking import FIELDS, Look, Missing, decoder, looks, members_of_keys
from mmcontrast.curation.stage import PRIVATE, Decisions, Judgement, Stage
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import FILE_COLUMNS
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError

HASH = (f"{PRIVATE}hash.0", f"{PRIVATE}hash.1")  # 64 bits each, null where there is nothing to compare
ROW, WHY, SCORE = f"{PRIVATE}row", f"{PRIVATE}why", f"{PRIVATE}score"
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class ExactDuplicates(Stage):
    """A stage that keeps one of several samples which are the same.

    Attributes:
        by: compared together: the fields image, text or audio, or members, or entries of the json (json:sha256).
        decoded: compare decoded members, pixels or samples of sounds, instead of their bytes.
        best: keep the one with the largest number in this column, as the rule `column` reads it; default: the first.
        keys: of fields, the members that they are read from, tried in turn.
    """

    by: tuple[str, ...]
    decoded: bool = False
    best: str | None = None
    keys: tuple[tuple[str, tuple[str, ...]], ...] = ()
    files: str | None = None
    name = "dedup"
    two_passes = True

    @property
    def options(self) -> dict[str, Any]:
        return {
            "by": list(self.by), "decoded": self.decoded, "best": self.best, "files": self.files,
            "keys": {field: list(keys) for field, keys in self.keys},
        }  # fmt: skip

    @property
    def file_columns(self) -> frozenset[str]:
        return FILE_COLUMNS | {
            key for name in self.by if name in ("image", "audio") for key in self.keys_of(name) if ":" not in key
        }

    def keys_of(self, name: str) -> tuple[str, ...]:
        return dict(self.keys).get(name) or FIELDS.get(name) or (name,)

    def measure(self, shard: ShardIndex, rows: np.ndarray, previous: pa.Table | None) -> pa.Table:
        members = {name for field in self.by for name in members_of_keys(self.keys_of(field))}
        members |= {"json"} if self.best else set()
        previous_scores = {}
        if previous is not None and self.best and self.best in previous.column_names:
            previous_scores = {self.best: previous[self.best].to_pylist()}
        hashes: list[tuple[int, int] | tuple[None, None]] = []
        reasons: list[str | None] = []
        scores: list[float | None] = []
        for look in looks(shard, rows, members, previous_scores):
            pair, reason = self._hash(look)
            hashes.append(pair)
            reasons.append(reason)
            scores.append(_score(look, self.best) if self.best else None)
        columns = {name: pa.array([pair[k] for pair in hashes], pa.uint64()) for k, name in enumerate(HASH)}
        columns |= {ROW: pa.array(rows), WHY: pa.array(reasons, pa.string())}
        return pa.table(columns | ({SCORE: pa.array(scores, pa.float64())} if self.best else {}))

    def _hash(self, look: Look) -> tuple[tuple[int, int] | tuple[None, None], str | None]:
        """Return (the hash of the compared members, why the sample is dropped). A sample that lacks one has no duplicate."""
        hasher = hashlib.blake2b(digest_size=16)
        for name in self.by:
            try:
                data = look.member(self.keys_of(name), name)
                if self.decoded and name in FIELDS:
                    data = _decode(name, data)
            except Missing:
                return (None, None), None
            except DecodeError as error:
                return (None, None), f"{name} unreadable ({error})"
            hasher.update(f"{len(data)} ".encode())
            hasher.update(data)
        digest = hasher.digest()
        return (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")), None

    def decide(self, tables: Iterator[pa.Table]) -> Decisions:
        """Return (the position of the sample that is kept instead of each, −1 of those that are not compared; where each
        shard's positions begin; the rows of all positions)."""
        halves: list[list[np.ndarray]] = [[], []]
        has_hash: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        for table in tables:
            has_hash.append(table[HASH[0]].is_valid().to_numpy(zero_copy_only=False))
            for half, name in zip(halves, HASH, strict=True):
                half.append(table[name].fill_null(0).to_numpy())
            rows.append(table[ROW].to_numpy())
            if self.best:
                scores.append(-table[SCORE].fill_null(-np.inf).to_numpy())
        starts = np.cumsum([0, *map(len, rows)])
        if self.best and starts[-1] and np.isinf(np.concatenate(scores)).all():
            raise UserError(f"--best {self.best}: no sample has a number of this name")
        positions = np.flatnonzero(np.concatenate(has_hash))
        first, second = (np.concatenate(half)[positions] for half in halves)
        order = np.lexsort((*([np.concatenate(scores)[positions]] if self.best else []), second, first))  # stable
        is_new = np.ones(len(order), dtype=bool)
        is_new[1:] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
        kept = np.full(int(starts[-1]), -1, dtype=np.int64)
        kept[positions[order]] = positions[order[np.flatnonzero(is_new)[np.cumsum(is_new) - 1]]] if len(order) else 0
        return kept, starts, np.concatenate(rows)

    def judge(self, measured: pa.Table, decisions: Decisions, number: int) -> Judgement:
        kept, starts, rows = decisions
        reasons = measured[WHY].to_pylist()
        kinds = [None if reason is None else reason.partition(" (")[0] for reason in reasons]
        positions = np.arange(starts[number], starts[number + 1])
        keepers = kept[positions]
        for k in np.flatnonzero((keepers >= 0) & (keepers != positions)).tolist():
            shard = int(np.searchsorted(starts, keepers[k], side="right")) - 1
            reasons[k], kinds[k] = f"{DUPLICATE} (row {rows[keepers[k]]} of shard {shard})", DUPLICATE
        unscored = {"unscored": measured[SCORE].null_count} if self.best else {}
        return Judgement(reasons, {"without": int((keepers < 0).sum()), **unscored}, kinds)

    def summary(self, counts: Mapping[str, int]) -> dict[str, Any]:
        unscored = {f"without {self.best}": counts.get("unscored", 0)} if self.best else {}
        return {"not compared": counts.get("without", 0), **unscored}


def _score(look: Look, column: str) -> float | None:
    try:
        return look.number(column)
    except (Missing, DecodeError):
        return None


def _decode(field: str, data: bytes) -> bytes:
    """Return a decoded member as bytes: pixels of 8 bits on white with their sides, samples at 16 kHz, a text.

    Raises:
        DecodeError: if it cannot be decoded.
    """
    value = decoder(field).decode(data)
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} ".encode() + value.contiguous().numpy().tobytes()
    return str(value).encode()
