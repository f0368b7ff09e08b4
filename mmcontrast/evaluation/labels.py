"""Labels of samples against names of classes: which label is which class, and what to say of those that are none."""

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
    """Return the text of a label as JSON, a table or a program holds it, without spaces around it; None where there is none:
    null, NaN, nothing but spaces. A float that is an integer is that integer, as pandas makes floats of integers."""
    if isinstance(value, np.generic | Tensor):
        value = value.item()
    if value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ")
    return unicodedata.normalize("NFC", str(value)).strip() or None


def _same(text: str) -> Any:
    """Return what is equal for texts that say the same value: 1 and 1.0, true and True."""
    if text.lower() in BOOLS:
        return text.lower()
    return Decimal(text) if NUMERAL.fullmatch(text) else text


def _alike(text: str) -> str:
    """Return what is equal for texts that a person may have meant to be equal: letters of any case, 01 and 1, - and _."""
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
        self.alike: dict[str, str] = {}
        for text, number in self.exact.items():
            value = _same(text)
            self.by_value[value] = None if value in self.by_value else number  # what two classes could be is neither
            self.alike[_alike(text)] = text

    def number(self, text: str) -> int | None:
        """Return the class of a label's text, None if there is none or it could be several."""
        if (found := self.exact.get(text)) is None and (found := self.by_value.get(_same(text))) is None:
            if text.lower() in BOOLS:
                return self.exact.get(BOOLS[text.lower()])
            if self.numbered and INTEGER.fullmatch(text):
                return self.exact.get(str(int(text)))
        return found

    def match(self, labels: Iterable[Any], place: str) -> "MatchedLabels":
        """Find the classes of labels.

        Args:
            place: of the task, for messages.

        Raises:
            UserError: for a label that is none of a list's numbers, or differs from a class in case, zeros or hyphens alone.
        """
        texts = [label_text(value) for value in labels]
        numbers = {text: self.number(text) for text in set(texts) if text is not None}
        others = Counter(text for text in texts if text is not None and numbers[text] is None)
        matched = MatchedLabels(
            torch.tensor([-1 if text is None or numbers[text] is None else numbers[text] for text in texts], dtype=torch.int64),
            texts.count(None),
            others,
        )
        meant = {text: self.alike[_alike(text)] for text in others if _alike(text) in self.alike}
        if meant or (self.numbered and others):
            raise UserError(f"{place}: {self.unlike(others, meant)}")
        return matched

    def unlike(self, others: Counter[str], meant: dict[str, str]) -> str:
        """Return a sentence of labels that match no class: what was seen, how often, what was wanted, what may be meant."""
        seen = ", ".join(f"{text[:40]!r} ({number})" for text, number in others.most_common(SHOWN))
        seen += f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        if self.numbered:
            wanted = f"the list names {len(self.names)} classes, which are the labels 0 to {len(self.names) - 1}"
            remedy = "name every class, in the order of the labels, or give a mapping of labels to phrases"
        else:
            wanted = ", ".join(repr(name[:40]) for name in self.names[:SHOWN])
            wanted = f"the {len(self.names)} classes are {wanted}{', …' if len(self.names) > SHOWN else ''}"
            remedy = "write classes as the labels are"
        text = next(iter(others))
        hint = ", ".join(f"{a[:40]!r} is not {b[:40]!r}" for a, b in list(meant.items())[:SHOWN])
        if not hint and not self.numbered and (close := difflib.get_close_matches(text, self.names, n=1)):
            hint = f"did you mean {close[0][:40]!r}?"
        return f"labels that are no class: {seen}; {wanted}; {f'{hint}; ' if hint else ''}{remedy}"


@dataclass(frozen=True)
class MatchedLabels:
    """
    Attributes:
        numbers: int64 [N], positions of classes, −1 where a sample has none.
        unlabelled: how many samples have no label.
        others: labels that are no class, with their counts.
    """

    numbers: Tensor
    unlabelled: int
    others: Counter[str]


def entries_of(metadata: Sequence[dict[str, Any]], label: str, place: str) -> list[Any]:
    """Return one entry of each sample's json.

    Raises:
        UserError: if no sample has it.
    """
    values = [entry.get(label) for entry in metadata]
    if values and all(label_text(value) is None for value in values):
        names = sorted({name for entry in metadata[:1000] for name in entry})
        raise UserError(f"{place}: no sample has the label {label!r} in its json or columns; {suggestion(label, names)}")
    return values


def labels_ahead(dataset: ShardDataset, most: int = LOOKED_AT) -> tuple[list[dict[str, Any]], bool]:
    """Read what samples say of themselves before they are embedded: (metadata of `most` samples, evenly spread,
    or of all; whether these are all). Nothing of remote shards, which are slow to read twice."""
    if dataset.remote:
        return [], False
    bare = copy.copy(dataset)
    bare.modalities, bare.keys = {}, {field: bare.keys[field] for field in bare.templates if field in bare.keys}  # labels alone
    rows = np.unique(np.linspace(0, len(bare) - 1, min(len(bare), most)).astype(np.int64))
    samples = [bare[row] for row in rows.tolist()]
    return [sample.metadata for sample in samples if not sample.error], len(samples) == len(bare)
