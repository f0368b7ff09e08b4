"""Use a model from Python: `load` opens it, `Embedder` embeds lists of pictures, texts and sounds."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcontrast.data import ShardDataset, ShardOptions, Shards, open_dataset
from mmcontrast.data.decoding import UNREADABLE
from mmcontrast.data.keys import FieldKeys, names_of
from mmcontrast.errors import UserError
from mmcontrast.evaluation.banks import scale_between
from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.evaluation.finite import check_finite
from mmcontrast.modalities import AudioModality, ImageModality, Modality, TextModality, VectorModality
from mmcontrast.models import ContrastiveModel, library_of, open_model, weights_digest
from mmcontrast.run_checks import contrasted_fields
from mmcontrast.run_folder import about_checkpoint, run_of
from mmcontrast.runs import open_run
from mmcontrast.score import Lorentz
from mmcontrast.training.log import make_progress

KINDS: dict[str, type[Modality]] = {
    "images": ImageModality,
    "texts": TextModality,
    "audio": AudioModality,
    "vectors": VectorModality,
}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def kind_of(modality: Modality) -> str:
    """Return "images", "texts" or "audio"; "vectors" for any other modality."""
    return next((kind for kind, modality_class in KINDS.items() if isinstance(modality, modality_class)), "vectors")


class Embedder:
    """A model in evaluation mode on its device, with the preprocessing of its fields.

    Attributes:
        model: fields → towers → embeddings, with the logit scale and bias.
        name: by which it was opened.
        device: where it computes, in `precision`.
        keys: the members of a sample that each field is read from; default: its modality's.
        fields: those that it embeds; the first of a kind is that kind's default.
    """

    def __init__(
        self,
        model: ContrastiveModel,
        name: str,
        device: str | torch.device | None = None,
        fields: Sequence[str] | None = None,
        keys: Mapping[str, FieldKeys] | None = None,
        precision: str = "fp32",
    ) -> None:
        if precision not in AUTOCAST:
            raise UserError(f"precision {precision!r}: it must be one of {', '.join(AUTOCAST)}")
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = model.eval().to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device}: {' '.join(str(error).split())[:200]}") from error
        self.name, self.fields, self.keys = name, list(fields or model.modalities), dict(keys or {})
        self.precision = precision

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} ({kind_of(self.model.modality(name))})" for name in self.fields)
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        details = f"{self.model.embed_dim} numbers, {parameters:.1f} M parameters, {self.precision} on {self.device}"
        return f"Embedder({self.name!r}: {fields}; {details})"

    @torch.no_grad()
    def embed(
        self,
        *,
        images: Iterable[Any] | None = None,
        texts: Iterable[str] | None = None,
        audio: Iterable[Any] | None = None,
        vectors: Iterable[Any] | None = None,
        field: str | None = None,
        batch_size: int = 64,
        progress: bool | None = None,
    ) -> Tensor:
        """Embed one list of values, or a generator, which is read first: unit rows float32 [N, D] on the CPU, or tangent
        vectors of a hyperbolic model.

        Args:
            images: paths, encoded bytes, PIL images, or pixels: arrays or tensors uint8 [height, width, 3].
            texts: strings.
            audio: paths, encoded bytes, or pairs (samples in [-1, 1], rate in Hz).
            vectors: paths of .npy files, their bytes, or arrays.
            field: which field's tower, where several take values of this kind; default: the first.
            progress: show a bar; default: in a terminal, for more than one batch.

        Raises:
            UserError: if the model has no field for such values; for a value that cannot be read or whose embedding
                is not finite, by its place in the list.
        """
        inputs = {"images": images, "texts": texts, "audio": audio, "vectors": vectors}
        kinds = [kind for kind, values in inputs.items() if values is not None]
        if len(kinds) != 1:
            raise UserError(f"embed takes one of {', '.join(inputs)} at a time")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"embed: batch_size {batch_size!r}: a whole number of at least 1")
        kind = kinds[0]
        values = _as_list(kind, inputs[kind])
        field = self.field_of(kind, field)
        modality, rows = self.model.modality(field), []
        show_bar = len(values) > batch_size if progress is None else progress
        with make_progress(show_bar) as bar:
            task = bar.add_task(f"embedding {kind}", total=len(values), note="")
            for start in range(0, len(values), batch_size):
                batch = values[start : start + batch_size]
                prepared = [self._prepare(modality, f"{kind}[{start + offset}]", value) for offset, value in enumerate(batch)]
                with self.autocast():
                    rows.append(self.model.encode(field, modality.collate(prepared).to(self.device)).float().cpu())
                check_finite(rows[-1], lambda row, start=start: f"{self.name}, field {field!r}, {kind}[{start + row}]")  # type: ignore[misc]
                bar.advance(task, len(batch))
        return torch.cat(rows) if rows else torch.empty(0, self.model.embed_dim)

    def field_of(self, kind: str, field: str | None = None) -> str:
        """Return the field that takes values of a kind: "images", "texts", "audio" or "vectors".

        Raises:
            UserError: if there is none, or `field` is of another kind.
        """
        fitting = [name for name in self.fields if isinstance(self.model.modality(name), KINDS[kind])]
        if field is not None and field not in fitting:
            raise UserError(f"{self.name} has no field {field!r} for {kind}; it has {', '.join(fitting) or 'none'}")
        if not fitting:
            raise UserError(f"{self.name} has no field for {kind}; its fields are {', '.join(self.fields)}")
        return field or fitting[0]

    @staticmethod
    def _prepare(modality: Modality, place: str, value: Any) -> Tensor:
        try:
            if isinstance(value, Path) or (isinstance(value, str) and not isinstance(modality, TextModality)):
                value = Path(value).read_bytes()
            if isinstance(modality, TextModality) and not isinstance(value, str | bytes):
                raise UserError(f"a {type(value).__name__}, not a text")
            raw = modality.decode(value) if isinstance(value, bytes) else modality.encode(value)
            prepared: Tensor | None
            if isinstance(modality, TextModality) and modality.captions != "whole":  # a query is no list of captions
                prepared = modality.tokens(" ".join(str(raw).split()))
            else:
                prepared = modality.transform(raw, training=False)
        except (OSError, *UNREADABLE) as error:
            raise UserError(f"{place}: {error or type(error).__name__}") from error
        if prepared is None:
            raise UserError(f"{place}: holds no value of this field")
        return prepared

    @torch.no_grad()
    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """Compute cosines [N, M] of unit rows [N, D] and [M, D]; of a hyperbolic model −distance of tangent vectors."""
        if self.model.hyperbolic is None:
            return first @ second.T
        return Lorentz(self.model.hyperbolic.curvature.item()).scores(first.double(), second.double()).to(first.dtype)

    @torch.no_grad()
    def logits(self, first: Tensor, second: Tensor, pair: tuple[str, str] | None = None) -> Tensor:
        """Compute scale · similarity + bias [N, M] of rows [N, D] and [M, D], with the model's own scale and bias.

        Args:
            pair: the fields of the rows, for a model that has learnt a scale for each pair of fields.

        Raises:
            UserError: if the model has a scale for each pair, and `pair` is none of them.
        """
        scales, pairs = self.model.log_logit_scale.exp().cpu(), [set(pair_names) for pair_names in self.model.pairs]
        if pairs and set(pair or ()) not in pairs:
            raise UserError(f"{self.name} has a scale for each pair of fields: logits(…, pair=…) with two of {self.fields}")
        if not torch.isfinite(scales).all():
            raise UserError(f"{self.name}: its logit scale is {scales.tolist()}: use a sound checkpoint")
        scores = scales[pairs.index(set(pair or ())) if pairs else 0] * self.similarity(first, second)
        return scores if self.model.logit_bias is None else scores + self.model.logit_bias.cpu()

    def bridge(self, texts: Sequence[str], to: "Embedder | None" = None, scales: tuple[float, float] | None = None) -> Bridge:
        """Return the bridge of texts from this model's embeddings to those of another one, or its own. It compares, say, its
        pictures with the other's sounds: `bridge.scores(pictures, sounds)`.

        Args:
            texts: the entries of the bank, which both models read.
            to: the model of the candidates; default: this one.
            scales: κ of both; default: the logit scales that the models have learnt.

        Raises:
            UserError: as `embed`; for a hyperbolic model.
        """
        bank = self.embed(texts=texts)
        other_bank = bank if to is None else to.embed(texts=texts)
        default_scales = self.scale_of_texts(), (to or self).scale_of_texts()
        return Bridge(bank, other_bank, *(scales or default_scales))

    def scale_of_texts(self) -> float:
        """Return the logit scale that the model has learnt between its texts and its other fields.

        Raises:
            UserError: for a hyperbolic model.
        """
        if self.model.hyperbolic is not None:
            raise UserError(f"{self.name}: its scores are hyperbolic, and a bank is compared by cosines")
        text_field = self.field_of("texts")
        return scale_between(self.model, [field for field in self.fields if field != text_field], text_field)

    def autocast(self) -> torch.autocast:
        """Return the context in which the towers compute in the embedder's precision."""
        dtype = AUTOCAST[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def dataset(self, shards: Shards | dict[str, Any]) -> ShardDataset:
        """Open shards with this model's preprocessing, with those of its fields that they have.

        Args:
            shards: patterns; or a mapping of `shards`, `keys` and `files`, if columns or files have other names.

        Raises:
            UserError: if they have none, or lack a field that has keys of its own.
        """
        modalities = {field: self.model.modality(field) for field in self.fields}
        dataset = open_dataset(shards, modalities, self.keys, partial=True)
        if not dataset.modalities:
            keys = {field: names_of(self.keys.get(field) or self.model.modality(field).extensions) for field in self.fields}
            expected = (f"{field} (.{', .'.join(names)})" for field, names in keys.items())
            available = ", ".join(sorted({f".{extension}" for shard in dataset.shards for extension in shard.extensions}))
            raise UserError(
                f"{ShardOptions.of(shards).shards}: no sample has a field of {self.name}: {', '.join(expected)};"
                f" they have {available}"
            )
        return dataset


def _as_list(kind: str, values: Any) -> Any:
    """Return values as a list or array.

    Raises:
        UserError: for a single value, and for a collection without an order.
    """
    if isinstance(values, str | bytes | Path) or not isinstance(values, Iterable):
        raise UserError(f"embed: {kind} is a list, not one {type(values).__name__}")
    if isinstance(values, Mapping | set | frozenset):
        raise UserError(f"embed: {kind} is a list, not a {type(values).__name__}: its rows would have no order of yours")
    if kind == "images" and isinstance(values, np.ndarray | Tensor) and values.ndim == 3 and values.shape[-1] in (1, 3, 4):
        raise UserError(f"embed: images is a list, and an array {list(values.shape)} is one picture: give [picture]")
    return values if isinstance(values, list | tuple | np.ndarray | Tensor) else list(values)


def load(
    name: str | Path,
    *,
    checkpoint: str | None = "last",
    pretrained: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    pooling: str | None = None,
    trust_code: bool = False,
    width: int | None = None,
) -> Embedder:
    """Open a model: a run's, or another library's, with its weights, tokenizer, preprocessing, logit scale and bias.

    Args:
        name: a run's folder, or that of one of its checkpoints; an export's folder; otherwise folders and names of
            open_clip, transformers and timm, as `mmcontrast.models.open_model` finds them.
        checkpoint: of a run: "last", "best" or a step's number.
        pretrained: of an architecture of open_clip or timm: a tag, or a checkpoint's file.
        device: default: a GPU if there is one.
        precision: of the towers: "fp32", "bf16" or "fp16".
        pooling: of a plain encoder of transformers: "mean", "first" or "last".
        trust_code: import the code that a run's config names by import path. No other code of a folder is ever run.
        width: truncate embeddings to their first numbers, and normalise again: for models trained with `train.matryoshka`.

    Raises:
        UserError: if there is no such model; for code that is not trusted; for a width that embeddings do not have.
    """
    folder, checkpoint = run_of(name, checkpoint)
    if folder is None:
        model = open_model(str(name), None if pretrained is None else str(pretrained), pooling, trust_code=trust_code)
        composed = model.origin.config.get("fields", {}) if model.origin else {}
        keys = {field: options["keys"] for field, options in composed.items() if options.get("keys")}
        if width is not None:
            model.narrow(width)
        return Embedder(model, str(name), device, keys=keys, precision=precision)
    if pretrained or pooling:
        raise UserError(f"{name} is a run: it takes neither pretrained nor pooling")
    run = open_run(folder, checkpoint, "cpu", trust_code)
    if width is not None:
        run.model.narrow(width)
    fields = contrasted_fields(run.config)
    keys = {field: options.keys for field, options in fields.items() if options.keys}
    return Embedder(run.model, str(name), device, list(fields), keys, precision)


def identity(name: str | Path, checkpoint: str | None = "last", pretrained: str | None = None) -> dict[str, Any]:
    """Return a table's description of the model that made it, as arguments of `load`: model, checkpoint, pretrained; of a run,
    a folder or a file a digest of its weights too. Folders and files are absolute paths, "last" and "best" the number of their
    step.

    Raises:
        UserError: if a run has no such checkpoint.
    """
    folder, step = run_of(name, checkpoint)
    if folder is not None:
        return {"model": str(folder), "pretrained": None} | about_checkpoint(folder, step)
    prefix, colon, rest = str(name).rpartition(":")
    is_local_folder = prefix != "hf-hub" and Path(rest).is_dir() and library_of(Path(rest))
    file = Path(pretrained or "").absolute()
    about = {
        "model": f"{prefix}{colon}{Path(rest).absolute()}" if is_local_folder else str(name),
        "checkpoint": None,
        "pretrained": str(file) if file.is_file() else pretrained,
    }
    if local := file if file.is_file() else Path(rest) if is_local_folder else None:
        about["weights"] = weights_digest(local)
    return about
