"""Indexes of every kind against an exact search written out here, on fresh random tables of several parts."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, embed
from mmcontrast.search import SearchIndex, build_index
from mmcontrast.search.index_selection import FLAT_ROWS, GIB, plan_index
from tests.command import run_script

DIM = 32


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table of n rows in four clusters, parts of 1,000, where about one row in five lacks a field."""
    monkeypatch.setattr(embed, "PART_ROWS", 1000)

    def make(n, fields=("a", "b"), present=0.8):
        centres = torch.randn(4, DIM)
        here = {field: torch.rand(n) < present for field in fields}
        rows = {f: F.normalize(centres[torch.randint(4, (n,))] + torch.randn(n, DIM)) * here[f].unsqueeze(1) for f in fields}
        metadata = [{"key": f"sample {row}", "number": row * row} for row in range(n)]
        made = EmbeddingTable(rows, here, torch.arange(n), torch.arange(n), metadata)
        made.write(tmp_path / "table", {"model": "runs/none", "checkpoint": "last", "shards": "none.tar"})
        return made

    return make


def exact(table, field, queries, k, without=None):
    """(scores, rows) of the k best, in float64."""
    scores = queries.double() @ table.fields[field].double().T
    scores[:, ~table.present[field]] = -np.inf
    if without is not None:
        scores[torch.arange(len(queries)), without] = -np.inf
    return scores.topk(k)


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("hnsw", 0.95), ("ivf_pq", 0.85)])
def test_each_kind_finds_what_an_exact_search_finds(table, tmp_path, kind, least):
    made = table(3500)
    about = build_index(tmp_path / "table", kind=kind, memory=GIB, progress=False)
    index = SearchIndex.open(tmp_path / "table" / "index")
    for field, other in (("a", "b"), ("b", "a")):
        entry = about["fields"][field]
        assert entry["rows"] == int(made.present[field].sum()) and entry["kind"] == kind and entry["reason"]
        about_recall = {"at": 10, "queries": other, "number": 1000, "self_excluded": False}
        assert about_recall.items() < entry["recall"].items()
        asking = made.present[other].nonzero().squeeze(1).numpy()
        asking = asking[np.linspace(0, len(asking) - 1, 1000).astype(int)]
        queries = made.fields[other][asking]
        scores, rows = exact(made, field, queries, 10)
        found = index.search(queries, field, 10)
        shares = [len({hit.row for hit in hits} & set(best.tolist())) / 10 for hits, best in zip(found, rows, strict=True)]
        assert least <= np.mean(shares) <= 1
        assert entry["recall"]["value"] == pytest.approx(np.mean(shares), abs=2e-3)  # ties in float32
        for hits, row in zip(found[:50], made.fields[other][asking[:50]], strict=True):
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
            for hit in hits:
                assert hit.score == pytest.approx(float(made.fields[field][hit.row] @ row), abs=1e-5)
                assert made.present[field][hit.row] and hit.key == f"sample {hit.row}" and hit.metadata["number"] == hit.row**2
        if kind == "flat":
            given = torch.tensor([[hit.score for hit in hits] for hits in found]).double()  # sums of float32
            torch.testing.assert_close(given, scores, rtol=1e-6, atol=1e-6)


def test_a_rows_neighbours_leave_out_the_row(table, tmp_path):
    made = table(500)
    build_index(tmp_path / "table", progress=False)
    index = SearchIndex.open(tmp_path / "table" / "index")
    row = int(made.present["a"].nonzero()[7])
    _, best = exact(made, "a", made.fields["a"][row : row + 1], 5, torch.tensor([row]))
    assert [hit.row for hit in index.neighbours(row, "a", 5)] == best[0].tolist()
    both = int((made.present["a"] & made.present["b"]).nonzero()[0])
    _, across = exact(made, "b", made.fields["a"][both : both + 1], 5, torch.tensor([both]))
    assert [hit.row for hit in index.neighbours(both, "b", 5, of="a")] == across[0].tolist()
    lacking = int((~made.present["a"]).nonzero()[0])
    for row, message in ((lacking, f"row {lacking} has no 'a'"), (500, "rows are 0 to 499"), (-1, "no row -1")):
        with pytest.raises(UserError, match=message):
            index.neighbours(row, "a")


@pytest.mark.parametrize(("rows", "present"), [(1, 1.0), (7, 1.0), (300, 0.5)])
def test_small_tables_and_all_that_there_are(table, tmp_path, rows, present):
    made = table(rows, fields=("a",), present=present)
    recall = build_index(tmp_path / "table", progress=False)["fields"]["a"]["recall"]
    here = int(made.present["a"].sum())
    assert recall["self_excluded"] and recall["value"] == 1 and recall["at"] == min(10, here - 1)
    hits = SearchIndex.open(tmp_path / "table" / "index").search(torch.randn(DIM), "a", 10_000)
    assert sorted(hit.row for hit in hits) == made.present["a"].nonzero().squeeze(1).tolist()


def test_equal_rows_stand_for_each_other_in_the_recall(tmp_path):
    n = 400
    rows = F.normalize(torch.randn(5, DIM)).repeat(n // 5, 1)
    everybody = torch.ones(n, dtype=torch.bool)
    table = EmbeddingTable({"a": rows}, {"a": everybody}, torch.arange(n), torch.arange(n), [{"key": str(k)} for k in range(n)])
    table.write(tmp_path / "table")
    assert build_index(tmp_path / "table", progress=False)["fields"]["a"]["recall"]["value"] == 1


def test_a_poor_index_has_a_poor_recall(table, tmp_path):
    """Recall is measured before it is stored: codes that are searched in one list of many miss rows."""
    import faiss

    from mmcontrast.search.index import Recall
    from mmcontrast.search.table import StoredTable

    made = table(3000, fields=("a",), present=1.0)
    index = faiss.index_factory(DIM, "IDMap,IVF64,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(made.fields["a"].numpy())
    index.add_with_ids(made.fields["a"].numpy(), np.arange(3000))
    stored = StoredTable(tmp_path / "table")
    recall, values = Recall(stored, "a", "a"), []
    for probes in (1, 8, 64):
        faiss.ParameterSpace().set_index_parameters(index, f"nprobe={probes}")
        values.append(recall.measure(index, "hnsw"))
    assert values[0] < 0.7 < values[1] < values[2] == 1


def test_the_kind_follows_rows_and_memory():
    assert plan_index(FLAT_ROWS, 512, memory=GIB).kind == "flat"
    assert plan_index(FLAT_ROWS + 1, 512, memory=GIB).kind == "hnsw"
    big = plan_index(10_000_000, 512, memory=8 * GIB)
    assert (
        (big.kind, big.factory) == ("ivf_pq", "IDMap,IVF16384,PQ128np") and big.bytes < 8 * GIB and big.train_rows > 16384 * 39
    )
    assert "22 GiB, more than 8 GiB, --memory" in big.reason
    assert plan_index(10_000_000, 512, memory=32 * GIB).kind == "hnsw"
    assert plan_index(1000, 512, kind="hnsw").factory == "IDMap,HNSW32"
    for kind, rows, message in (("ivf_pq", 100, "too few to learn codes"), ("tree", 100, "auto, or one of flat, ivf_pq, hnsw")):
        with pytest.raises(UserError, match=message):
            plan_index(rows, DIM, kind)


def test_a_query_of_any_length_is_a_direction(table, tmp_path):
    made = table(300)
    build_index(tmp_path / "table", progress=False)
    row = int(made.present["a"].nonzero()[7])
    index, query = SearchIndex.open(tmp_path / "table" / "index"), made.fields["a"][row]
    hits = index.search(query, "a", 3)
    assert hits[0].row == row and [hit.row for hit in index.search(5 * query, "a", 3)] == [hit.row for hit in hits]
    assert index.search(5 * query, "a", 1)[0].score == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="a query's vector is zero"):
        index.search(torch.zeros(DIM), "a")
    assert index.search(query.clone().requires_grad_(), "a", 1)[0].row == row
    for k in (0, -1):
        with pytest.raises(UserError, match=f"k={k}: at least 1 hit"):
            index.search(query, "a", k)


def test_metadata_is_read_by_row_group(table, tmp_path):
    made = table(2500)
    for part in (tmp_path / "table").glob("*.parquet"):
        pq.write_table(pq.read_table(part), part, row_group_size=64)
    build_index(tmp_path / "table", progress=False)
    index = SearchIndex.open(tmp_path / "table" / "index")
    for row in (0, 63, 64, 999, 1000, 1064, 2499):
        assert index.table.about(row) == (f"sample {row}", made.metadata[row])


def test_an_index_appears_whole_or_not_at_all(table, tmp_path):
    made = table(1200)  # fewer have `b` than are asked for the recall: row 1100 is one
    made.fields["b"][1100] = torch.nan
    made.present["b"][1100] = True
    (tmp_path / "table" / "manifest.json").unlink()
    made.write(tmp_path / "table")
    with pytest.raises(UserError, match="field 'b', row 1100, sample 'sample 1100': the embedding is not finite"):
        build_index(tmp_path / "table", tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table"]
    with pytest.raises(
        UserError, match="row 1100, sample 'sample 1100': the embedding is not finite"
    ):  # it asks for the recall
        build_index(tmp_path / "table", tmp_path / "out", ["a"], progress=False)
    made.fields["b"][1100] = made.fields["b"][int(made.present["b"].nonzero()[0])]
    (tmp_path / "table" / "manifest.json").unlink()
    made.write(tmp_path / "table")
    build_index(tmp_path / "table", tmp_path / "out", ["a"], progress=False)
    assert SearchIndex.open(tmp_path / "out").fields == ["a"]
    with pytest.raises(UserError, match="exists: remove it, or choose another folder"):
        build_index(tmp_path / "table", tmp_path / "out", progress=False)


def test_what_is_wrong_is_said(table, tmp_path):
    folder = tmp_path / "table"
    with pytest.raises(UserError, match="holds no complete embedding table"):
        build_index(folder)
    table(1500)
    with pytest.raises(UserError, match="--field c: .* has none of this name; there is: a, b"):
        build_index(folder, fields=["c"])
    part = folder / "part-00001.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="part-00001.safetensors: missing or damaged"):
        build_index(folder)
    part.write_bytes(whole)
    build_index(folder, progress=False)
    index = folder / "index"
    with pytest.raises(UserError, match="no index of a field 'A'; did you mean 'a'?|there is"):
        SearchIndex.open(index).search(torch.randn(DIM), "A")
    with pytest.raises(UserError, match=r"a query of shape \(7,\): the index takes vectors of 32 numbers"):
        SearchIndex.open(index).search(torch.randn(7), "a")

    (folder / "part-00000.parquet").rename(tmp_path / "aside.parquet")
    with pytest.raises(UserError, match="part-00000.parquet: missing or damaged"):
        SearchIndex.open(index).table.about(3)
    stored = (index / "a.faiss").read_bytes()
    (index / "a.faiss").write_bytes(b"\0" * len(stored))
    with pytest.raises(UserError, match="a.faiss is damaged"):
        SearchIndex.open(index).search(torch.randn(DIM), "a")
    (index / "a.faiss").write_bytes(stored[:-5])
    with pytest.raises(UserError, match=f"a.faiss: missing or not of {len(stored)} bytes"):
        SearchIndex.open(index)
    (index / "a.faiss").write_bytes(stored)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checkpoint": "best"}))
    with pytest.raises(UserError, match="is of another table than"):
        SearchIndex.open(index)
    for damage in ("{", "[]", '{"format": "mmcontrast index 1"}'):
        (index / "index.json").write_text(damage)
        with pytest.raises(UserError, match=r"index.json is damaged"):
            SearchIndex.open(index)
    (index / "index.json").unlink()
    with pytest.raises(UserError, match="holds no whole index"):
        SearchIndex.open(index)


def test_without_faiss_the_extra_is_named(table, tmp_path):
    table(10)
    script = "import sys; sys.modules['faiss'] = None\nfrom mmcontrast.search import build_index; from pathlib import Path\n"
    script += "try: build_index(Path(sys.argv[1]))\nexcept ValueError as error: print(error)"
    done = run_script(script, tmp_path / "table")
    assert done.returncode == 0, done.stderr
    assert "pip install 'mmcontrast[cpu]'" in done.stdout
