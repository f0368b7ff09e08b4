"""An embedding that is not finite ends every way that makes or reads it, with a name; JSON never holds a bare NaN."""

import json
import math

import numpy as np
import pytest
import torch

from mmcontrast.data import write_shard
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, embed_dataset
from mmcontrast.evaluation.compare import compare
from mmcontrast.evaluation.neighbours import nearest
from mmcontrast.evaluation.report import read_log
from mmcontrast.search.index import build_index
from mmcontrast.search.query import SearchIndex
from mmcontrast.search.table import StoredTable
from mmcontrast.strict_json import dumps
from mmcontrast.training.log import StepLines
from mmcontrast.whole_files import write_json
from tests.evaluation.text_model import WORDS, text_model, zero_shot


@pytest.fixture
def embedder():
    """One weight is not a number: that of the word "blue"."""
    made = text_model()
    number = int(made.model.modality("text").tokens("blue")[1])
    made.model.towers["text"].network.get_input_embeddings().weight.data[number, 3] = torch.nan
    return made


def shard(folder, words=WORDS):
    samples = [{"__key__": f"k{k}", "txt": word, "json": {"sample_id": 100 + k, "label": k}} for k, word in enumerate(words)]
    write_shard(folder / "val.tar", samples)
    return folder / "val.tar"


def test_one_weight_gives_no_number(embedder, tmp_path):
    path = shard(tmp_path)
    with pytest.raises(
        UserError, match=r"split 'val', field 'text', .*val.tar, sample 'k2' \(sample_id 102\): the embedding is not"
    ):
        zero_shot(embedder, path, ["a", "b", "c", "d", "e", "f"])
    with pytest.raises(UserError, match=r"field 'text', text 'blue': the embedding is not finite"):
        zero_shot(embedder, shard(tmp_path, ["red", "king"]), ["red", "blue"])
    with pytest.raises(UserError, match=r"data, field 'text', .*sample 'k2' \(sample_id 102\)"):
        embed_dataset(embedder.model, embedder.dataset(str(shard(tmp_path))), batch_size=2, name="data", rows=range(1, 6))
    with pytest.raises(UserError, match=r"words, field 'text', texts\[4\]: the embedding is not finite.*nor are 1 others of 2"):
        embedder.embed(texts=["a", "b", "c", "d", "blue", "blue"], batch_size=2, progress=False)


def test_tables_that_are_not_finite(tmp_path):
    rows = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    present, metadata = torch.tensor([True, True, True, False, True]), [{"key": f"k{k}"} for k in range(5)]
    rows[3] = torch.nan  # of a sample that lacks the field: nobody looks at it
    EmbeddingTable({"text": rows}, {"text": present}, torch.arange(5), torch.arange(5), metadata).write(tmp_path / "sound")
    assert len(EmbeddingTable.read(tmp_path / "sound")) == 5
    build_index(tmp_path / "sound", progress=False)
    index = SearchIndex.open(tmp_path / "sound" / "index")
    with pytest.raises(UserError, match="a query's vector is not finite"):
        index.search(torch.tensor([1.0, torch.inf, 0, 0]), "text")
    rows[4, 1] = torch.nan
    EmbeddingTable({"text": rows}, {"text": present}, torch.arange(5), torch.arange(5), metadata).write(tmp_path / "broken")
    for read in (EmbeddingTable.read, lambda path: build_index(path, progress=False)):
        with pytest.raises(UserError, match=r"broken, field 'text', row 4, sample 'k4'.*: the embedding is not finite"):
            read(tmp_path / "broken")
    with pytest.raises(UserError, match="row 4, sample 'k4': the embedding is not finite"):
        StoredTable(tmp_path / "broken").vectors("text", np.array([0, 4]))
    for first, second, name in ((rows, rows[:3], "queries: row 3"), (rows[:3], rows, "candidates: row 3")):
        with pytest.raises(ValueError, match=f"{name} is not finite"):
            nearest(first, second, 1)


def strict(text):
    """JSON as other languages read it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict(tmp_path):
    lacking = {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": {"d": {"e": float("nan")}}, "f": "NaN"}
    null = {"a": None, "b": [None, [None, 1.5]], "c": {"d": {"e": None}}, "f": "NaN"}
    assert strict(dumps(lacking)) == null and strict(dumps(null)) == null
    write_json(tmp_path / "x.json", lacking)
    assert strict((tmp_path / "x.json").read_text()) == null
    StepLines(tmp_path / "metrics.jsonl", 0).add({"step": 1, "loss": 2.0, "grad_norm": math.inf})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0, "grad_norm": None}
    assert math.isnan(read_log(tmp_path / "metrics.jsonl")[0]["grad_norm"])
    table = EmbeddingTable({"text": torch.ones(1, 1)}, {"text": torch.ones(1) > 0}, torch.ones(1), torch.ones(1), [lacking])
    table.write(tmp_path / "table")
    assert EmbeddingTable.read(tmp_path / "table").metadata == [null]


def test_results_without_a_number_are_null_and_compared(tmp_path):
    entries = {
        "val/x": {"value": math.nan, "low": math.nan, "high": math.nan},
        "val/y": {"value": 0.5, "low": 0.4, "high": 0.6},
    }
    content = {"format": "mmcontrast results 1", "results": entries}
    (tmp_path / "old.json").write_text(json.dumps(content))  # as they were written: NaN
    (tmp_path / "new.json").write_text(dumps(content))
    found = compare([tmp_path / "old.json", tmp_path / "new.json"])
    again = strict(dumps(found.to_json()))["results"]
    assert again["val/x"]["old"] == again["val/x"]["new"] == {"value": None, "low": None, "high": None, "n": None, "mark": ""}
    assert again["val/y"]["new"]["value"] == 0.5
