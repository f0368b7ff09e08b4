"""Defines the base of all options that a config file sets: typed, frozen, unknown keys refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """The base class of options. See `mmcontrast.config` for the whole tree and for the errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


Component = str | dict[str, Any]  # a name, or a mapping with `type` and options
Patterns = str | list[str]  # of shards: paths, globs, brace ranges
Positive = Annotated[int, Field(gt=0)]
Texts = Annotated[list[str], Field(min_length=1)]
Weights = Annotated[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]
Keys = list[str | Weights]  # of a field, tried in turn: extensions, or several with the weights with which one is drawn
