"""Open a model's own folder, which has its composition, weights and tokenizers, and needs no run.

`mmcontrast_model.json` holds `fields`, `towers` and `model` as a config has them, `model.safetensors` the weights; or
`library`: a model of another library, whose own folder is in this one.
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
    """Read the description of a folder's model.

    Raises:
        UserError: if it cannot be read, or has another format.
    """
    file = folder / BARE_CONFIG
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{file} is not of the format {FORMAT!r}, which this version reads")
    return description


def compose_bare(folder: Path, description: Mapping[str, Any], trust_code: bool, weights: bool = True) -> ContrastiveModel:
    """Return the composed model of a folder, with its weights, in evaluation mode.

    Args:
        description: as `read_bare` returns it.
        trust_code: import the code that it names by import path.
        weights: False: random ones.

    Raises:
        UserError: for code that is not trusted.
        others: for a description or weights that are wrong.
    """
    fields = {
        name: FieldOptions.model_validate(_locate_tokenizer(folder, options)) for name, options in description["fields"].items()
    }
    with import_paths(folder, trust_code), weights_follow():
        score = ScoreOptions.model_validate(description["score"]) if description.get("score") else None
        options = ModelOptions.model_validate(description["model"])
        model = make_model(fields, description["towers"], options, seed=0, score=score)
    if weights:
        model.load_state_dict(load_file(folder / BARE_WEIGHTS))
    return model.eval()


def _locate_tokenizer(folder: Path, options: Any) -> Any:
    """Return a field's options, with the path of its tokenizer if that is in the folder."""
    modality = options.get("modality") if isinstance(options, dict) else None
    name = modality.get("tokenizer") if isinstance(modality, dict) else None
    if not isinstance(name, str) or ".." in Path(name).parts or not (folder / name).is_dir():
        return options
    return options | {"modality": modality | {"tokenizer": str(folder / name)}}  # type: ignore[operator]
