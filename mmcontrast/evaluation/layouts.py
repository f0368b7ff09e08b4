"""Data sets in the webdataset layout of CLIP_benchmark, opened as they are: their files say what they are for."""

import re
from pathlib import Path
from typing import Any

from mmcontrast.errors import UserError
from mmcontrast.evaluation.options import EvaluationOptions, ZeroShotOptions

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
        folder, _, which = shards.partition(":") if isinstance(shards, str) else ("", "", "")
        if not folder or not in_layout(Path(folder)):
            continue
        splits[name] = shards_of(Path(folder), which)
        kind = read(Path(folder) / KIND).strip().lower() if (Path(folder) / KIND).exists() else "classification"
        if kind == "retrieval":
            captions = {**captions, name: [text]}
        elif kind == "classification" and not text:
            continue  # a model without texts can be asked by probes, of the label cls
        elif kind == "classification":
            classes = [line.strip() for line in read(Path(folder) / CLASSES).splitlines()]
            templates = [line.strip() for line in read(Path(folder) / TEMPLATES).splitlines()]
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
    number = int(read(counted)) if counted.exists() else len(tars)
    if [path.stem for path in tars] != [str(k) for k in range(number)]:
        raise UserError(f"{folder / which}: {number} shards are named in nshards.txt, but there are {len(tars)}")
    return [str(path) for path in tars]


def read(file: Path) -> str:
    """
    Raises:
        UserError: if it cannot be.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
