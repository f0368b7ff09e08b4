"""Data sets in the webdataset layout of CLIP_benchmark, opened as they are: their files say what they are for."""

import re
from pathlib import Path
from typing import Any

from mmcontrast.data import ShardOptions
from mmcontrast.data.class_texts import check_template
from mmcontrast.errors import UserError
from mmcontrast.evaluation.options import EvaluationOptions, ZeroShotOptions
from mmcontrast.text_files import read_text

KIND, CLASSES, TEMPLATES = "dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt"


def in_layout(folder: Path) -> bool:
    """Whether a folder is such a data set: it has class names or a type beside folders of numbered tars."""
    return any((folder / name).is_file() for name in (KIND, CLASSES)) and bool(list(folder.glob("*/0.tar")))


def is_layout(shards: Any) -> bool:
    """Whether a split names such a folder, alone or as FOLDER:SPLIT."""
    return isinstance(shards, str) and in_layout(Path(shards.partition(":")[0]))


def with_layouts(options: EvaluationOptions, image: str, text: str) -> EvaluationOptions:
    """The same options with the shards and tasks of those splits that are such folders. A folder may be followed by the split's
    name, FOLDER:train; default: test, or the only one.

    Args:
        image, text: the model's fields; "" for one that it has not.

    Raises:
        UserError: for a folder that is not whole, or of a type that is not known.
    """
    splits, zero_shot = dict(options.splits), dict(options.zero_shot)
    captions = options.captions if isinstance(options.captions, dict) else dict.fromkeys(splits, options.captions)
    for name, shards in options.splits.items():
        patterns = ShardOptions.of(shards).shards
        folder, _, which = patterns.partition(":") if isinstance(patterns, str) else ("", "", "")
        if not folder or not in_layout(Path(folder)):
            continue
        splits[name] = ShardOptions.of(shards).model_copy(update={"shards": shards_of(Path(folder), which)})
        kind = read_text(Path(folder) / KIND).strip().lower() if (Path(folder) / KIND).exists() else "classification"
        if kind == "retrieval":
            captions = {**captions, name: [text]}
        elif kind == "classification" and not text:
            continue  # a model without texts can be asked by probes, of the label cls
        elif kind == "classification":
            classes, templates = names_in(Path(folder) / CLASSES, 2), templates_in(Path(folder) / TEMPLATES)
            own = ZeroShotOptions(
                label="cls", field=image, prompt_field=text, templates=templates, classes=classes, splits=[name]
            )
            zero_shot.setdefault(name, own)
        else:
            raise UserError(f"{folder}: data of type {kind!r}; classification and retrieval can be evaluated")
    return options.model_copy(update={"splits": splits, "zero_shot": zero_shot, "captions": captions})


def shards_of(folder: Path, which: str) -> list[str]:
    """The tars of a split, in the order of their numbers.

    Raises:
        UserError: if there is no such split, or a tar is missing.
    """
    there = sorted(path.parent.name for path in folder.glob("*/0.tar"))
    which = which or ("test" if "test" in there else there[0])
    if which not in there:
        raise UserError(f"{folder} has no split {which!r}; it has {', '.join(there)}")
    numbered = [path for path in (folder / which).glob("*.tar") if re.fullmatch(r"\d+", path.stem)]
    tars = sorted(numbered, key=lambda path: int(path.stem))
    counted = folder / which / "nshards.txt"
    written = read_text(counted).strip() if counted.exists() else str(len(tars))
    if not re.fullmatch(r"[0-9]{1,9}", written):
        raise UserError(f"{counted}: {written[:40]!r} is no number of shards")
    number = int(written)
    if [path.stem for path in tars] != [str(k) for k in range(number)]:
        raise UserError(f"{folder / which}: {number} shards are named in nshards.txt, but there are {len(tars)}")
    return [str(path) for path in tars]


def names_in(file: Path, least: int = 1) -> list[str]:
    """Return the lines of a file, without spaces around them. A line is a class, in the order of the labels.

    Raises:
        UserError: for a blank line, or fewer than `least`.
    """
    lines = [line.strip() for line in read_text(file).splitlines()]
    for number, line in enumerate(lines, 1):
        if not line:
            raise UserError(f"{file}, line {number}: a blank line among {len(lines)}, where each is a name: remove it")
    if len(lines) < least:
        raise UserError(f"{file}: {len(lines)} lines, where each is a name; there are at least {least}")
    return lines


def templates_in(file: Path) -> list[str]:
    """Return the templates of a file, one a line.

    Raises:
        UserError: for a blank line, or a template that cannot be filled in.
    """
    templates = names_in(file)
    for number, template in enumerate(templates, 1):
        try:
            check_template(template)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from error
    return templates
