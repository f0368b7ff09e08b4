"""A model as a program uses it: lists of pictures, texts and sounds in, embeddings out."""

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
from mmcontrast.models import ContrastiveModel, library_of, open_model
from mmcontrast.runs import contrasted_fields, open_run, run_of, step_of
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
    """Return "images", "texts" or "audio"; "vectors" of anything else."""
    return next((kind for kind, known in KINDS.items() if isinstance(modality, known)), "vectors")


class Embedder:
    """A model in evaluation mode on its device, with what it takes to feed it.

    Attributes:
        model: fields → towers → embeddings, with the logit scale and bias.
        name: what it was opened by.
        device: where it computes, in which `precision`.
        fields: those that it embeds, the first of a kind being the default of that kind.
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
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.model = model.eval().to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device}: {' '.join(str(error).split())[:200]}") from error
        self.name, self.fields, self._keys = name, list(fields or model.modalities), dict(keys or {})
        self.precision = precision

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} ({kind_of(self.model.modality(name))})" for name in self.fields)
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        about = f"{self.model.embed_dim} numbers, {parameters:.1f} M parameters, {self.precision} on {self.device}"
        return f"Embedder({self.name!r}: {fields}; {about})"

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
        """Unit rows float32 [N, D] on the CPU, of a hyperbolic model tangent vectors, of one list of values, or of a generator,
        which is read first.

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
        given = {"images": images, "texts": texts, "audio": audio, "vectors": vectors}
        (kind, values), *more = [(kind, values) for kind, values in given.items() if values is not None] or [("", [])]
        if not kind or more:
            raise UserError(f"embed takes one of {', '.join(given)} at a time")
        values = _as_list(kind, values)
        field = self.field_of(kind, field)
        modality, rows = self.model.modality(field), []
        shown = len(values) > batch_size if progress is None else progress
        with make_progress(shown) as bar:
            task = bar.add_task(f"embedding {kind}", total=len(values), note="")
            for start in range(0, len(values), batch_size):
                batch = values[start : start + batch_size]
                prepared = [self._prepared(modality, f"{kind}[{start + k}]", value) for k, value in enumerate(batch)]
                with self.autocast():
                    rows.append(self.model.encode(field, modality.collate(prepared).to(self.device)).float().cpu())
                check_finite(rows[-1], lambda row, start=start: f"{self.name}, field {field!r}, {kind}[{start + row}]")  # type: ignore[misc]
                bar.advance(task, len(batch))
        return torch.cat(rows) if rows else torch.empty(0, self.model.embed_dim)

    def field_of(self, kind: str, field: str | None = None) -> str:
        """The field that takes values of a kind: "images", "texts", "audio" or "vectors".

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
    def _prepared(modality: Modality, place: str, value: Any) -> Tensor:
        try:
            if isinstance(value, Path) or (isinstance(value, str) and not isinstance(modality, TextModality)):
                value = Path(value).read_bytes()
            raw = modality.decode(value) if isinstance(value, bytes) else modality.encode(value)
            prepared = modality.transform(raw, training=False)
        except (OSError, *UNREADABLE) as error:
            raise UserError(f"{place}: {error or type(error).__name__}") from error
        if prepared is None:
            raise UserError(f"{place}: holds no value of this field")
        return prepared

    @torch.no_grad()
    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """Cosines [N, M] of unit rows [N, D] and [M, D]; of a hyperbolic model −distance of tangent vectors."""
        if self.model.hyperbolic is None:
            return first @ second.T
        return Lorentz(self.model.hyperbolic.curvature.item()).scores(first.double(), second.double()).to(first.dtype)

    @torch.no_grad()
    def logits(self, first: Tensor, second: Tensor, pair: tuple[str, str] | None = None) -> Tensor:
        """scale · similarity + bias [N, M] of rows [N, D] and [M, D], with the model's own scale and bias.

        Args:
            pair: the fields of the rows, for a model that has learnt a scale for each pair of fields.

        Raises:
            UserError: if the model has a scale for each pair, and `pair` is none of them.
        """
        scales, pairs = self.model.log_logit_scale.exp().cpu(), [set(one) for one in self.model.pairs]
        if pairs and set(pair or ()) not in pairs:
            raise UserError(f"{self.name} has a scale for each pair of fields: logits(…, pair=…) with two of {self.fields}")
        if not torch.isfinite(scales).all():
            raise UserError(f"{self.name}: its logit scale is {scales.tolist()}: use a sound checkpoint")
        scores = scales[pairs.index(set(pair or ())) if pairs else 0] * self.similarity(first, second)
        return scores if self.model.logit_bias is None else scores + self.model.logit_bias.cpu()

    def bridge(self, texts: Sequence[str], to: "Embedder | None" = None, scales: tuple[float, float] | None = None) -> Bridge:
        """Return the bridge of texts from this model's embeddings to those of another one, or of its own: what compares, say,
        its pictures with the other's sounds, `bridge.scores(pictures, sounds)`.

        Args:
            texts: which both models read; the entries of the bank.
            to: the model of the candidates; default: this one.
            scales: κ of both; default: the logit scales that the models have learnt.

        Raises:
            UserError: as `embed`; for a hyperbolic model.
        """
        bank = self.embed(texts=texts)
        other = bank if to is None else to.embed(texts=texts)
        learnt = self.scale_of_texts(), (to or self).scale_of_texts()
        return Bridge(bank, other, *(scales or learnt))

    def scale_of_texts(self) -> float:
        """Return the logit scale that the model has learnt between its texts and what else it embeds.

        Raises:
            UserError: for a hyperbolic model.
        """
        if self.model.hyperbolic is not None:
            raise UserError(f"{self.name}: its scores are hyperbolic, and a bank is compared by cosines")
        reads = self.field_of("texts")
        return scale_between(self.model, [field for field in self.fields if field != reads], reads)

    def autocast(self) -> torch.autocast:
        """The precision that the towers compute in."""
        dtype = AUTOCAST[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def dataset(self, shards: Shards | dict[str, Any]) -> ShardDataset:
        """Shards as this model reads them: of its fields, those that they have.

        Args:
            shards: patterns; or a mapping of `shards`, `keys` and `files`, where columns or files have names of their own.

        Raises:
            UserError: if they have none, or lack a field that has keys of its own.
        """
        modalities = {field: self.model.modality(field) for field in self.fields}
        found = open_dataset(shards, modalities, self._keys, partial=True)
        if not found.modalities:
            keys = {field: names_of(self._keys.get(field) or self.model.modality(field).extensions) for field in self.fields}
            wanted = (f"{field} (.{', .'.join(names)})" for field, names in keys.items())
            have = ", ".join(sorted({f".{extension}" for shard in found.shards for extension in shard.extensions}))
            raise UserError(
                f"{ShardOptions.of(shards).shards}: no sample has a field of {self.name}: {', '.join(wanted)}; they have {have}"
            )
        return found


def _as_list(kind: str, values: Any) -> Any:
    """
    Raises:
        UserError: for one value, and for what gives none in an order of its own.
    """
    if isinstance(values, str | bytes | Path) or not isinstance(values, Iterable):
        raise UserError(f"embed: {kind} is a list, not one {type(values).__name__}")
    if isinstance(values, Mapping | set | frozenset):
        raise UserError(f"embed: {kind} is a list, not a {type(values).__name__}: its rows would have no order of yours")
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
    """Opens a model: a run's, or another library's, with its weights, tokenizer, preprocessing, logit scale and bias.

    Args:
        name: a run's folder, or that of one of its checkpoints; an export's folder; otherwise folders and names of
            open_clip, transformers and timm, as `mmcontrast.models.open_model` finds them.
        checkpoint: of a run: "last", "best" or a step's number.
        pretrained: of an architecture of open_clip or timm: a tag, or a checkpoint's file.
        device: default: a GPU if there is one.
        precision: of the towers: "fp32", "bf16" or "fp16".
        pooling: of a plain encoder of transformers: "mean", "first" or "last".
        trust_code: import what a run's config names by import path. Nothing else that a folder holds is ever run.
        width: embeddings are their first numbers alone, made unit rows again: of models trained with `train.matryoshka`.

    Raises:
        UserError: if there is no such model; for code that is not trusted; for a width that embeddings have not.
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
    keys = {field: of.keys for field, of in fields.items() if of.keys}
    return Embedder(run.model, str(name), device, list(fields), keys, precision)


def identity(name: str | Path, checkpoint: str | None = "last", pretrained: str | None = None) -> dict[str, Any]:
    """What a table says of the model that made it: model, checkpoint, pretrained; `load` takes them. Folders and files are
    absolute, "last" and "best" the number of their step.

    Raises:
        UserError: if a run has no such checkpoint.
    """
    folder, which = run_of(name, checkpoint)
    if folder is not None:
        return {"model": str(folder), "checkpoint": step_of(folder, which), "pretrained": None}
    prefix, colon, rest = str(name).rpartition(":")
    here = prefix != "hf-hub" and Path(rest).is_dir() and library_of(Path(rest))
    weights = Path(pretrained or "")
    return {
        "model": f"{prefix}{colon}{Path(rest).absolute()}" if here else str(name),
        "checkpoint": None,
        "pretrained": str(weights.absolute()) if weights.is_file() else pretrained,
    }
