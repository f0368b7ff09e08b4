"""The page's comparison of before and after: counts, the samples shown, and when nothing can be compared."""

import json
import re

import pandas as pd
import pytest
import torch

from mmcontrast.data import ShardDataset
from mmcontrast.evaluation import EmbeddingTable, Evaluation, EvaluationOptions
from mmcontrast.evaluation.before import EVALUATIONS, KEPT, before_and_after, changes, keep_before
from mmcontrast.modalities import TextModality
from mmcontrast.models import ContrastiveModel

NUMBER = 5


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))
    pd.DataFrame({"q": [f"query{k}" for k in range(NUMBER)], "c": [f"answer{k}" for k in range(NUMBER)]}).to_csv(
        tmp_path / "a.csv", index=False
    )
    modalities = {"q": TextModality(context_length=8), "c": TextModality(context_length=8)}
    return ContrastiveModel(modalities, {}, {}, 1), ShardDataset(str(tmp_path / "a.csv"), modalities, {"q": ["q"], "c": ["c"]})


def table_of(dataset, answers, lacking=()):
    """Query k is nearest to candidate answers[k], and next to the one after it."""
    identity = torch.eye(NUMBER)
    queries = torch.stack([identity[a] + 0.5 * identity[(a + 1) % NUMBER] for a in answers])
    present = torch.tensor([k not in lacking for k in range(NUMBER)])
    ids = torch.tensor([dataset.default_id(k) for k in range(NUMBER)])
    metadata = [{"key": dataset.key(k)} for k in range(NUMBER)]
    fields = {"q": torch.nn.functional.normalize(queries) * present[:, None], "c": identity}
    return EmbeddingTable(fields, {"q": present, "c": torch.ones(NUMBER, dtype=torch.bool)}, ids, ids, metadata)


def test_queries_whose_first_hit_became_right_or_wrong_are_counted_and_shown(data):
    model, dataset = data
    before, after = table_of(dataset, [0, 1, 4, 2, 0], lacking=[4]), table_of(dataset, [3, 1, 2, 3, 0], lacking=[4])
    section = next(section for section in changes("val", before, after, model, dataset) if "q → c, val" in section)
    gained, lost = section.split("<h3>")[1:]
    assert gained.startswith("right now, wrong before: 2 of 4</h3>") and lost.startswith("wrong now, right before: 1 of 4</h3>")
    for part, shown in ((gained, {2: (4, 2), 3: (2, 3)}), (lost, {0: (0, 3)})):
        rows = [re.findall(r'class="item( hit)?">answer(\d)', row) for row in part.split('<div class="row">')[1:]]
        queries = [int(number) for number in re.findall(r"query(\d)", part)]
        assert sorted(queries) == sorted(shown) and len(rows) == 2 * len(shown)
        for place, query in enumerate(queries):
            firsts = [rows[2 * place + k][0] for k in (0, 1)]
            assert [int(answer) for _, answer in firsts] == list(shown[query])
            assert [bool(mark) for mark, _ in firsts] == [first == query for first in shown[query]]
    assert changes("val", before, table_of(dataset, range(NUMBER)), model, dataset) == []  # another sample lacks its query
    other = table_of(dataset, range(NUMBER), lacking=[4])
    other.sample_ids = other.sample_ids + 1
    assert changes("val", before, other, model, dataset) == []


def test_results_of_step_0_are_compared_with_those_of_the_same_data_and_tasks(data, tmp_path):
    model, dataset = data
    options, datasets = EvaluationOptions(splits={"val": "a.csv"}), {"val": dataset}

    def found(value, answers):
        return Evaluation(
            values={"val/x/recall_at_1": value, "val/x/median_rank": 4 * value}, tables={"val": table_of(dataset, answers)}
        )

    first, last = found(0.25, [0, 1, 4, 2, 0]), found(0.75, range(NUMBER))
    assert len(keep_before(tmp_path, first, datasets, options)) == NUMBER < KEPT
    assert before_and_after(tmp_path, last, 7, model, datasets, options) == []  # no line of step 0
    (tmp_path / EVALUATIONS).write_text(json.dumps({"step": 0, **first.values}) + "\n")
    course, table, *parts = before_and_after(tmp_path, last, 7, model, datasets, options)
    assert "Results by step" in course and "<svg" in course and len(parts) == 2
    main, _, folded = table.partition("<details>")
    recall = ["x/recall_at_1", "0.250", "0.750", "+0.500"]
    assert re.findall(r"<td>([^<]*)</td>", main) == recall
    assert re.findall(r"<td>([^<]*)</td>", folded) == [*recall, "x/median_rank", "1.0", "3.0", "+2.0"]
    same = options.model_copy(update={"resamples": 0, "batch_size": 2})
    assert len(before_and_after(tmp_path, last, 7, model, datasets, same)) == 4
    for changed in ({"whiten": True}, {"captions": ["c"]}):
        assert len(before_and_after(tmp_path, last, 7, model, datasets, options.model_copy(update=changed))) == 1
    dataset.__dict__["shards"] = dataset.shards * 2  # another digest
    assert len(before_and_after(tmp_path, last, 7, model, datasets, options)) == 1
