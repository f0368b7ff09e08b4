"""Retrieval and zero-shot metrics against loops that spell the definitions out."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmcontrast.evaluation import EmbeddingTable, retrieval
from mmcontrast.evaluation.evaluate import uniformity
from mmcontrast.evaluation.retrieval import first_of_each_group, ranks, retrieval_metrics
from mmcontrast.evaluation.zero_shot import phrase_embedding, zero_shot_metrics


def test_ranks_are_the_definition(monkeypatch):
    monkeypatch.setattr(retrieval, "TILE", 7)
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (F.normalize(torch.randn(n, 3, generator=generator), dim=1) for n in (20, 31))
    candidates[5] = candidates[6] = candidates[7]  # ties
    query_groups, candidate_groups = torch.randint(12, (20,)), torch.randint(11, (31,))
    found = ranks(queries, candidates, query_groups, candidate_groups)
    for q in range(20):
        scores = candidates @ queries[q]
        own = candidate_groups == query_groups[q]
        expected = 0 if not own.any() else 1 + int(((scores >= scores[own].max() - 1e-7) & ~own).sum())
        assert found[q] == expected


def test_ties_count_against_the_query():
    same = torch.ones(4, 2)
    assert ranks(same, same, torch.arange(4), torch.arange(4)).tolist() == [4, 4, 4, 4]


def test_texts_that_say_the_same_count_once():
    assert first_of_each_group(torch.tensor([5, 3, 5, 9, 3])).tolist() == [0, 1, 3]


def test_metrics_of_ranks():
    metrics = retrieval_metrics(torch.tensor([1, 3, 0, 7, 2]), 40, [1, 5])
    expected = {"recall_at_1": 0.25, "recall_at_5": 0.75, "median_rank": 2.5, "num_queries": 4, "num_candidates": 40}
    assert metrics == pytest.approx(expected)


def test_a_class_is_as_near_as_the_nearest_of_its_phrases():
    torch.testing.assert_close(phrase_embedding(torch.tensor([[1.0, 0.1], [1.0, -0.1]])), torch.tensor([1.0, 0.0]))
    right, up, left = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, 0.0]])
    samples, labels = torch.tensor([[0.9, 0.1], [-0.8, 0.3], [0.2, 0.8], [0.8, 0.2], [0.9, 0.0]]), torch.tensor([0, 0, 1, 1, 0])
    metrics = zero_shot_metrics(samples, [torch.cat([right, left]), up], labels)
    assert metrics == pytest.approx({"top1": 0.8, "mean_per_class": 0.75, "num_samples": 5})


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr("mmcontrast.evaluation.embed.PART_ROWS", 2)
    table = EmbeddingTable(
        {"image": torch.randn(5, 4)}, {"image": torch.rand(5) < 0.5}, torch.arange(5), torch.tensor([0, 0, 1, 1, 2**40]),
        [{"key": f"k{k}", "name": "é"} for k in range(5)],
    )  # fmt: skip
    table.write(tmp_path / "t")
    again = EmbeddingTable.read(tmp_path / "t")
    assert torch.equal(again.fields["image"], table.fields["image"])
    assert torch.equal(again.present["image"], table.present["image"])
    assert torch.equal(again.group_ids, table.group_ids) and again.metadata == table.metadata
    assert len(list((tmp_path / "t").glob("*.parquet"))) == 3


def test_uniformity_is_the_papers():
    rows = F.normalize(torch.randn(60, 5), dim=1)
    want = torch.pdist(rows.double()).square().mul(-2).exp().mean().log().item()
    assert uniformity(rows) == pytest.approx(want, rel=1e-4)
    assert uniformity(rows[:1].repeat(7, 1)) == pytest.approx(0.0, abs=1e-5)
    assert math.isnan(uniformity(rows[:1]))
