"""Write the model card of an export, README.md: usage, parity, results, and blanks for its author."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcontrast.embedder import Embedder
from mmcontrast.evaluation.results import DETAILS
from mmcontrast.export.parts import kind_of
from mmcontrast.yaml_files import dump_yaml

LIBRARIES = {
    "open_clip": "open_clip",
    "huggingface": "transformers",
    "sentence-transformers": "sentence-transformers",
    "onnx": "onnx",
    "safetensors": "mmcontrast",
}
MOST_RESULTS = 40  # rows of the card


def write_card(
    folder: Path,
    name: str,
    embedder: Embedder,
    fields: Sequence[str],
    kind: str,
    usage: str,
    parity: Mapping[str, Any],
    notes: Sequence[str],
    run: Path | None,
) -> None:
    """Write README.md, with licence and training data for the author to fill in.

    Args:
        run: the run whose results.json belongs to this checkpoint, if it was evaluated.
    """
    kinds = {field: kind_of(embedder.model, field) for field in fields}
    front_matter: dict[str, Any] = {
        "library_name": LIBRARIES[kind],
        "tags": ["contrastive", "mmcontrast", *sorted(set(kinds.values()))],
    }
    if sorted(kinds.values()) == ["image", "text"]:
        front_matter["pipeline_tag"] = "zero-shot-image-classification"
    yaml_header = dump_yaml(front_matter)
    yaml_header += "license:  # to be filled in by the author, as in: apache-2.0\n"
    yaml_header += "datasets:  # to be filled in by the author\n"
    lines = [
        f"---\n{yaml_header}---\n\n# {name}\n",
        f"A contrastive model of {', '.join(fields)}: embeddings of {embedder.model.embed_dim} numbers, exported by mmcontrast"
        f" {_version()} from `{embedder.name}`.\n",
        f"## Use\n\n```python\n{usage.replace('FOLDER', name)}```\n",
        "## Parity\n",
        f"The folder was opened in its own library, and embedded the same samples ({_describe_samples(parity['samples'])})"
        " as the model that it was made of, from the files on. Largest difference between two numbers of their unit"
        " embeddings:\n",
        "| field | samples | largest difference |\n|---|---|---|",
        *(f"| {field} | {entry['samples']} | {entry['largest_difference']:.1e} |" for field, entry in parity["fields"].items()),
        *(f"| {score} | | {parity[score]:.1e} |" for score in ("logit_scale", "logit_bias") if score in parity),
        "",
        *(_describe_pixels(field, entry) for field, entry in parity["fields"].items() if "from_files" in entry),
        *(f"* {note}\n" for note in [*notes, *parity.get("notes", ())]),
        "## Results\n",
        _results(run),
        "## Training data\n\nTo be filled in by the author: what the model was trained on, where it comes from, and who may use"
        " it.\n",
        "## Licence\n\nTo be filled in by the author, above and here; the licences of the model that training started from, and"
        " of the data, may bind this one.\n",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _version() -> str:
    from mmcontrast import __version__

    return __version__


def _describe_samples(samples: Any) -> str:
    return "made for this: noise and a few sentences" if samples == "generated" else f"of `{samples}`"


def _describe_pixels(field: str, entry: Mapping[str, Any]) -> str:
    shifted = f", and {entry['shifted_crops']} were cropped one pixel beside" if entry["shifted_crops"] else ""
    return (
        f"* {field}: compared on the same pixels. The model's own pictures are scaled and rounded in another way, and differ by"
        f" up to {entry['pixel_levels']:.0f} of 255 levels in {entry['pixels_apart']:.1%} of the pixels{shifted};"
        f" from the files on, embeddings differ by up to {entry['from_files']:.1e}.\n"
    )


def _results(run: Path | None) -> str:
    """Return a table of a run's results, with their intervals."""
    try:
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))["results"] if run else {}
    except (OSError, ValueError, KeyError):
        results = {}
    rows = [(name, entry) for name, entry in results.items() if not DETAILS.search(name) and "/geometry/" not in name]
    if not rows:
        return "None were measured with `mmcontrast evaluate`.\n"
    table = ["| | value | 95 % interval |", "|---|---|---|"]
    for name, entry in rows[:MOST_RESULTS]:
        low, high = entry.get("low"), entry.get("high")
        interval = "" if low is None or high is None else f"{low:.3f} – {high:.3f}"
        value = "–" if entry["value"] is None else f"{entry['value']:.3f}"
        table.append(f"| {name} | {value} | {interval} |")
    if len(rows) > MOST_RESULTS:
        table.append(f"| … {len(rows) - MOST_RESULTS} more | | |")
    return "\n".join([*table, ""])
