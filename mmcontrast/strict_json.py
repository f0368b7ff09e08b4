"""Writes JSON that every parser reads: NaN and infinity are null."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Return `json.dumps(value, **options)`, with null in place of floats that are NaN or infinite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_with_null(value), allow_nan=False, **options)


def _with_null(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _with_null(entry) for key, entry in value.items()}
    return [_with_null(entry) for entry in value] if isinstance(value, list | tuple) else value
