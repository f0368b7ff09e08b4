"""Export a model: write a folder, reopen it in its library, compare, add a card, and move it to its target."""

import importlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mmcontrast.components import suggestion
from mmcontrast.data import Shards
from mmcontrast.embedder import Embedder, load, run_of
from mmcontrast.errors import UserError
from mmcontrast.export.card import write_card
from mmcontrast.export.parity import HALF_TOLERANCE, TOLERANCE, measure
from mmcontrast.export.parts import chosen_fields, origin_of, plain_model
from mmcontrast.export.samples import Samples, given_samples, made_samples
from mmcontrast.libraries import library_errors
from mmcontrast.modalities.library import LibraryImages
from mmcontrast.models import ContrastiveModel
from mmcontrast.permissions import open_to_others
from mmcontrast.strict_json import dumps

PARITY = "parity.json"
FORMATS = {
    "open_clip": "open_clip",
    "huggingface": "huggingface",
    "sentence-transformers": "sentence_transformers",
    "onnx": "onnx",
    "safetensors": "safetensors",
}


def export_model(
    name: str | Path,
    out: Path,
    kind: str,
    *,
    fields: Sequence[str] | None = None,
    data: Shards | None = None,
    samples: int = 32,
    checkpoint: str = "last",
    pretrained: str | None = None,
    pooling: str | None = None,
    fp16: bool = False,
    overwrite: bool = False,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Export a model and return the contents of parity.json. A failed export leaves nothing behind.

    Args:
        name, checkpoint, pretrained, pooling, trust_code: as `load`.
        out: a new folder.
        kind: one of `FORMATS`.
        fields: those to be exported; default: all.
        data, samples: shards to compare on, and the number of their samples; default: a few generated ones.
        fp16: of onnx: weights of half precision.
        overwrite: replace an earlier export.

    Raises:
        UserError: for a model that the format cannot hold; for embeddings that differ from the model's.
    """
    writer = format_module(kind)
    if fp16 and kind != "onnx":
        raise UserError("--fp16 is for onnx: the other formats hold the weights as they are")
    check_place(out, overwrite)
    embedder = load(name, checkpoint=checkpoint, pretrained=pretrained, pooling=pooling, device="cpu", trust_code=trust_code)
    embedder.model = plain_model(embedder.model)
    for modality in embedder.model.modalities.values():
        if isinstance(modality, LibraryImages):
            modality.fast_in_evaluation = False  # the export is read with the library's own preprocessing
    embedder.name = Path(name).absolute().name if Path(name).exists() else str(name)  # the card may go anywhere
    chosen = chosen_fields(embedder.model, embedder.fields, fields)
    test_samples = given_samples(embedder, data, samples, chosen) if data else made_samples(embedder.model, chosen)
    options = {"fp16": True} if fp16 else {}
    run, step = run_of(name, checkpoint)
    return write_export(embedder, out, kind, writer, chosen, test_samples, options, run=run if step == "last" else None)


def write_export(
    embedder: Embedder,
    out: Path,
    kind: str,
    writer: ModuleType,
    chosen: list[str],
    test_samples: Samples,
    options: dict[str, Any] | None = None,
    *,
    run: Path | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write an open model in one of the formats, and return the contents of parity.json.

    Args:
        writer: the format's module.
        chosen: fields.
        test_samples: samples to compare on.
        options: of the format.
        run: the run whose results are those of this model.
        notes: lines of the card.

    Raises:
        UserError: as `export_model`.
    """
    options = options or {}
    refuse_hyperbolic(embedder.model, chosen, kind)
    partial = out.absolute().parent / f".{out.name}.partial"
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        tolerance = HALF_TOLERANCE if options.get("fp16") else TOLERANCE
        parity = {"format": kind, "model": embedder.name}
        with library_errors(f"{embedder.name} as {kind}"):
            writer_notes = writer.write(embedder.model, chosen, partial, **options)
            parity |= measure(embedder, chosen, test_samples, writer.reopen(partial, chosen, embedder.model), tolerance)
        (partial / PARITY).write_text(dumps(parity, indent=1), encoding="utf-8")
        usage = writer.usage(embedder.model, chosen) if hasattr(writer, "usage") else writer.USAGE
        write_card(partial, out.name, embedder, chosen, kind, usage, parity, [*notes, *writer_notes], run)
        open_to_others(*(file for file in partial.rglob("*") if file.is_file()))
        replace_folder(partial, out)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return parity


def refuse_hyperbolic(model: ContrastiveModel, chosen: Sequence[str], kind: str) -> None:
    """
    Raises:
        UserError: for a model of hyperbolic scores, if the format knows cosines alone.
    """
    if model.hyperbolic is None:
        return
    if kind != "safetensors":
        raise UserError(
            f"--format {kind} holds models of cosines, this one's scores are hyperbolic: export safetensors, our own"
        )
    origin = origin_of(model, chosen)
    if origin and origin.library != "mmcontrast":
        raise UserError(
            f"a model of {origin.library} with hyperbolic scores has no form but its run: mmcontrast.load opens that"
        )


def format_module(kind: str) -> ModuleType:
    """Import the module of a format.

    Raises:
        UserError: for an unknown format; if a package that it needs is not installed.
    """
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: no such format; {suggestion(kind, FORMATS)}")
    try:
        return importlib.import_module(f"mmcontrast.export.{FORMATS[kind]}")
    except ImportError as error:
        raise UserError(f"--format {kind} needs {error.name}: pip install 'mmcontrast[export]'") from error


def check_place(out: Path, overwrite: bool) -> None:
    """Check that an export can be written to a folder.

    Raises:
        UserError: if it exists, unless it is an export and to be replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{out} exists: name a new folder, or replace an earlier export with --overwrite")
    if not (out / PARITY).is_file():
        raise UserError(f"{out} is no export (it has no {PARITY}), so it is not replaced: name a new folder")


def replace_folder(new: Path, target: Path) -> None:
    """Move a folder to its target, and replace an earlier one."""
    previous = new.with_suffix(".old")
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        os.rename(target, previous)
    os.rename(new, target)
    shutil.rmtree(previous, ignore_errors=True)
