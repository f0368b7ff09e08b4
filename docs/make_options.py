"""Write docs/options.md, the reference of a config's options, from the classes that read them: python docs/make_options.py"""

import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmcontrast.config import RunConfig
from mmcontrast.modalities import MODALITIES
from mmcontrast.models.compose import TOWERS
from mmcontrast.objectives.names import OBJECTIVES, PAIRINGS

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options of a config

Made from the classes that read a config, by `python docs/make_options.py`. `mmcontrast config CONFIG` prints a config with all
of its defaults; any option is overridden on the command line as `section.option=value`, and `section.option=null` restores a
default. Unknown options are refused.
"""
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def described(documentation: str | None) -> dict[str, str]:
    """Return what a docstring says under Attributes or Args, by name; "a, b: …" is of both."""
    found: dict[str, str] = {}
    section = re.search(
        r"\n *(?:Attributes|Args):\n(.*?)(?:\n\s*\n *\w+:\n|\Z)", inspect.cleandoc(documentation or ""), re.DOTALL
    )
    for entry in re.split(r"\n(?= {4}\S)", section[1]) if section else ():
        names, _, text = " ".join(entry.split()).partition(": ")
        for name in re.split(r", | and ", names):
            found[name] = text
    return found


def shown_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [
            f"{sign} {value:g}" for part in arguments[1:] for name, sign in BOUNDS.items() for value in limits(part, name)
        ]
        return " ".join([shown_type(arguments[0]), *bounds])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(shown_type(part) for part in arguments if part is not type(None)))
    if origin in (list, tuple):
        return f"list of {shown_type(arguments[0])}"
    if origin in (dict, Mapping):
        return f"mapping of {shown_type(arguments[0])} to {shown_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if annotation is Any:
        return "anything"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", str(annotation)), getattr(annotation, "__name__", str(annotation))
    )


def limits(part: Any, name: str) -> list[Any]:
    """Return the bounds of one kind that a constraint has."""
    parts = [part, *getattr(part, "metadata", [])]
    return [value for one in parts if (value := getattr(one, name, None)) is not None]


def shown_default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "" if field.default_factory is None else "its own"
    if isinstance(field.default, BaseModel):
        return "its own"
    if field.default is None:
        return "–"
    shown = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{shown}`".replace("'", "")


def table(options: type[BaseModel]) -> str:
    """Return a section: what the class is, and a row an option."""
    documentation = inspect.cleandoc(options.__doc__ or "").partition("\n\n")[0]
    texts, rows = described(options.__doc__), []
    for name, field in options.model_fields.items():
        annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        default = "**required**" if field.is_required() else shown_default(field)
        text = texts.get(name, "").replace("|", "\\|")
        text = text if text[:1] in "κ" else f"{text[:1].upper()}{text[1:]}"
        rows.append(f"| `{name}` | {shown_type(annotation)} | {default} | {text} |")
    head = f"## {options.__name__}\n\n{' '.join(documentation.split())}\n\n| option | type | default | |\n|---|---|---|---|\n"
    return head + "\n".join(rows)


def groups(options: type[BaseModel], seen: dict[type[BaseModel], None]) -> None:
    """Collect a class of options and all that it is made of, in the order of the config."""
    if options in seen:
        return
    seen[options] = None
    for field in options.model_fields.values():
        for part in parts_of(field.annotation):
            groups(part, seen)


def parts_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for argument in get_args(annotation) for part in parts_of(argument)]


def components(title: str, known: Mapping[str, Callable[..., Any]]) -> str:
    """Return a section of components by name, with the options of each."""
    rows = []
    for name, made in known.items():
        parameters = [p for p in inspect.signature(made).parameters.values() if p.name != "self"]
        options = [
            p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters if p.kind is not p.VAR_KEYWORD
        ]
        summary = inspect.cleandoc(made.__doc__ or "").partition("\n\n")[0]
        cells = [f"`{name}`", ", ".join(f"`{option}`" for option in options) or "–", " ".join(summary.split())]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return f"## {title}\n\n| type | options | |\n|---|---|---|\n" + "\n".join(rows)


def page() -> str:
    seen: dict[type[BaseModel], None] = {}
    groups(RunConfig, seen)
    sections = [table(options) for options in seen]
    named = {"Modalities": MODALITIES, "Towers": TOWERS, "Objectives": OBJECTIVES, "Pairings": PAIRINGS}
    sections += [components(title, known) for title, known in named.items()]
    return HEAD + "\n" + "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
