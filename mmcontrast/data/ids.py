"""Reads what a sample's json says of it: its ids, which are numbers or texts, and its weight."""

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
    """
    Raises:
        DecodeError: if it is not an object. Its NaN, which JSON does not have and others write for what is missing, is null.
    """
    try:
        encoding = "utf-8" if data[:1] == b"{" and data[1:2] != b"\0" else json.detect_encoding(data)
        about = _DECODER.decode(data.decode(encoding, "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"not JSON as it should be ({error or type(error).__name__})") from error
    if not isinstance(about, dict):
        raise DecodeError(f"a JSON {type(about).__name__}, not an object")
    return about


def ids_of(about: Mapping[str, Any], default: int) -> tuple[int, int]:
    """(sample id, group id) of what a json member says.

    Raises:
        DecodeError: if it cannot be so.
    """
    sample_id = id_of("sample_id", about.get("sample_id"), default)
    group_id = id_of("group_id", about.get("group_id"), sample_id)
    if group_id < 0:
        raise DecodeError(f"group_id {group_id} is negative")
    return sample_id, group_id


def id_of(name: str, value: Any, default: int) -> int:
    """An id that is given: a whole number; or a text, of which one that is a number just as it is printed, as "12", is that
    number, and any other, as "007" or a UUID, is hashed. Nothing, or an empty text: the default.

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


def weight_of(about: Mapping[str, Any]) -> float:
    """Return the `sample_weight` that a json member says: how much the sample counts in the loss; 1 if it says none.

    Raises:
        DecodeError: if it is no finite number of at least 0, as float32 holds it.
    """
    value = about.get("sample_weight")
    if value is None or value == "":
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST_WEIGHT:
        raise DecodeError(f"sample_weight {value!r:.60} is no finite number of at least 0")
    return float(value)


def default_id(shard: str, name: str) -> int:
    """The id of a sample that says none, in [0, 2^63). `shard`: of `identities`; `name`: the sample's within it."""
    return stable_hash(f"{shard}\0{name}")


def stable_hash(text: str) -> int:
    """A stable id in [0, 2^63)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1
