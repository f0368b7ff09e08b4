"""Make evaluation splits of the samples that `data.held_out` holds out."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

HELD_OUT = "held_out"  # instead of a split's shards; with several sources held_out:NAME


def with_held_out(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's tree whose splits give the held-out part as shards with `held_out`, as a suite, or the evaluation of
    another model, can give it too. If no split is named, each source gets one.

    Raises:
        ValueError: for an unknown source; for a split whose samples would be trained on.
    """
    data, evaluation = _tree(tree.get("data")), _tree(tree.get("evaluation"))
    share, named_splits = data.get(HELD_OUT), evaluation.get("splits") or {}
    if not isinstance(named_splits, dict) or not data.get("train"):
        return dict(tree)
    splits = {name: _tree(shards) if isinstance(shards, BaseModel) else shards for name, shards in named_splits.items()}
    sources = _sources(data["train"], _tree(tree.get("fields")), data.get("select"))
    if share is not None and not splits:
        splits = {name: source | {HELD_OUT: share} for name, source in sources.items()}
    for name, shards in splits.items():
        which, _, source = shards.partition(":") if isinstance(shards, str) else ("", "", "")
        if which == HELD_OUT and share is None and not Path(HELD_OUT).exists():
            raise ValueError(f"evaluation.splits.{name}: {shards}: nothing is held out: set data.held_out, as 0.1")
        if which == HELD_OUT and share is not None:
            wanted = source or (HELD_OUT if HELD_OUT in sources else "")
            if wanted not in sources:
                names = ", ".join(f"{HELD_OUT}:{source}" for source in sources if source != HELD_OUT) or HELD_OUT
                raise ValueError(f"evaluation.splits.{name}: {shards}: of which source? There is {names}")
            splits[name] = sources[wanted] | {HELD_OUT: share}
        elif isinstance(shards, dict) and shards.get(HELD_OUT) and _trained_on(shards, sources, share):
            raise ValueError(
                f"evaluation.splits.{name}: {shards[HELD_OUT]} of data.train is held out there, but data.held_out is {share}:"
                f" its samples would be trained on; write {name}: {HELD_OUT}, or set data.held_out={shards[HELD_OUT]}"
            )
    if splits == named_splits:
        return dict(tree)
    return {**tree, "evaluation": {**evaluation, "splits": splits}}


def _tree(options: Any) -> dict[str, Any]:
    """Return options as the mapping that they were made from."""
    if isinstance(options, BaseModel):
        return options.model_dump(exclude_unset=True)
    return dict(options) if isinstance(options, Mapping) else {}


def _sources(train: Any, fields: Mapping[str, Any], select: Any) -> dict[str, dict[str, Any]]:
    """Return the training shards as a split's, by source. Fields that only provide negatives are not evaluated."""
    common = {} if select is None else {"select": select}
    if not isinstance(train, Mapping):
        return {HELD_OUT: {"shards": train, **common}}
    negatives = {name for name, field in fields.items() if _tree(field).get("negative_of")}
    sources = {}
    for name, source in train.items():
        names = ("shards", "files", "keys", "templates", "select")
        options = common | {name: value for name, value in _tree(source).items() if name in names and value is not None}
        if isinstance(options.get("keys"), Mapping):
            options["keys"] = {field: keys for field, keys in options["keys"].items() if field not in negatives}
        sources[name] = options
    return sources


def _trained_on(shards: Mapping[str, Any], sources: Mapping[str, Any], share: Any) -> bool:
    """Return whether a split, held out of the training shards, has samples that are trained on."""
    same = any(_patterns(shards.get("shards")) == _patterns(source.get("shards")) for source in sources.values())
    return same and (share is None or _number(share) < _number(shards[HELD_OUT]))


def _patterns(shards: Any) -> Any:
    """Return the patterns of shards, of which a single one may stand alone."""
    return [shards] if isinstance(shards, str) else shards


def _number(value: Any) -> float:
    """Return a number from a file; NaN if it is none, which is refused later."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
