"""Build components by name: `type` is a known name or an import path (`my_lab.losses:MyObjective`), the rest are its
options."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from mmcontrast.errors import UserError
from mmcontrast.trust import import_by_path

signature_of = cache(inspect.signature)  # a loss by name is built at every step
SHOWN = 24  # names of a list in a message


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return "did you mean 'steps'?", or, if no name is close, the (beginning of the) list of names."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there is: {', '.join(names[:SHOWN])}" + (f", … ({len(names)} in all)" if len(names) > SHOWN else "")


def build(spec: Any, known: Mapping[str, Callable[..., Any]], kind: str, base: type | None = None, **context: Any) -> Any:
    """Build a component from a name or a mapping with `type` and options, or return an object as it is.

    Args:
        spec: "infonce", {"type": "siglip"}, {"type": "my_lab.losses:MyObjective", "beta": 0.5}, or an instance.
        known: the components of this package by name.
        kind: for messages: "objective", "tower".
        base: the class of which an import path must name a subclass: nothing else is called.
        context: further arguments that the caller, not the user, provides.

    Raises:
        UserError: for an unknown type or option, with the nearest valid one, or options that the component refuses.
    """
    if isinstance(spec, str):
        spec = {"type": spec}
    if not isinstance(spec, Mapping):
        return spec
    options = dict(spec)
    name = options.pop("type", None)
    if name is None:
        raise UserError(f"{kind} {dict(spec)} has no 'type'; {suggestion('', known)}")
    if ":" in name:
        constructor = import_by_path(name, kind)
        if not (inspect.isclass(constructor) and issubclass(constructor, base or object)):
            wanted = f"subclass of {base.__module__}.{base.__name__}" if base else "class"
            raise UserError(f"{kind} {name!r} must name a {wanted}, which this is not: it is not called")
    elif name in known:
        constructor = known[name]
    else:
        raise UserError(f"unknown {kind} type {name!r}; {suggestion(name, known)} (or an import path 'package.module:Name')")
    signature = signature_of(constructor)
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    valid = [name for name in signature.parameters if name not in context]
    for option in options:
        if option not in valid and not accepts_any:
            hint = suggestion(option, valid) if valid else "it takes none"
            raise UserError(f"{kind} {name!r} has no option {option!r}; {hint}")
    try:
        signature.bind(**options, **context)
    except TypeError as error:
        raise UserError(f"{kind} {name!r}: {error}") from error
    try:
        return constructor(**options, **context)
    except UserError:
        raise
    except ValueError as error:  # for an option's value
        raise UserError(f"{kind} {name!r}: {error}") from error
