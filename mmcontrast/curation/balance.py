"""Balances texts over a list of entries (MetaCLIP, arXiv:2309.16671): frequent entries are thinned out, rare ones kept whole.

A text matches an entry that stands in it between spaces, once each of `,.;:?!` and the grave accent has been set apart. An
entry that N texts match keeps each of them with probability min(1, t / N); a text is kept if any of its entries keeps it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmcontrast.curation.looking import Missing, looks, members_of_keys
from mmcontrast.curation.stage import PRIVATE, Decisions, Judgement, Stage
from mmcontrast.data.shard import ShardIndex
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError
from mmcontrast.text_files import lines_of, read_text

SET_APART, SPACES = ",.;:?!`", "\t\n\r"
_SPACED = str.maketrans({**{mark: f" {mark} " for mark in SET_APART}, **dict.fromkeys(SPACES, " ")})


class Entries:
    """A list of entries; those that stand in a text are found in one walk over its words.

    Args:
        entries: words or phrases; the place in the list is an entry's number.

    Raises:
        ValueError: for an entry that is empty, or that is there twice.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self.names = list(entries)
        self._number: dict[str, int] = {}
        for number, entry in enumerate(self.names):
            if not entry.strip():
                raise ValueError(f"entry {number} is empty")
            if self._number.setdefault(entry, number) != number:
                raise ValueError(f"entry {number}, {entry!r}, is entry {self._number[entry]} already")
        self._lengths = sorted({entry.count(" ") + 1 for entry in self.names})

    def __len__(self) -> int:
        return len(self.names)

    def found_in(self, text: str) -> list[int]:
        """Return the numbers of the entries that stand in a text, ascending, each once.

        The same as `" entry " in " text "` for every entry, in time that grows with the text alone.
        """
        numbers = set()
        words = f" {text.translate(_SPACED)} ".split(" ")[1:-1]  # without the empty ends
        for length in self._lengths:
            for start in range(len(words) - length + 1):
                number = self._number.get(" ".join(words[start : start + length]))
                if number is not None:
                    numbers.add(number)
        return sorted(numbers)

    def count(self, texts: Iterable[str]) -> np.ndarray:
        """Return [E] int64: how many texts match each entry."""
        counts = np.zeros(len(self), dtype=np.int64)
        for text in texts:
            counts[self.found_in(text)] += 1
        return counts


def shares(counts: np.ndarray, limit: float) -> np.ndarray:
    """Return [E] float64: the probability with which an entry keeps a text that matches it, min(1, limit / count)."""
    return np.minimum(1.0, limit / np.maximum(counts, 1))


def limit_of_tail(counts: np.ndarray, tail: float) -> int:
    """Return the limit with which entries that are kept whole have a given share of all matches (MetaCLIP 2, arXiv:2507.22062):
    a share that is chosen once gives each language a limit of its own.

    Args:
        counts: of each entry.
        tail: the share of all matches that entries with fewer than the limit have.

    Raises:
        ValueError: if nothing matches.
    """
    matched = np.sort(counts[counts > 0])
    if not len(matched):
        raise ValueError("no text matches any entry")
    number = int(np.searchsorted(np.cumsum(matched), tail * matched.sum(), side="left"))
    return int(matched[min(number, len(matched) - 1)])


@cache
def read_entries(path: str) -> Entries:
    """Read a file of one entry a line, or a list in JSON, as MetaCLIP's metadata are.

    Raises:
        UserError: if it cannot be read, or an entry is empty or there twice.
    """
    text = read_text(path)
    try:
        lines = (line.strip() for line in lines_of(text))
        names = json.loads(text) if text.lstrip().startswith("[") else [line for line in lines if line]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("an entry that is no text")
        return Entries(names)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Balance(Stage):
    """A stage that keeps texts in balance over entries.

    Attributes:
        entries: the file of them.
        digest: of that file.
        limit: texts of an entry that are kept whole, about; None: from `tail`.
        tail: the share of all matches that rare entries have, from which the limit follows.
        seed: of the draws.
        keys: members, or entries of the json, that hold the text, tried in turn.
        files: the folder of files that tables name.
    """

    entries: str
    digest: str
    limit: float | None
    tail: float | None
    seed: int
    keys: tuple[str, ...]
    files: str | None = None
    name = "balance"
    two_passes = True

    @property
    def options(self) -> dict[str, Any]:
        limits = {"limit": self.limit, "tail": self.tail}
        return {"entries": self.digest, **limits, "seed": self.seed, "keys": list(self.keys), "files": self.files}

    def measure(self, shard: ShardIndex, rows: np.ndarray, previous: pa.Table | None) -> pa.Table:
        """Return the entries that each text matches, and for each a number in [0, 1): a function of seed, shard and row."""
        entries = read_entries(self.entries)
        matches: list[list[int]] = []
        draws: list[list[float]] = []
        problems: list[str | None] = []
        for look in looks(shard, rows, members_of_keys(self.keys), {}):
            try:
                matched, problem = entries.found_in(look.text(self.keys)), None
            except (Missing, DecodeError) as error:
                matched, problem = [], str(error) if isinstance(error, Missing) else f"text unreadable ({error})"
            digest = hashlib.blake2b(f"balance {self.seed} {shard.digest} {look.row}".encode(), digest_size=8).digest()
            random = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
            matches.append(matched)
            draws.append(random.random(len(matched)).tolist())
            problems.append(problem)
        columns = {
            "entries": pa.array(matches, pa.list_(pa.int32())),
            f"{PRIVATE}drawn": pa.array(draws, pa.list_(pa.float64())),
        }
        return pa.table({**columns, f"{PRIVATE}why": pa.array(problems, pa.string())})

    def decide(self, tables: Iterator[pa.Table]) -> Decisions:
        """Return (how many texts match each entry, the share of them that each keeps)."""
        counts = np.zeros(len(read_entries(self.entries)), dtype=np.int64)
        for table in tables:
            matched = table["entries"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            counts += np.bincount(matched.astype(np.int64), minlength=len(counts))
        try:
            limit = self.limit if self.limit is not None else limit_of_tail(counts, self.tail or 0)
        except ValueError as error:
            raise UserError(f"{self.entries}: {error}") from error
        return counts, shares(counts, limit)

    def judge(self, measured: pa.Table, decisions: Decisions, number: int) -> Judgement:
        counts, keep_share = decisions
        names = read_entries(self.entries).names
        reasons: list[str | None] = []
        kinds: list[str | None] = []
        columns = (measured[name].to_pylist() for name in ("entries", f"{PRIVATE}drawn", f"{PRIVATE}why"))
        for matched, draws, problem in zip(*columns, strict=True):
            if any(draw < keep_share[entry] for entry, draw in zip(matched, draws, strict=True)):
                reasons.append(None)
            elif matched:
                rarest = min(matched, key=lambda entry: (counts[entry], entry))
                reasons.append(f"of frequent entries alone ({names[rarest]}, in {counts[rarest]} texts)")
            else:
                reasons.append(problem or "matches no entry")
            kinds.append(reasons[-1].partition(" (")[0] if reasons[-1] else None)
        return Judgement(reasons, {"texts that match an entry": sum(map(bool, measured["entries"].to_pylist()))}, kinds)


def balance_of(
    entries: Path, limit: float | None, tail: float | None, seed: int, keys: Sequence[str], files: str | None
) -> Balance:
    """Return the stage of a file of entries, which is read here once.

    Raises:
        UserError: for a file that is none; for neither limit nor tail, or both.
    """
    if (limit is None) == (tail is None):
        raise UserError("balance: say --limit (20000 for 400 million pairs, as MetaCLIP) or --tail (0.06), one of the two")
    read_entries(str(entries))
    digest = hashlib.blake2b(entries.read_bytes(), digest_size=16).hexdigest()
    return Balance(str(entries), digest, limit, tail, seed, tuple(keys), files)
