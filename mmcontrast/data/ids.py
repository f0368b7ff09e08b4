"""Reads a sample's json: its ids, which are numbers or texts, and its weight."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from mmcontrast.modalities import DecodeError

LARGEST_WEIGHT = 3.4e38  # of float32
WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,18}")  # as Python prints it: other texts are hashed

_DECODER = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))  # made once


def read_json(data: bytes) -> dict[str, Any]:
    """Parse a sample's json. NaN, which JSON does not have and some write for missing values, is read as null; half of a pair
    of surrogates, as of an emoji that was cut, as U+FFFD.

    Raises:
        DecodeError: if it is not an object.
    """
    try:
        encoding = "utf-8" if data[:1] == b"{" and data[1:2] != b"\0" else json.detect_encoding(data)
        try:
            text = data.decode(encoding)
            may_have_halves = "\\ud" in text or "\\uD" in text
        except UnicodeDecodeError:
            text, may_have_halves = data.decode(encoding, "surrogatepass"), True
        metadata = _DECODER.decode(text)
        if may_have_halves:
            metadata = _without_halves(metadata)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"not JSON as it should be ({error or type(error).__name__})") from error
    if not isinstance(metadata, dict):
        raise DecodeError(f"a JSON {type(metadata).__name__}, not an object")
    return metadata


def _without_halves(value: Any) -> Any:
    """Return a value of JSON whose texts can be written as UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_without_halves(name): _without_halves(entry) for name, entry in value.items()}
    return [_without_halves(entry) for entry in value] if isinstance(value, list) else value


def shown(key: str) -> str:
    """Return a key as a text that can be written; what is not UTF-8 in it as \\xff."""
    return key if key.isascii() else key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def ids_of(metadata: Mapping[str, Any], default: int) -> tuple[int, int]:
    """Return (sample id, group id) from a sample's json.

    Raises:
        DecodeError: for an id that is neither a whole number nor a text, or a negative group id.
    """
    sample_id = id_of("sample_id", metadata.get("sample_id"), default)
    group_id = id_of("group_id", metadata.get("group_id"), sample_id)
    if group_id < 0:
        raise DecodeError(f"group_id {group_id} is negative")
    return sample_id, group_id


def id_of(name: str, value: Any, default: int) -> int:
    """Return the id that a value means: a whole number is itself; a text that is a number just as it is printed, as "12", is
    that number, and any other text, as "007" or a UUID, is hashed; None or an empty text is the default.

    Raises:
        DecodeError: if it is neither, or no number of 64 bits.
    """
    if value is None or value == "":
        return default
    if isinstance(value, str):
        number = int(value) if WHOLE_NUMBER.fullmatch(value) else 2**63
        return number if -(2**63) < number < 2**63 else stable_hash(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value == int(value)):
        raise DecodeError(f"{name} {value!r:.60} is neither a whole number nor a text")
    if not -(2**63) < value < 2**63:
        raise DecodeError(f"{name} {value} is beyond 64 bits: write it as a text")
    if isinstance(value, float) and abs(value) > 2**53:
        raise DecodeError(f"{name} {value} has been rounded to a float: write it as a whole number or as a text")
    return int(value)


def weight_of(metadata: Mapping[str, Any]) -> float:
    """Return the `sample_weight` in a sample's json, how much it counts in the loss; 1 if there is none.

    Raises:
        DecodeError: if it is no finite number of at least 0, as float32 holds it.
    """
    value = metadata.get("sample_weight")
    if value is None or value == "":
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST_WEIGHT:
        raise DecodeError(f"sample_weight {value!r:.60} is no finite number of at least 0")
    return float(value)


def default_id(shard: str, name: str) -> int:
    """Return the id of a sample that has none, in [0, 2^63). `shard`: of `identities`; `name`: the sample's within it."""
    return stable_hash(f"{shard}\0{name}")


def stable_hash(text: str) -> int:
    """Return a hash in [0, 2^63) that is the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1
