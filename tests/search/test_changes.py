"""Check what happens to an index while it lies there, or while a server has it open: damage, another table, another index."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.search import SearchIndex, build_index
from mmcontrast.search.table import ChangedError

DIM = 8


def write_table(folder: Path, seed: int = 0) -> Path:
    rows, numbers = F.normalize(torch.randn(20, DIM, generator=torch.Generator().manual_seed(seed)), dim=1), torch.arange(20)
    table = EmbeddingTable(
        {"a": rows}, {"a": torch.ones(20, dtype=torch.bool)}, numbers, numbers, [{"key": f"{seed}/{k}"} for k in range(20)]
    )
    table.write(folder, {"model": "runs/none", "checkpoint": "last", "shards": "none.tar"})
    return folder


@pytest.fixture
def index(tmp_path) -> Path:
    write_table(tmp_path / "table")
    build_index(tmp_path / "table", progress=False)
    return tmp_path / "table" / "index"


def ask(opened: SearchIndex) -> list[str]:
    return [hit.key for hit in opened.search(torch.ones(DIM) / DIM**0.5, "a", 3)]


def test_one_bit_of_an_index_is_noticed(index):
    before = ask(SearchIndex.open(index))
    whole = bytearray((index / "a.faiss").read_bytes())
    whole[len(whole) // 2] ^= 1  # within the vectors: faiss itself sees nothing wrong
    (index / "a.faiss").write_bytes(whole)
    with pytest.raises(UserError, match=r"a.faiss is damaged \(its SHA-256 .*index again"):
        ask(SearchIndex.open(index))
    whole[len(whole) // 2] ^= 1
    (index / "a.faiss").write_bytes(whole)
    about = json.loads((index / "index.json").read_text())
    del about["fields"]["a"]["sha256"]  # as an index that was built before there were any
    (index / "index.json").write_text(json.dumps(about))
    assert ask(SearchIndex.open(index)) == before


@pytest.mark.parametrize("what", ["table", "index", "table is gone", "table under way"])
def test_what_is_made_anew_under_an_open_index_is_noticed(index, tmp_path, what):
    opened, table = SearchIndex.open(index), index.parent
    ask(opened)
    if what == "index":
        shutil.rmtree(index)
        build_index(table, progress=False)
    elif what == "table is gone":
        shutil.rmtree(table)
    elif what == "table under way":  # its manifest is written last
        (table / "manifest.json").unlink()
    else:
        index.rename(tmp_path / "aside")
        shutil.rmtree(table)
        write_table(table, seed=1)
        (tmp_path / "aside").rename(index)
    match = "was rebuilt since it was opened|part-00000.parquet: missing"
    for question in (
        lambda: ask(opened),
        lambda: opened.hit(3, 1.0),
        lambda: opened.neighbours(3, "a", 2),
        lambda: opened.check_unchanged(),
    ):
        with pytest.raises(UserError, match=match):
            question()
    with pytest.raises(ChangedError, match="open it again"):
        opened.check_unchanged()
    if what == "index":
        assert len(ask(SearchIndex.open(index))) == 3


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "a/b", "..", ".", "", "a\\b", "a\0b", 3, None, ["a"]])
def test_a_name_in_a_table_or_an_index_is_no_path(index, tmp_path, name):
    table = index.parent
    shutil.copy(index / "a.faiss", tmp_path / "a.faiss")
    manifest, about = (json.loads(file.read_text()) for file in (table / "manifest.json", index / "index.json"))
    if isinstance(name, str):
        (index / "index.json").write_text(json.dumps(about | {"fields": {name: about["fields"]["a"]}}))
        with pytest.raises(UserError, match=r"index.json names .*not ours"):
            SearchIndex.open(index)
    for changed in (
        {"fields": [name]},
        {"parts": [manifest["parts"][0] | {"name": name}]},
    ):
        (table / "manifest.json").write_text(json.dumps(manifest | changed))
        with pytest.raises(UserError, match=r"manifest.json (names|is damaged)"):
            build_index(table, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["table/manifest.json", "table/index/index.json"]), st.data())
def test_a_damaged_manifest_is_one_line(index, tmp_path, name, data):
    file = tmp_path / name
    whole = file.read_text()
    try:
        tree = json.loads(whole)
        tree[data.draw(st.sampled_from(sorted(tree)))] = data.draw(VALUES)
        file.write_text(data.draw(st.sampled_from([json.dumps(tree), whole[: len(whole) // 3], "[" * 100_000, "null", "[]"])))
        with suppress(UserError):  # nothing else
            ask(SearchIndex.open(index))
    finally:
        file.write_text(whole)
