"""Makes texts of class-labelled data: prompts of a class's name by templates, as FLYP trains on (arXiv:2212.00638)."""

import unicodedata
from collections.abc import Sequence
from string import Formatter

import torch

from mmcontrast.data.ids import stable_hash
from mmcontrast.modalities import DecodeError

CLASS_NAME = "class_name"  # the entry of a sample's metadata
FOLDER = "folder"  # in the place of a member: the folder that a sample lies in, as in torchvision's ImageFolder
PLACEHOLDERS = ("", "0", "c")


def check_template(template: str) -> None:
    """Check a prompt template.

    Raises:
        ValueError: for a template in which a class's phrase has no place, or that has another placeholder.
    """
    remedy = "write {} or {c} where the class's phrase goes, like 'a photo of a {}.'"
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"the template {template!r} cannot be filled in ({error}): {remedy}") from error
    if not parts:
        raise ValueError(f"the template {template!r} has no placeholder, so every class has the same prompt: {remedy}")
    for _, name, format_spec, conversion in parts:
        if name not in PLACEHOLDERS or format_spec or conversion:  # a form may cut a phrase short
            shown = f"{name}{'!' + conversion if conversion else ''}{':' + format_spec if format_spec else ''}"
            raise ValueError(f"the template {template!r} has the placeholder {{{shown}}}: {remedy}")
    try:
        filled(template, "")
    except (IndexError, ValueError) as error:  # {} and {}; {0} and {}
        raise ValueError(f"the template {template!r} cannot be filled in ({error}): {remedy}") from error


def filled(template: str, phrase: str) -> str:
    """Return the prompt of a phrase."""
    return template.format(phrase, c=phrase)


def folder_of(key: str) -> bytes | None:
    """Return the name of the folder that a sample lies in, None if its key names none."""
    folders = key.split("/")[:-1]
    return folders[-1].encode("utf-8", "surrogateescape") if folders else None


def class_of(member: bytes) -> str:
    """Return the class that a member names, as evaluation compares labels: normalized, without spaces around it.

    Raises:
        DecodeError: for a member that is no one name.
    """
    try:
        name = unicodedata.normalize("NFC", member.decode("utf-8")).strip()
    except UnicodeDecodeError as error:
        raise DecodeError(f"a class's name that is not UTF-8 ({error})") from error
    if not name or len(name.splitlines()) > 1:
        raise DecodeError(f"{name[:60]!r} is not the name of one class")
    return name


def group_of(name: str) -> int:
    """Return the group id of all samples of a class: they are no negatives of each other."""
    return stable_hash(f"class {name}")


def prompt_of(name: str, templates: Sequence[str], training: bool) -> bytes:
    """Return a class's prompt: in training of a template that torch's generator draws, otherwise of the first."""
    number = int(torch.randint(len(templates), ())) if training and len(templates) > 1 else 0
    return filled(templates[number], name).encode()
