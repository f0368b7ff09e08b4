"""Finds the member of a sample, or the entry of its json, that a field is read from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from mmcontrast.data.shard import member_of

ENTRY = "json:"  # before the name of an entry of a sample's json, which is read like a member
FieldKeys = Sequence[str | Mapping[str, float]]  # tried in turn; of several with weights one is drawn


def choices_of(keys: FieldKeys) -> tuple[dict[str, float], ...]:
    """Return the keys that are tried in turn, each with the weights with which one of its alternatives is drawn."""
    return tuple({key: 1.0} if isinstance(key, str) else dict(key) for key in keys)


def names_of(keys: FieldKeys) -> tuple[str, ...]:
    """Return all keys that a field may be read from, in turn."""
    return tuple(key for choice in choices_of(keys) for key in choice)


def chosen(choices: Sequence[Mapping[str, float]], members: Mapping[str, bytes], training: bool) -> str:
    """Return the key that a field is read from among those that a sample has, "" if it has none."""
    for choice in choices:
        present = [key for key in choice if key in members]
        if len(present) > 1 and training:
            weights = torch.tensor([choice[key] for key in present], dtype=torch.float64)
            return present[int(torch.multinomial(weights, 1))]
        if present:
            return present[0]
    return ""


def member_name(key: str) -> str:
    """Return the member that a key is read from: itself, or the json."""
    return "json" if key.startswith(ENTRY) else key


def entry_of(metadata: Mapping[str, Any], key: str) -> Any:
    """Return what "json:a.b" names: the entry "a.b", or the entry b of a; None if there is none."""
    name, value = key.removeprefix(ENTRY), cast(Any, metadata)
    if name in metadata:
        return metadata[name]
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def entries_of(metadata: Mapping[str, Any], keys: Iterable[str]) -> dict[str, bytes]:
    """Return entries of a sample's json as members, without those that are empty.

    Raises:
        DecodeError: for an entry that is neither a text, nor a list of texts or of numbers.
    """
    members = {key: member_of(entry_of(metadata, key)) for key in keys}
    return {key: data for key, data in members.items() if data}
