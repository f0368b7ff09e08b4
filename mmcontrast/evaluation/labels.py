"""Match the labels of samples to classes, and describe labels that match none."""

import copy
import datetime
import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcontrast.components import suggestion
from mmcontrast.data import ShardDataset
from mmcontrast.errors import UserError

NUMERAL = re.compile(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,2})?", re.ASCII)
INTEGER = re.compile(r"[+-]?[0-9]{1,40}", re.ASCII)
BOOLS = {"true": "1", "false": "0"}
SHOWN = 5  # labels and classes of a message
LOOKED_AT = 5000  # samples of a split whose labels are read before anything is embedded


def label_text(value: Any) -> str | None:
    """Return the stripped text of a label from JSON, a table or a program; None for null, NaN and blanks. An integral float
    becomes an integer, as pandas turns integers into floats."""
    if isinstance(value, np.generic | Tensor):
        value = value.item()
    if value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list | tuple | dict):
        raise UserError(f"the label {str(value)[:60]} is several values: a label is one")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ")
    return unicodedata.normalize("NFC", str(value)).strip() or None


def _value_key(text: str) -> Any:
    """Return a key that is equal for texts of the same value: 1 and 1.0, true and True."""
    if text.lower() in BOOLS:
        return text.lower()
    return Decimal(text) if NUMERAL.fullmatch(text) else text


def _loose_key(text: str) -> str:
    """Return a key that is equal for texts that a person may have meant to be equal: in any case, 01 and 1, - and _."""
    text = re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", unicodedata.normalize("NFKC", text).casefold())
    return re.sub(r"(?<![\d.])0+(?=\d)", "", text)


class ClassLabels:
    """The labels of K classes.

    Args:
        names: of the classes.
        numbered: they are 0, 1, … of a list, which has to have all of them.
    """

    def __init__(self, names: Sequence[str], numbered: bool = False) -> None:
        self.names, self.numbered = list(names), numbered
        self.exact = {label_text(name) or "": number for number, name in enumerate(names)}
        self.by_value: dict[Any, int | None] = {}
        self.by_loose_key: dict[str, str] = {}
        for text, number in self.exact.items():
            value = _value_key(text)
            self.by_value[value] = None if value in self.by_value else number  # ambiguous values match neither class
            self.by_loose_key[_loose_key(text)] = text

    def number(self, text: str) -> int | None:
        """Return the class of a label's text; None if there is none or it is ambiguous."""
        if (number := self.exact.get(text)) is None and (number := self.by_value.get(_value_key(text))) is None:
            if text.lower() in BOOLS:
                return self.exact.get(BOOLS[text.lower()])
            if self.numbered and INTEGER.fullmatch(text):
                return self.exact.get(str(int(text)))
        return number

    def match(self, labels: Iterable[Any], task_name: str) -> "MatchedLabels":
        """Find the classes of labels.

        Args:
            task_name: for messages.

        Raises:
            UserError: for a label that is none of a list's numbers, or differs from a class in case, zeros or hyphens alone.
        """
        texts = [label_text(value) for value in labels]
        numbers = {text: self.number(text) for text in set(texts) if text is not None}
        unmatched = Counter(text for text in texts if text is not None and numbers[text] is None)
        matched = MatchedLabels(
            torch.tensor([-1 if text is None or numbers[text] is None else numbers[text] for text in texts], dtype=torch.int64),
            texts.count(None),
            unmatched,
        )
        meant = {text: self.by_loose_key[_loose_key(text)] for text in unmatched if _loose_key(text) in self.by_loose_key}
        if meant or (self.numbered and unmatched):
            raise UserError(f"{task_name}: {self.mismatch_message(unmatched, meant)}")
        return matched

    def mismatch_message(self, unmatched: Counter[str], meant: dict[str, str]) -> str:
        """Return a message about labels that match no class: examples with counts, the expected classes, a likely fix."""
        examples = ", ".join(f"{text[:40]!r} ({number})" for text, number in unmatched.most_common(SHOWN))
        examples += f" and {len(unmatched) - SHOWN} more" if len(unmatched) > SHOWN else ""
        if self.numbered:
            expected = f"the list names {len(self.names)} classes, which are the labels 0 to {len(self.names) - 1}"
            remedy = "name every class, in the order of the labels, or give a mapping of labels to phrases"
        else:
            expected = ", ".join(repr(name[:40]) for name in self.names[:SHOWN])
            expected = f"the {len(self.names)} classes are {expected}{', …' if len(self.names) > SHOWN else ''}"
            remedy = "write classes as the labels are"
        text = next(iter(unmatched))
        hint = ", ".join(f"{a[:40]!r} is not {b[:40]!r}" for a, b in list(meant.items())[:SHOWN])
        if not hint and not self.numbered and (close := difflib.get_close_matches(text, self.names, n=1)):
            hint = f"did you mean {close[0][:40]!r}?"
        return f"labels that are no class: {examples}; {expected}; {f'{hint}; ' if hint else ''}{remedy}"


@dataclass(frozen=True)
class MatchedLabels:
    """The classes of samples' labels.

    Attributes:
        numbers: int64 [N], positions of classes, −1 where a sample has none.
        unlabelled: how many samples have no label.
        unmatched: labels that are no class, with their counts.
    """

    numbers: Tensor
    unlabelled: int
    unmatched: Counter[str]


def entries_of(metadata: Sequence[dict[str, Any]], label: str, task_name: str) -> list[Any]:
    """Return one entry of each sample's metadata.

    Raises:
        UserError: if no sample has it.
    """
    values = [entry.get(label) for entry in metadata]
    if values and all(label_text(value) is None for value in values):
        names = sorted({name for entry in metadata[:1000] for name in entry})
        raise UserError(f"{task_name}: no sample has the label {label!r} in its json or columns; {suggestion(label, names)}")
    return values


def labels_ahead(dataset: ShardDataset, limit: int = LOOKED_AT) -> tuple[list[dict[str, Any]], bool]:
    """Read metadata before anything is embedded: (metadata of `limit` samples, evenly spread, or of all; whether it is all).
    Read nothing of remote shards, which are slow to read twice."""
    if dataset.remote:
        return [], False
    bare = copy.copy(dataset)
    bare.modalities, bare.keys = {}, {field: bare.keys[field] for field in bare.templates if field in bare.keys}  # labels alone
    rows = np.unique(np.linspace(0, len(bare) - 1, min(len(bare), limit)).astype(np.int64))
    samples = [bare[row] for row in rows.tolist()]
    return [sample.metadata for sample in samples if not sample.error], len(samples) == len(bare)
