"""The base of all options that a config file sets: typed, frozen, unknown keys refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """See `mmcontrast.config` for the whole tree and for the errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


Component = str | dict[str, Any]  # a name, or a mapping with `type` and options
Patterns = str | list[str]  # of shards: paths, globs, brace ranges
Positive = Annotated[int, Field(gt=0)]


class ShardOptions(Options):
    """Shards whose columns or extensions, or whose files, are not where a model would look for them.

    Attributes:
        shards: tars, also by URL, folders, tables.
        files: of tables whose columns name files, the folder in which these are; default: the table's own. Absolute paths have
            to be in it too.
        keys: of fields, the extensions or columns of their member, tried in turn: {text: [caption]}.
    """

    shards: Patterns
    files: str | None = None
    keys: dict[str, list[str]] = {}

    @classmethod
    def of(cls, shards: "Shards | dict[str, Any]") -> "ShardOptions":
        """Return patterns as options of shards."""
        if isinstance(shards, dict):
            return cls.model_validate(shards)
        return shards if isinstance(shards, ShardOptions) else cls(shards=shards)


Shards = str | list[str] | ShardOptions
