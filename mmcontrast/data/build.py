"""`mmcontrast data build`: builds a corpus from a YAML file that names its source."""

import json
from pathlib import Path
from typing import Any

from mmcontrast.components import build
from mmcontrast.data.writer import MANIFEST, Source, write_corpus
from mmcontrast.errors import UserError
from mmcontrast.yaml_files import read_yaml


def build_corpus(config: Path, out: Path | None = None, workers: int | None = None, overwrite: bool = False) -> str:
    """Build the corpus that `config` describes: `out`, `samples_per_shard` and `source`, a component of `Source`'s interface.

    Returns:
        One line that says what was done.

    Raises:
        UserError: if another corpus is in the folder, or the description is wrong.
    """
    description: dict[str, Any] = read_yaml(config)
    if not isinstance(description, dict) or not {"out", "source"} <= description.keys():
        raise UserError(f"{config}: a corpus needs the keys 'out' and 'source' (and may have 'samples_per_shard')")
    if unknown := description.keys() - {"out", "source", "samples_per_shard"}:
        raise UserError(f"{config}: unknown key {sorted(unknown)[0]!r}; there is: out, samples_per_shard, source")
    folder, origin = out or Path(description["out"]), {"built_from": description}
    manifest = folder / MANIFEST
    if manifest.exists() and not overwrite:
        if json.loads(manifest.read_text()).get("built_from") == description:
            return f"{folder} is complete: nothing to do (--overwrite builds it again)"
        raise UserError(f"{folder} holds a corpus of another description: --overwrite it, or choose another --out")
    source = build(description["source"], {}, f"{config}: source", Source)
    manifest.unlink(missing_ok=True)  # until the new one is complete
    new_manifest = write_corpus(
        folder, source, samples_per_shard=description.get("samples_per_shard", 1000), workers=workers, about=origin
    )
    counts = ", ".join(f"{split} {entry['samples']}" for split, entry in new_manifest["splits"].items())
    return f"{folder}: {counts} samples"
