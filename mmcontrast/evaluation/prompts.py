"""Prompts' templates and class names that others have published, by name: those that come with open_clip."""

from string import Formatter

from mmcontrast.components import nearest
from mmcontrast.errors import UserError

TEMPLATES = {"openai_imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple_imagenet": "SIMPLE_IMAGENET_TEMPLATES"}
CLASSES = {"imagenet": "IMAGENET_CLASSNAMES"}
PLACEHOLDERS = ("", "0", "c")


def check_template(template: str) -> None:
    """
    Raises:
        ValueError: for a template in which a class's phrase has no place, or that has another placeholder.
    """
    wanted = "write {} or {c} where the class's phrase goes, like 'a photo of a {}.'"
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"the template {template!r} cannot be filled in ({error}): {wanted}") from error
    if not parts:
        raise ValueError(f"the template {template!r} has no placeholder, so every class has the same prompt: {wanted}")
    for _, name, form, conversion in parts:
        if name not in PLACEHOLDERS or form or conversion:  # a form may cut a phrase short
            shown = f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise ValueError(f"the template {template!r} has the placeholder {{{shown}}}: {wanted}")
    try:
        filled(template, "")
    except (IndexError, ValueError) as error:  # {} and {}; {0} and {}
        raise ValueError(f"the template {template!r} cannot be filled in ({error}): {wanted}") from error


def filled(template: str, phrase: str) -> str:
    """Return the prompt of a phrase."""
    return template.format(phrase, c=phrase)


def named_templates(name: str) -> list[str]:
    """Prompts with `{}` for a phrase: "openai_imagenet" are the 80 of CLIP's paper, "simple_imagenet" 7 of them.

    Raises:
        UserError: for another name.
    """
    return [template("{}") for template in _metadata(name, TEMPLATES, "templates")]


def named_classes(name: str) -> list[str]:
    """The names of classes in their usual order: "imagenet" are the 1,000 of ImageNet, as CLIP's authors cleaned them.

    Raises:
        UserError: for another name.
    """
    return list(_metadata(name, CLASSES, "classes"))


def _metadata(name: str, known: dict[str, str], kind: str) -> tuple:
    if name not in known:
        raise UserError(f"no {kind} of the name {name!r}; {nearest(name, known)}")
    from open_clip import zero_shot_metadata

    return getattr(zero_shot_metadata, known[name])
