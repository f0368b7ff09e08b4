"""Published prompt templates and class names by name: those that come with open_clip."""

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError

TEMPLATES = {"openai_imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple_imagenet": "SIMPLE_IMAGENET_TEMPLATES"}
CLASSES = {"imagenet": "IMAGENET_CLASSNAMES"}


def named_templates(name: str) -> list[str]:
    """Return prompts with `{}` for a phrase: "openai_imagenet" are the 80 of CLIP's paper, "simple_imagenet" 7 of them.

    Raises:
        UserError: for another name.
    """
    return [template("{}") for template in _metadata(name, TEMPLATES, "templates")]


def named_classes(name: str) -> list[str]:
    """Return the names of classes in their usual order: "imagenet" are the 1,000 of ImageNet, as CLIP's authors cleaned them.

    Raises:
        UserError: for another name.
    """
    return list(_metadata(name, CLASSES, "classes"))


def _metadata(name: str, attributes: dict[str, str], kind: str) -> tuple:
    if name not in attributes:
        raise UserError(f"no {kind} of the name {name!r}; {suggestion(name, attributes)}")
    from open_clip import zero_shot_metadata

    return getattr(zero_shot_metadata, attributes[name])
