"""Read what a model of sentence-transformers adds to its transformers model: pooling, a length of texts, a prompt."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.errors import UserError
from mmcontrast.libraries import not_reached

SENTENCE_POOLINGS = {  # and what sentence-transformers calls them
    "first": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class SentenceSettings:
    """Settings of sentence-transformers around its transformers model; the defaults are those of any other model.

    Attributes:
        pooling: of the last hidden states; None: the model pools by itself.
        max_length: tokens of a text; None: what the tokenizer has.
        lower: texts are lowered before they are tokenized.
    """

    pooling: str | None = None
    max_length: int | None = None
    lower: bool = False


def sentence_settings(name: str, pooling: str | None = None) -> SentenceSettings:
    """Return the settings of a folder, or a name on the hub, of sentence-transformers. A default prompt is told of.

    Args:
        pooling: in place of its own, and of what comes after that.

    Raises:
        UserError: for one with modules that are not read here, as a Dense layer.
    """
    modules = _read(name, "modules.json")
    if modules is None:
        return SentenceSettings(pooling)
    paths = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if (others := paths.keys() - {"Transformer", "Pooling", "Normalize"}) and not pooling:
        raise UserError(
            f"{name} is a model of sentence-transformers with {', '.join(sorted(others))}, which is not read here: open the"
            " model that it was made of, or name pooling to leave that out"
        )
    prompts = _read(name, "config_sentence_transformers.json") or {}
    if prompt := (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")):
        message = f"sentence-transformers begins each text with {prompt!r}, which is not done here: write it before yours"
        warnings.warn(message, stacklevel=2)
    options = _read(name, _within(paths.get("Transformer", ""), "sentence_bert_config.json")) or {}
    length, lower = options.get("max_seq_length"), bool(options.get("do_lower_case"))
    own = _pooling(name, paths["Pooling"]) if "Pooling" in paths and not pooling else None
    return SentenceSettings(pooling or own, length, lower)


def _pooling(name: str, path: str) -> str:
    options = _read(name, _within(path, "config.json")) or {}
    modes = {mode for mode, key in SENTENCE_POOLINGS.items() if options.get(key)}
    if isinstance(options.get("pooling_mode"), str):  # of sentence-transformers 5.5 and later
        modes |= {{"cls": "first", "mean": "mean", "lasttoken": "last"}.get(options["pooling_mode"], options["pooling_mode"])}
    if len(modes) != 1 or not modes <= SENTENCE_POOLINGS.keys():
        raise UserError(f"{name} is a model of sentence-transformers whose pooling ({options}) is not read here: name one")
    return modes.pop()


def _within(path: str, file: str) -> str:
    return f"{Path(path).name}/{file}" if path else file


def _read(name: str, file: str) -> Any:
    """Return a JSON file of a folder or of a model on the hub; None if it is not there, or cannot be reached."""
    path = Path(name) / file
    if not Path(name).is_dir():
        from huggingface_hub import hf_hub_download

        failures: tuple[type[Exception], ...] = (*not_reached(), ValueError)  # the latter for what is no name of the hub
        try:
            path = Path(hf_hub_download(name, file))
        except failures:
            return None
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
