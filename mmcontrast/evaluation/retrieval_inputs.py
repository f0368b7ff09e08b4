"""Queries and candidates of retrieval: rows of a table, captions, or several fields together; and their relevant pairs."""

import math
from collections import Counter
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
from mmcontrast.evaluation.repeats import first_of_repeats
from mmcontrast.evaluation.retrieval import first_of_each_group
from mmcontrast.evaluation.sending import device_of, from_first
from mmcontrast.evaluation.whitening import whiten
from mmcontrast.modalities import DecodeError, TextModality
from mmcontrast.models import ContrastiveModel
from mmcontrast.text_files import lines_of, read_text


@dataclass(frozen=True)
class RetrievalInput:
    """R embeddings of samples of a table.

    Attributes:
        rows: [R, D], as in the table.
        samples: int64 [R], their row indices in the table.
        groups: int64 [R]: equal groups are relevant to each other.
    """

    rows: Tensor
    samples: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def prefix(self, width: int) -> "RetrievalInput":
        return replace(self, rows=F.normalize(self.rows[:, :width], dim=1))

    def take(self, row_indices: Tensor) -> "RetrievalInput":
        return RetrievalInput(self.rows[row_indices], self.samples[row_indices], self.groups[row_indices])

    def without_repeats(self) -> "RetrievalInput":
        """Return the rows without those that repeat one of their group, as a picture with several rows of captions does."""
        if len(self.groups.unique()) == len(self):
            return self
        first = first_of_repeats(self.rows, self.groups)
        return self if len(first) == len(self) else self.take(first)

    def one_per_group(self) -> "RetrievalInput":
        first = first_of_each_group(self.groups)
        return self if len(first) == len(self) else self.take(first)


def retrieval_input(
    table: EmbeddingTable, fields: str | Sequence[str], captions: Mapping[str, RetrievalInput]
) -> RetrievalInput:
    """Return the embeddings of the samples that have all the fields: of one field as they are, of several the direction of
    their sum (of tangent vectors their mean); of a single field of captions, all captions."""
    fields = [fields] if isinstance(fields, str) else list(fields)
    if len(fields) == 1 and fields[0] in captions:
        return captions[fields[0]]
    samples = torch.stack([table.present[field] for field in fields]).all(0).nonzero().squeeze(1)
    rows = [table.fields[field][samples] for field in fields]
    if len(rows) == 1:
        combined = rows[0]
    elif table.curvature is None:
        combined = F.normalize(torch.stack(rows).sum(0), dim=1)
    else:
        combined = torch.stack(rows).mean(0)
    return RetrievalInput(combined, samples, table.group_ids[samples])


def whitened(table: EmbeddingTable, captions: Mapping[str, RetrievalInput]) -> tuple[EmbeddingTable, dict[str, RetrievalInput]]:
    """Centre embeddings by their field's mean and whiten all fields with one common matrix, so that they stay comparable."""
    means = {field: rows[table.present[field]].mean(0) for field, rows in table.fields.items()}
    centred = [(rows - means[field])[table.present[field]] for field, rows in table.fields.items()]
    whitening = whiten(torch.cat(centred), kind="zca")

    def apply(field: str, rows: Tensor) -> Tensor:
        return replace(whitening, mean=whitening.mean + means[field])(rows)

    fields = {field: apply(field, rows) * table.present[field][:, None] for field, rows in table.fields.items()}
    whitened_captions = {field: replace(lines, rows=apply(field, lines.rows)) for field, lines in captions.items()}
    return replace(table, fields=fields), whitened_captions


def group_by_label(inputs: RetrievalInput, labels: Sequence[Any]) -> RetrievalInput:
    """Return the rows whose samples have a label, with the label as their group. `labels`: the table's, None where missing."""
    texts = [label_text(label) for label in labels]
    numbers = {text: number for number, text in enumerate(sorted({text for text in texts if text is not None}))}
    row_texts = [texts[sample] for sample in inputs.samples.tolist()]
    row_indices = torch.tensor([row for row, text in enumerate(row_texts) if text is not None], dtype=torch.int64)
    groups = torch.tensor([numbers[text] for text in row_texts if text is not None], dtype=torch.int64)
    return RetrievalInput(inputs.rows[row_indices], inputs.samples[row_indices], groups)


def read_relevance(
    file: str, queries: RetrievalInput, candidates: RetrievalInput, table: EmbeddingTable
) -> tuple[Pairs, int, int]:
    """Read the relevant pairs from a file of relevance (trec_eval's qrels), which names samples by their keys.

    Returns:
        The pairs; the number of relevant pairs in the file; and how many of them are left out, as a sample lacks its field.

    Raises:
        UserError: for a malformed line, or a key of no sample.
    """
    known_keys = Counter(entry["key"] for entry in table.metadata)
    gains: dict[tuple[str, str], float] = {}
    for number, line in enumerate(lines_of(read_text(file)), 1):
        try:
            query, _, candidate, gain = line.split()
            gains[query, candidate] = float(gain)
            if not math.isfinite(gains[query, candidate]):
                raise ValueError("a gain is finite")
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {line[:60]!r} is not 'query-key 0 candidate-key gain'") from error
        for key in (query, candidate):
            if key not in known_keys:
                raise UserError(f"{file}, line {number}: no sample has the key {key!r}")
            if known_keys[key] > 1:
                raise UserError(f"{file}, line {number}: {known_keys[key]} samples have the key {key!r}: give each its own")
    query_rows, candidate_rows = _rows_by_key(queries, table), _rows_by_key(candidates, table)
    relevant = {keys: gain for keys, gain in gains.items() if gain > 0}
    present = [(q, c, gain) for (q, c), gain in relevant.items() if q in query_rows and c in candidate_rows]
    triples = [(row, candidate, gain) for q, c, gain in present for row in query_rows[q] for candidate in candidate_rows[c]]
    columns = torch.tensor(triples, dtype=torch.float64).reshape(-1, 3)
    pairs = Pairs(columns[:, 0].long(), columns[:, 1].long(), columns[:, 2])
    return pairs, len(relevant), len(relevant) - len(present)


def _rows_by_key(inputs: RetrievalInput, table: EmbeddingTable) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(inputs.samples.tolist()):
        rows.setdefault(table.metadata[sample]["key"], []).append(row)
    return rows


def embed_captions(
    model: ContrastiveModel,
    field: str,
    dataset: ShardDataset,
    table: EmbeddingTable,
    device: torch.device | str,
    batch_size: int,
    group: dist.ProcessGroup | None = None,
) -> RetrievalInput:
    """Embed every line of a text field's members. Ranks of a group share the work, and all get the result.

    Raises:
        UserError: for a text that cannot be read.
    """
    modality = model.modality(field)
    assert isinstance(modality, TextModality)
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    shares: list[Any] = [_read_captions(modality, field, dataset, _rank_share(len(dataset), rank, world))]
    if group:
        own_share, shares = shares[0], [None] * world
        dist.all_gather_object(shares, own_share, group=group)
    if error := next((share for share in shares if isinstance(share, str)), None):
        raise UserError(error)
    lines = [line for texts, _ in shares for line in texts]
    sample_indices = torch.tensor([sample for _, samples in shares for sample in samples], dtype=torch.int64)
    own_range = _rank_share(len(lines), rank, world)
    count = math.ceil(len(lines) / world)  # the same on each rank, so a share may overlap the next
    own_lines = lines[own_range.start : own_range.start + count]
    starts = range(0, len(own_lines), batch_size)
    batches = [embed_texts(model, field, own_lines[start : start + batch_size], device) for start in starts]
    rows = torch.cat(batches)[: len(own_range)] if batches else torch.empty(0, model.embed_dim)
    if group:
        parts: Any = None if rank else [None] * world
        dist.gather_object(rows, parts, group_dst=0, group=group)
        rows = from_first(lambda: torch.cat(parts), group, device_of(group), share=True)
    return RetrievalInput(rows, sample_indices, table.group_ids[sample_indices])


def _rank_share(number: int, rank: int, world: int) -> range:
    return range(number * rank // world, number * (rank + 1) // world)


def _read_captions(modality: TextModality, field: str, dataset: ShardDataset, rows: range) -> tuple[list[str], list[int]] | str:
    """Return the lines of a text field of some samples and the sample of each line; or an error message for one of them."""
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
