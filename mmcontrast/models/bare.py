"""A model's own folder: what it is composed of, its weights, its tokenizers; all that opening it takes, and no run.

`mmcontrast_model.json` holds `fields`, `towers` and `model` as a config has them, `model.safetensors` the weights; or
`library`: a model of another library, whose own folder lies in this one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mmcontrast.errors import UserError
from mmcontrast.libraries import weights_follow
from mmcontrast.models.compose import make_model
from mmcontrast.models.contrastive import ContrastiveModel
from mmcontrast.models.options import FieldOptions, ModelOptions, ScoreOptions
from mmcontrast.trust import import_paths

BARE_CONFIG, BARE_WEIGHTS, LIBRARY = "mmcontrast_model.json", "model.safetensors", "library"
FORMAT = "mmcontrast model 1"


def read_bare(folder: Path) -> Mapping[str, Any]:
    """Return what a folder says of its model.

    Raises:
        UserError: if it is not as it should be.
    """
    file = folder / BARE_CONFIG
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{file} is not of the format {FORMAT!r}, which this version reads")
    return about


def compose_bare(folder: Path, about: Mapping[str, Any], trust_code: bool, weights: bool = True) -> ContrastiveModel:
    """Return the composed model of a folder, with its weights, in evaluation mode.

    Args:
        about: as `read_bare` gives it.
        trust_code: import what it names by import path.
        weights: False: random ones.

    Raises:
        UserError: for code that is not trusted.
        others: for what is not as it should be.
    """
    fields = {name: FieldOptions.model_validate(_beside(folder, options)) for name, options in about["fields"].items()}
    with import_paths(folder, trust_code), weights_follow():
        score = ScoreOptions.model_validate(about["score"]) if about.get("score") else None
        model = make_model(fields, about["towers"], ModelOptions.model_validate(about["model"]), seed=0, score=score)
    if weights:
        model.load_state_dict(load_file(folder / BARE_WEIGHTS))
    return model.eval()


def _beside(folder: Path, options: Any) -> Any:
    """Return a field's options, with the place of a tokenizer that lies in the folder."""
    modality = options.get("modality") if isinstance(options, dict) else None
    name = modality.get("tokenizer") if isinstance(modality, dict) else None
    if not isinstance(name, str) or ".." in Path(name).parts or not (folder / name).is_dir():
        return options
    return options | {"modality": modality | {"tokenizer": str(folder / name)}}  # type: ignore[operator]
