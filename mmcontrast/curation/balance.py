"""Balancing of texts over a list of entries (MetaCLIP, arXiv:2309.16671): the frequent are thinned out, the rare kept whole.

A text matches an entry that stands in it between spaces, once each of `,.;:?!` and the grave accent has been set apart. An entry
that N texts match keeps each of them with probability min(1, t / N); a text is kept if any of its entries keeps it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

SET_APART, SPACES = ",.;:?!`", "\t\n\r"
_SPACED = str.maketrans({**{mark: f" {mark} " for mark in SET_APART}, **dict.fromkeys(SPACES, " ")})


class Entries:
    """A list of entries, in which a text's are found in one walk over its words.

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
        words, found = f" {text.translate(_SPACED)} ".split(" "), set()
        words = words[1:-1]  # what stands before the first space, and behind the last
        for length in self._lengths:
            for start in range(len(words) - length + 1):
                number = self._number.get(" ".join(words[start : start + length]))
                if number is not None:
                    found.add(number)
        return sorted(found)

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
    """Return the limit by which a share of all matches is of entries that are kept whole (MetaCLIP 2, arXiv:2507.22062): a share
    that is chosen once gives each language a limit of its own.

    Args:
        counts: of each entry.
        tail: of all matches the share that entries with fewer than the limit have.

    Raises:
        ValueError: if nothing matches.
    """
    matched = np.sort(counts[counts > 0])
    if not len(matched):
        raise ValueError("no text matches any entry")
    place = int(np.searchsorted(np.cumsum(matched), tail * matched.sum(), side="left"))
    return int(matched[min(place, len(matched) - 1)])


def is_kept(sample_id: int, found: Sequence[int], share_of: np.ndarray | Mapping[int, float], seed: int) -> bool:
    """Return whether one of the entries that a text matches keeps it: a function of (seed, sample id, entry) alone."""
    return any(share_of[number] >= 1 or _drawn(seed, sample_id, number) < share_of[number] for number in found)


def _drawn(seed: int, sample_id: int, number: int) -> float:
    digest = hashlib.blake2b(f"balance {seed} {sample_id} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
