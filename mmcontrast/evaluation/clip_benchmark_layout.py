"""Open data sets in the webdataset layout of CLIP_benchmark: their files define the tasks."""

import re
from pathlib import Path
from typing import Any

from mmcontrast.data import ShardOptions
from mmcontrast.data.class_texts import check_template
from mmcontrast.errors import UserError
from mmcontrast.evaluation.options import EvaluationOptions, ZeroShotOptions
from mmcontrast.text_files import lines_of, read_text

KIND, CLASSES, TEMPLATES = "dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt"


def in_layout(folder: Path) -> bool:
    """Return whether a folder has this layout: class names or a type beside folders of numbered tars."""
    return any((folder / name).is_file() for name in (KIND, CLASSES)) and bool(list(folder.glob("*/0.tar")))


def is_layout(shards: Any) -> bool:
    """Return whether a split names a folder of this layout, alone or as FOLDER:SPLIT."""
    return isinstance(shards, str) and in_layout(Path(shards.partition(":")[0]))


def with_layouts(options: EvaluationOptions, image: str, text: str) -> EvaluationOptions:
    """Return the options with the shards and tasks of those splits that are folders of this layout. A folder may be followed by
    the split's name, FOLDER:train; default: test, or the only one.

    Args:
        image, text: the model's fields; "" for one that it does not have.

    Raises:
        UserError: for an incomplete folder, or an unknown type.
    """
    splits, zero_shot = dict(options.splits), dict(options.zero_shot)
    captions = options.captions if isinstance(options.captions, dict) else dict.fromkeys(splits, options.captions)
    for name, shards in options.splits.items():
        patterns = ShardOptions.of(shards).shards
        folder, _, split = patterns.partition(":") if isinstance(patterns, str) else ("", "", "")
        if not folder or not in_layout(Path(folder)):
            continue
        splits[name] = ShardOptions.of(shards).model_copy(update={"shards": shards_of(Path(folder), split)})
        kind = read_text(Path(folder) / KIND).strip().lower() if (Path(folder) / KIND).exists() else "classification"
        if kind == "retrieval":
            captions = {**captions, name: [text]}
        elif kind == "classification" and not text:
            continue  # a model without texts can still be evaluated by probes, with the label cls
        elif kind == "classification":
            classes, templates = names_in(Path(folder) / CLASSES, 2), templates_in(Path(folder) / TEMPLATES)
            task = ZeroShotOptions(
                label="cls", field=image, prompt_field=text, templates=templates, classes=classes, splits=[name]
            )
            zero_shot.setdefault(name, task)
        else:
            raise UserError(f"{folder}: data of type {kind!r}; classification and retrieval can be evaluated")
    return options.model_copy(update={"splits": splits, "zero_shot": zero_shot, "captions": captions})


def shards_of(folder: Path, split: str) -> list[str]:
    """Return the tars of a split, in the order of their numbers.

    Raises:
        UserError: if there is no such split, or a tar is missing.
    """
    available = sorted(path.parent.name for path in folder.glob("*/0.tar"))
    split = split or ("test" if "test" in available else available[0])
    if split not in available:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(available)}")
    numbered = [path for path in (folder / split).glob("*.tar") if re.fullmatch(r"\d+", path.stem)]
    tars = sorted(numbered, key=lambda path: int(path.stem))
    count_file = folder / split / "nshards.txt"
    count = read_text(count_file).strip() if count_file.exists() else str(len(tars))
    if not re.fullmatch(r"[0-9]{1,9}", count):
        raise UserError(f"{count_file}: {count[:40]!r} is no number of shards")
    number = int(count)
    if [path.stem for path in tars] != [str(k) for k in range(number)]:
        raise UserError(f"{folder / split}: {number} shards are named in nshards.txt, but there are {len(tars)}")
    return [str(path) for path in tars]


def names_in(file: Path, least: int = 1) -> list[str]:
    """Return the stripped lines of a file. A line is a class, in the order of the labels.

    Raises:
        UserError: for a blank line, or fewer than `least`.
    """
    lines = [line.strip() for line in lines_of(read_text(file))]
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
