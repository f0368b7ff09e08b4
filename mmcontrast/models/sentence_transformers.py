"""Read how a folder of sentence-transformers pools the last hidden states of its model."""

import json
from pathlib import Path

from mmcontrast.errors import UserError

SENTENCE_POOLINGS = {  # and what sentence-transformers calls them
    "first": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


def sentence_pooling(name: str) -> str | None:
    """Return the pooling of a folder of sentence-transformers; None for another folder, a name on the hub, or a model that
    pools by itself.

    Raises:
        UserError: for one with modules that are not read here, as a Dense layer.
    """
    folder = Path(name)
    if not (folder / "modules.json").is_file():
        return None
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds = {module["type"].rpartition(".")[2]: folder / Path(module["path"]).name for module in modules}
    if others := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(
            f"{name} is a folder of sentence-transformers with {', '.join(sorted(others))}, which is not read here: open the"
            " model that it was made of, or name pooling to leave that out"
        )
    if "Pooling" not in kinds:  # a dual encoder, which pools by itself
        return None
    options = json.loads((kinds["Pooling"] / "config.json").read_text(encoding="utf-8"))
    modes = {mode for mode, key in SENTENCE_POOLINGS.items() if options.get(key)}
    if isinstance(options.get("pooling_mode"), str):  # of sentence-transformers 5.5 and later
        modes |= {{"cls": "first", "mean": "mean", "lasttoken": "last"}.get(options["pooling_mode"], options["pooling_mode"])}
    if len(modes) != 1 or not modes <= SENTENCE_POOLINGS.keys():
        raise UserError(f"{name} is a folder of sentence-transformers whose pooling ({options}) is not read here: name one")
    return modes.pop()
