"""Read the bank of a bridge: texts of a file or of shards, which the model embeds now, or a field of an embedding table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.data import ShardDataset
from mmcontrast.data.keys import FieldKeys, chosen
from mmcontrast.data.tables import is_table
from mmcontrast.errors import UserError
from mmcontrast.evaluation.bridge import Bridge, mean_rows
from mmcontrast.evaluation.embed import MANIFEST, EmbeddingTable, embed_texts
from mmcontrast.modalities import DecodeError, TextModality
from mmcontrast.models import ContrastiveModel
from mmcontrast.text_files import lines_of, read_text

TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Bank:
    """The entries of a bank, embedded by one model.

    Attributes:
        rows: unit rows [B, D].
        field: the model's field that read them.
        scale: κ; None: the logit scale that the model has learnt for the compared field and this one.
        texts: of the entries, where they are texts, for other models to read.
    """

    rows: Tensor
    field: str
    scale: float | None = None
    texts: tuple[str, ...] | None = None

    def prefix(self, width: int) -> "Bank":
        return replace(self, rows=F.normalize(self.rows[:, :width], dim=1))

    def between(self, model: ContrastiveModel, queries: Sequence[str], candidates: Sequence[str]) -> Bridge | None:
        """Return the bridge between fields; None if one of them is the bank's own."""
        if self.field in (*queries, *candidates):
            return None
        scales = (self.scale or scale_between(model, fields, self.field) for fields in (queries, candidates))
        return Bridge(self.rows, self.rows, *scales)


def scale_between(model: ContrastiveModel, fields: Sequence[str], other: str) -> float:
    """Return the logit scale between fields and another one; of a model with a scale for each pair, the mean over theirs."""
    scales = model.log_logit_scale.detach().double().exp().cpu()
    if not model.pairs:
        return scales.item()
    pairs_with_other = torch.tensor([other in pair and bool({*pair} & {*fields} - {other}) for pair in model.pairs])
    return scales[pairs_with_other if pairs_with_other.any() else ~pairs_with_other].mean().item()


def text_field(model: ContrastiveModel, field: str | None, source: str | Path) -> str:
    """Return the field that reads a file of texts: the one that is named, or the model's first text field.

    Raises:
        UserError: if it is no text field, or there is none.
    """
    fields = [name for name in model.modalities if isinstance(model.modality(name), TextModality)]
    if field is None and not fields:
        raise UserError(f"bank {source}: the model has no text field that could read it: name an embedding table")
    if field is not None and field not in fields:
        raise UserError(f"bank {source}: field {field!r} reads no texts; those that do: {', '.join(fields) or 'none'}")
    return field or fields[0]


def names_shards(source: str) -> bool:
    """Return whether a bank's source is shards: tars, a table, or a pattern of them."""
    return any(sign in source for sign in "*{") or is_table(source) or Path(source.partition("?")[0]).suffix == ".tar"


def read_texts(source: str | Path) -> list[str]:
    """Return the distinct non-empty lines of a text file.

    Raises:
        UserError: as `read_text`; if there is none.
    """
    texts = list(dict.fromkeys(line.strip() for line in lines_of(read_text(source)) if line.strip()))
    if not texts:
        raise UserError(f"bank {source}: no line has a text")
    return texts


def texts_of_shards(model: ContrastiveModel, field: str, shards: str, keys: Mapping[str, FieldKeys]) -> list[str]:
    """Return the distinct texts that a field reads in shards, in their order, each as one line; of a field whose captions are
    lines, all lines.

    Raises:
        UserError: for shards that cannot be opened, a text that cannot be read, or no text at all.
    """
    modality = model.modality(field)
    assert isinstance(modality, TextModality)
    dataset = ShardDataset(shards, {field: modality}, keys)
    texts: dict[str, None] = {}
    for position in range(len(dataset)):
        try:
            members = dataset.members(position, dataset.keys[field])
            if key := chosen(dataset.choices[field], members, training=False):
                text = modality.decode(members[key])
                shown = modality.lines(text) if modality.captions == "lines" else [modality.shown(text, training=False)]
                texts |= {" ".join(line.split()): None for line in shown if line}
        except DecodeError as error:
            shard, row = dataset.locate(position)
            raise UserError(f"bank: shard {shard.name}, {shard.describe(row)}: {error}: mend it, or leave it out") from error
    if not texts:
        raise UserError(f"bank {shards}: no sample has a text for field {field!r} (.{', .'.join(dataset.keys[field])})")
    return list(texts)


def embed_bank(model: ContrastiveModel, field: str, texts: Sequence[str], device: torch.device | str) -> Tensor:
    """Embed texts in batches, and return unit rows [B, D]."""
    parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
    return torch.cat([embed_texts(model, field, part, device) for part in parts])


def check_made_by(source: str | Path, maker: Mapping[str, Any]) -> None:
    """Check that a bank's embedding table was made by the model that uses it, if its manifest names the model.

    Raises:
        UserError: if it was made by another one, whose rows would mean nothing here.
    """
    manifest = Path(source) / MANIFEST
    recorded = json.loads(manifest.read_text()) if manifest.is_file() else {}
    for key in ("model", "checkpoint", "pretrained", "width", "weights"):
        if "model" in recorded and recorded.get(key, maker.get(key)) != maker.get(key):
            raise UserError(
                f"bank {source}: its {key} is {recorded.get(key)!r}, here it is {maker.get(key)!r}: embed both with one model"
            )


def read_bank(
    model: ContrastiveModel,
    source: str | Path,
    field: str | None,
    scale: float | None,
    device: torch.device | str,
    keys: Mapping[str, FieldKeys],
) -> Bank:
    """Return the bank of a text file, one entry a line; of shards, one entry a distinct text; or of an embedding table of this
    model, see `check_made_by`, one entry a group, the mean of its rows.

    Args:
        keys: of shards: the members that each field is read from, as `ShardDataset` has them.

    Raises:
        UserError: for a source that is neither, or does not fit the model.
    """
    if not Path(source).is_dir():
        field = text_field(model, field, source)
        texts = texts_of_shards(model, field, str(source), keys) if names_shards(str(source)) else read_texts(source)
        return Bank(embed_bank(model, field, texts, device), field, scale, tuple(texts))
    table = EmbeddingTable.read(Path(source))
    common = [name for name in table.fields if name in model.modalities]
    text_fields = [name for name in common if isinstance(model.modality(name), TextModality)]
    field = field or next(iter(text_fields), None)
    if field not in common:
        raise UserError(f"bank {source}: field {field!r} is not of the table and the model; of both are {', '.join(common)}")
    present = table.present[field]
    if table.curvature is not None or not present.any():
        problem = "its scores are hyperbolic" if table.curvature is not None else f"no row has the field {field!r}"
        raise UserError(f"bank {source}: {problem}")
    rows = table.fields[field][present]
    if rows.shape[1] != model.embed_dim:
        raise UserError(f"bank {source}: rows of {rows.shape[1]} numbers, the model's have {model.embed_dim}")
    return Bank(mean_rows(rows, table.group_ids[present]), field, scale)
