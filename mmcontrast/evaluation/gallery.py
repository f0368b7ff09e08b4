"""Galleries of a page: queries, and what a model finds for them."""

import html
from collections.abc import Iterable
from itertools import permutations

import torch
from torch import Tensor

from mmcontrast.data import ShardDataset
from mmcontrast.data.page import media
from mmcontrast.evaluation.banks import Bank
from mmcontrast.evaluation.embed import EmbeddingTable
from mmcontrast.evaluation.retrieval import first_of_each_group
from mmcontrast.modalities import AudioModality, ImageModality, TextModality
from mmcontrast.models import ContrastiveModel

QUERIES, SHOWN = 6, 8  # of each gallery: rows, and hits in a row


def galleries(model: ContrastiveModel, table: EmbeddingTable) -> list[tuple[str, str]]:
    """Every ordered pair of fields that a person can look at or listen to."""
    shown = [f for f in table.fields if isinstance(model.modality(f), ImageModality | TextModality | AudioModality)]
    return list(permutations(shown, 2))


def candidates_of(model: ContrastiveModel, field: str, table: EmbeddingTable) -> Tensor:
    """Return the rows that have a field, int64; of texts of one group the first alone."""
    rows = table.present[field].nonzero().squeeze(1)
    return rows[first_of_each_group(table.group_ids[rows])] if isinstance(model.modality(field), TextModality) else rows


def drawn(rows: Tensor, number: int) -> list[int]:
    """Return some rows, drawn once and for all by a fixed seed, so that the galleries of two runs can be compared."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [int(row) for row in rows[order[:number]]]


def comparable(
    query: str,
    candidate: str,
    queries: Tensor,
    candidates: Tensor,
    model: ContrastiveModel,
    table: EmbeddingTable,
    bank: Bank | None,
) -> tuple[Tensor, Tensor]:
    """Return rows of two fields whose products are their scores: of a bank's bridge its expected entries.

    Args:
        queries, candidates: rows of the table.
    """
    x, y = table.fields[query][queries], table.fields[candidate][candidates]
    if bridge := bank and bank.between(model, [query], [candidate]):
        return bridge.expected(x), bridge.expected(y, candidates=True)
    return table.compared(x), table.compared(y, columns=True)


def gallery(
    query: str,
    candidate: str,
    split: str,
    model: ContrastiveModel,
    dataset: ShardDataset,
    table: EmbeddingTable,
    bank: Bank | None = None,
) -> str:
    """Return some queries with their first hits, as HTML; `bank`: through which they are compared."""
    candidates = candidates_of(model, candidate, table)
    queries = drawn(table.present[query].nonzero().squeeze(1), QUERIES)
    x, y = comparable(query, candidate, torch.tensor(queries, dtype=torch.int64), candidates, model, table, bank)
    best = candidates[(x @ y.T).topk(min(SHOWN, len(candidates))).indices].tolist()
    rows = []
    for row, hits in zip(queries, best, strict=True):
        rows.append(row_of_hits(sample_as_html(dataset, query, row, table), hits, row, candidate, dataset, table))
    return f"<h2>{html.escape(query)} → {html.escape(candidate)}, {html.escape(split)}</h2>{''.join(rows)}"


def row_of_hits(head: str, hits: Iterable[int], query: int, field: str, dataset: ShardDataset, table: EmbeddingTable) -> str:
    """Return a row of a gallery as HTML, with a mark at the hits that are of the query's group.

    Args:
        head: what stands before them, HTML.
        hits, query: rows of the table.
    """
    items = []
    for hit in hits:
        mark = " hit" if table.group_ids[hit] == table.group_ids[query] else ""
        items.append(f'<div class="item{mark}">{sample_as_html(dataset, field, hit, table)}</div>')
    return f'<div class="row"><div class="query">{head}</div>{"".join(items)}</div>'


def sample_as_html(dataset: ShardDataset, field: str, row: int, table: EmbeddingTable) -> str:
    """Return a sample's field as HTML: its own bytes, embedded."""
    extensions = dataset.keys[field]
    members = dataset.members(row, extensions)
    data = next(members[e] for e in extensions if e in members)
    return media(data, str(table.metadata[row].get("name", "")))
