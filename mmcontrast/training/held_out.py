"""The evaluation of what `data.held_out` holds out: splits that name it, or one for each source if no split is named."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

HELD_OUT = "held_out"  # in the place of a split's shards; of several sources held_out:NAME


def with_held_out(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's tree in which splits name the held-out part as shards with `held_out`: so a suite, or the evaluation of
    another model, can name it too.

    Raises:
        ValueError: for a source that there is not; for a split that is held out of what is trained on.
    """
    data, evaluation = _tree(tree.get("data")), _tree(tree.get("evaluation"))
    share, given = data.get(HELD_OUT), evaluation.get("splits") or {}
    if not isinstance(given, dict) or not data.get("train"):
        return dict(tree)
    splits = {name: _tree(shards) if isinstance(shards, BaseModel) else shards for name, shards in given.items()}
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
                names = ", ".join(f"{HELD_OUT}:{known}" for known in sources if known != HELD_OUT) or HELD_OUT
                raise ValueError(f"evaluation.splits.{name}: {shards}: of which source? There is {names}")
            splits[name] = sources[wanted] | {HELD_OUT: share}
        elif isinstance(shards, dict) and shards.get(HELD_OUT) and _trained_on(shards, sources, share):
            raise ValueError(
                f"evaluation.splits.{name}: {shards[HELD_OUT]} of data.train is held out there, but data.held_out is {share}:"
                f" its samples would be trained on; write {name}: {HELD_OUT}, or set data.held_out={shards[HELD_OUT]}"
            )
    if splits == given:
        return dict(tree)
    return {**tree, "evaluation": {**evaluation, "splits": splits}}


def _tree(options: Any) -> dict[str, Any]:
    """Return options as the mapping that they were made of."""
    if isinstance(options, BaseModel):
        return options.model_dump(exclude_unset=True)
    return dict(options) if isinstance(options, Mapping) else {}


def _sources(train: Any, fields: Mapping[str, Any], select: Any) -> dict[str, dict[str, Any]]:
    """Return what is trained on as shards of a split, by source. Fields that only provide negatives are not evaluated."""
    common = {} if select is None else {"select": select}
    if not isinstance(train, Mapping):
        return {HELD_OUT: {"shards": train, **common}}
    negatives = {field for field, of in fields.items() if _tree(of).get("negative_of")}
    sources = {}
    for name, source in train.items():
        named = ("shards", "files", "keys", "templates", "select")
        options = common | {key: value for key, value in _tree(source).items() if key in named and value is not None}
        if isinstance(options.get("keys"), Mapping):
            options["keys"] = {field: keys for field, keys in options["keys"].items() if field not in negatives}
        sources[name] = options
    return sources


def _trained_on(shards: Mapping[str, Any], sources: Mapping[str, Any], share: Any) -> bool:
    """Return whether samples of a split that is held out of what is trained on are trained on."""
    same = any(_patterns(shards.get("shards")) == _patterns(source.get("shards")) for source in sources.values())
    return same and (share is None or _number(share) < _number(shards[HELD_OUT]))


def _patterns(shards: Any) -> Any:
    return [shards] if isinstance(shards, str) else shards


def _number(value: Any) -> float:
    """Return a number as it stands in a file, NaN if it is none, which is refused later."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
