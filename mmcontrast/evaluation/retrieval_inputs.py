"""What retrieves and what is retrieved: rows of a table, captions, several fields together; and which belong to which."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.data import ShardDataset
from mmcontrast.errors import UserError
from mmcontrast.evaluation.embed import EmbeddingTable, embed_texts
from mmcontrast.evaluation.labels import label_text
from mmcontrast.evaluation.rankings import Pairs
from mmcontrast.evaluation.retrieval import first_of_each_group
from mmcontrast.evaluation.whitening import whiten
from mmcontrast.modalities import DecodeError, TextModality
from mmcontrast.models import ContrastiveModel
from mmcontrast.text_files import read_text


@dataclass(frozen=True)
class Side:
    """R embeddings of samples of a table.

    Attributes:
        rows: [R, D], as in the table.
        samples: int64 [R], their places in the table.
        groups: int64 [R], what they are about.
    """

    rows: Tensor
    samples: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def prefix(self, width: int) -> "Side":
        return replace(self, rows=F.normalize(self.rows[:, :width], dim=1))

    def take(self, places: Tensor) -> "Side":
        return Side(self.rows[places], self.samples[places], self.groups[places])

    def once_a_group(self) -> "Side":
        first = first_of_each_group(self.groups)
        return self if len(first) == len(self) else self.take(first)


def side_of(table: EmbeddingTable, fields: str | Sequence[str], captions: Mapping[str, Side]) -> Side:
    """Of the samples that have all the fields: its embeddings, or of several the direction of their sum (of tangent vectors
    their mean). A field of captions alone: all of them."""
    fields = [fields] if isinstance(fields, str) else list(fields)
    if len(fields) == 1 and fields[0] in captions:
        return captions[fields[0]]
    samples = torch.stack([table.present[field] for field in fields]).all(0).nonzero().squeeze(1)
    rows = [table.fields[field][samples] for field in fields]
    if len(rows) == 1:
        together = rows[0]
    elif table.curvature is None:
        together = F.normalize(torch.stack(rows).sum(0), dim=1)
    else:
        together = torch.stack(rows).mean(0)
    return Side(together, samples, table.group_ids[samples])


def whitened(table: EmbeddingTable, captions: Mapping[str, Side]) -> tuple[EmbeddingTable, dict[str, Side]]:
    """Embeddings less their field's mean, then all by the one matrix that whitens them together: fields keep their relation."""
    means = {field: rows[table.present[field]].mean(0) for field, rows in table.fields.items()}
    centred = [(rows - means[field])[table.present[field]] for field, rows in table.fields.items()]
    both = whiten(torch.cat(centred), kind="zca")

    def apply(field: str, rows: Tensor) -> Tensor:
        return replace(both, mean=both.mean + means[field])(rows)

    fields = {field: apply(field, rows) * table.present[field][:, None] for field, rows in table.fields.items()}
    return replace(table, fields=fields), {f: replace(side, rows=apply(f, side.rows)) for f, side in captions.items()}


def labelled(side: Side, labels: Sequence[Any]) -> Side:
    """Return the rows whose samples have a label, grouped by it. `labels` are the table's, None where there is none."""
    texts = [label_text(label) for label in labels]
    numbers = {text: number for number, text in enumerate(sorted({text for text in texts if text is not None}))}
    of_rows = [texts[sample] for sample in side.samples.tolist()]
    places = torch.tensor([place for place, text in enumerate(of_rows) if text is not None], dtype=torch.int64)
    groups = torch.tensor([numbers[text] for text in of_rows if text is not None], dtype=torch.int64)
    return Side(side.rows[places], side.samples[places], groups)


def graded(file: str, queries: Side, candidates: Side, table: EmbeddingTable) -> Pairs:
    """The pairs of a file of relevance (trec_eval's qrels), by the samples' keys.

    Raises:
        UserError: for a line that is none, or a key of no sample.
    """
    known = {entry["key"] for entry in table.metadata}
    gains: dict[tuple[str, str], float] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        try:
            query, _, candidate, gain = line.split()
            gains[query, candidate] = float(gain)
            if not math.isfinite(gains[query, candidate]):
                raise ValueError("a gain is finite")
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {line[:60]!r} is not 'query-key 0 candidate-key gain'") from error
        for key in (query, candidate):
            if key not in known:
                raise UserError(f"{file}, line {number}: no sample has the key {key!r}")
    places: list[dict[str, list[int]]] = [{}, {}]
    for where, side in zip(places, (queries, candidates), strict=True):
        for place, sample in enumerate(side.samples.tolist()):
            where.setdefault(table.metadata[sample]["key"], []).append(place)
    found = [
        (q, c, gain)
        for (query, candidate), gain in gains.items()
        if gain > 0
        for q in places[0].get(query, [])
        for c in places[1].get(candidate, [])
    ]
    columns = torch.tensor(found, dtype=torch.float64).reshape(-1, 3)
    return Pairs(columns[:, 0].long(), columns[:, 1].long(), columns[:, 2])


def embed_captions(
    model: ContrastiveModel,
    field: str,
    dataset: ShardDataset,
    table: EmbeddingTable,
    device: torch.device | str,
    batch_size: int,
    group: dist.ProcessGroup | None = None,
) -> Side:
    """Every line of a text field's members. Ranks of a group share the work, and all get the result.

    Raises:
        UserError: for a text that cannot be read.
    """
    modality = model.modality(field)
    assert isinstance(modality, TextModality)
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    read: list[Any] = [_captions(modality, field, dataset, _share(len(dataset), rank, world))]
    if group:
        mine, read = read[0], [None] * world
        dist.all_gather_object(read, mine, group=group)
    if problem := next((one for one in read if isinstance(one, str)), None):
        raise UserError(problem)
    lines = [line for texts, _ in read for line in texts]
    places = torch.tensor([sample for _, samples in read for sample in samples], dtype=torch.int64)
    own = _share(len(lines), rank, world)
    share = lines[own.start : own.start + math.ceil(len(lines) / world)]  # as many on each rank: it may overlap the next
    rows = [embed_texts(model, field, share[k : k + batch_size], device) for k in range(0, len(share), batch_size)]
    whole = torch.cat(rows)[: len(own)] if rows else torch.empty(0, model.embed_dim)
    if group:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, whole, group=group)
        whole = torch.cat(parts)
    return Side(whole, places, table.group_ids[places])


def _share(number: int, rank: int, world: int) -> range:
    return range(number * rank // world, number * (rank + 1) // world)


def _captions(modality: TextModality, field: str, dataset: ShardDataset, rows: range) -> tuple[list[str], list[int]] | str:
    """Return the lines of a text field of some samples, and whose they are; or what is wrong with one."""
    lines: list[str] = []
    samples: list[int] = []
    for sample in rows:
        try:
            members = dataset.members(sample, dataset.keys[field])
            member = next((members[extension] for extension in dataset.keys[field] if extension in members), None)
            texts = [] if member is None else modality.lines(modality.decode(member))
        except DecodeError as error:
            if not dataset.tolerant:
                return f"sample {dataset.key(sample)!r}, {field}: {error}"
            texts = []
        lines += texts
        samples += [sample] * len(texts)
    return lines, samples
