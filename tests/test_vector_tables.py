"""Embedding tables of vectors from elsewhere: .npy and Parquet as numpy, pandas and datasets write them."""

import datetime
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from mmcontrast import vector_tables
from mmcontrast.cli import app
from mmcontrast.data import open_shards
from mmcontrast.data.rewriting import write_selected
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.search import SearchIndex
from mmcontrast.vector_tables import write_vector_table


def unit(rows, dim=8):
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1).numpy()


@pytest.fixture
def inference(tmp_path):
    """The folders of clip-retrieval's inference: half precision, files numbered without zeros, metadata by pandas."""
    images, texts = unit(33), unit(33)
    for folder in ("img_emb", "text_emb", "metadata"):
        (tmp_path / folder).mkdir()
    for number in range(11):  # 10 comes after 9, not after 1
        rows = slice(3 * number, 3 * number + 3)
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", images[rows].astype(np.float16))
        np.save(tmp_path / "text_emb" / f"text_emb_{number}.npy", texts[rows].astype(np.float16))
        numbers = range(33)[rows]
        frame = pd.DataFrame(
            {
                "image_path": [f"{n:09d}" for n in numbers],
                "caption": [f"caption {n % 30}" for n in numbers],
                "width": [n / 2 for n in numbers],
            }
        )
        frame.to_parquet(tmp_path / "metadata" / f"metadata_{number}.parquet")
    return tmp_path, images, texts


@pytest.mark.parametrize("part_rows", [100_000, 7])
def test_the_folders_of_clip_retrieval(inference, monkeypatch, part_rows):
    folder, images, texts = inference
    monkeypatch.setattr(vector_tables, "PART_ROWS", part_rows)
    arguments = [f"image={folder}/img_emb/*.npy", f"text={folder}/text_emb/*.npy", "--metadata", f"{folder}/metadata/*.parquet"]
    options = ["--key", "image_path", "--group", "caption"]
    done = CliRunner().invoke(app, ["data", "table", str(folder / "table"), *arguments, *options])
    assert done.exit_code == 0 and "33 rows of image, text" in done.output, done.output
    table = EmbeddingTable.read(folder / "table")
    assert (
        np.abs(table.fields["image"].numpy() - images).max() < 1e-3
        and np.abs(table.fields["text"].numpy() - texts).max() < 1e-3
    )
    torch.testing.assert_close(table.fields["image"].norm(dim=1), torch.ones(33))
    assert table.metadata[32] == {"image_path": "000000032", "caption": "caption 2", "width": 16.0, "key": "000000032"}
    assert table.group_ids[2] == table.group_ids[32] and len(table.group_ids.unique()) == 30 and table.present["text"].all()
    assert CliRunner().invoke(app, ["index", str(folder / "table")]).exit_code == 0
    hits = SearchIndex.open(folder / "table" / "index").search(table.fields["text"][:2], "text", k=1)
    assert [hit[0].key for hit in hits] == ["000000000", "000000001"]


def test_columns_of_parquet_with_vectors_that_are_absent(tmp_path):
    images, texts = unit(5).astype(np.float32), unit(5).astype(np.float32)
    images[3] = 0
    lists = [None if number < 2 else row for number, row in enumerate(texts.tolist())]
    ids = ["a", "b", "c", "d", "e"]
    pq.write_table(
        pa.table({"sample_id": ids, "embedding": pa.array(lists, pa.list_(pa.float32(), 8))}), tmp_path / "rows.parquet"
    )
    np.save(tmp_path / "image.npy", np.asfortranarray(images.astype(">f8")))
    files = {"image": f"{tmp_path}/image.npy", "text": f"{tmp_path}/rows.parquet:embedding"}
    assert write_vector_table(tmp_path / "table", files, f"{tmp_path}/rows.parquet") == 5
    table = EmbeddingTable.read(tmp_path / "table")
    assert table.present["image"].tolist() == [True, True, True, False, True]
    assert table.present["text"].tolist() == [False, False, True, True, True]
    torch.testing.assert_close(table.fields["text"][2:].numpy(), texts[2:], rtol=0, atol=1e-6)
    assert table.metadata[0] == {"sample_id": "a", "key": "0"} and len(table.sample_ids.unique()) == 5
    assert json.loads((tmp_path / "table/manifest.json").read_text())["vectors"] == files


def test_a_column_that_datasets_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = unit(6)
    datasets.Dataset.from_dict({"title": list("abcdef"), "vector": rows.tolist()}).to_parquet(str(tmp_path / "rows.parquet"))
    write_vector_table(tmp_path / "table", {"text": f"{tmp_path}/rows.parquet:vector"}, f"{tmp_path}/rows.parquet", key="title")
    table = EmbeddingTable.read(tmp_path / "table")
    torch.testing.assert_close(table.fields["text"].double().numpy(), rows, rtol=0, atol=1e-6)
    assert [entry["key"] for entry in table.metadata] == list("abcdef")


def test_ids_that_some_rows_lack_are_nobody_elses(tmp_path):
    """Rows without a group, or an id, among others: not the number of their row, which may be another's."""
    np.save(tmp_path / "x.npy", unit(6))
    frame = pd.DataFrame(
        {"sample_id": ["7", None, "2", "3", None, "5"], "g": [3, None, None, None, 1, 1], "n": [10, 2, None, 4, 5, 6]}
    )
    for number, rows in enumerate((slice(0, 3), slice(3, 6))):
        frame[rows].to_parquet(tmp_path / f"m{number}.parquet")
    write_vector_table(tmp_path / "t", {"x": f"{tmp_path}/x.npy"}, f"{tmp_path}/m*.parquet", key="n", group="g")
    table = EmbeddingTable.read(tmp_path / "t")
    assert table.group_ids[4] == table.group_ids[5] == 1 and table.group_ids[0] == 3 and len(table.group_ids.unique()) == 5
    assert table.sample_ids[[0, 2, 3, 5]].tolist() == [7, 2, 3, 5] and len(table.sample_ids.unique()) == 6
    assert [entry["key"] for entry in table.metadata] == ["10", "2", "2", "4", "5", "6"]


def test_metadata_of_every_kind(tmp_path):
    """Times and decimals are texts, as in any table of ours; bytes name nothing."""
    np.save(tmp_path / "x.npy", unit(2))
    columns = {
        "day": pd.to_datetime(["2026-11-27", "2026-11-28"]),
        "price": [Decimal("1.5"), None],
        "uuid": [b"a" * 16, b"b" * 16],
        "nested": [{"a": 1, "b": datetime.date(2026, 1, 1)}, None],
        "many": [list(range(100)), list(range(100))],
    }
    pd.DataFrame(columns).to_parquet(tmp_path / "m.parquet")
    metadata = f"{tmp_path}/m.parquet"
    write_vector_table(tmp_path / "t", {"x": f"{tmp_path}/x.npy"}, metadata, group="day")
    entry = EmbeddingTable.read(tmp_path / "t").metadata[0]
    assert (
        entry["day"].startswith("2026-11-27") and entry["nested"]["b"] == "2026-01-01" and not {"uuid", "many"} & entry.keys()
    )
    for options in ({"key": "uuid"}, {"group": "uuid"}, {"group": "many"}):
        with pytest.raises(UserError, match=r"a column of numbers or texts, which in .*m\.parquet holds"):
            write_vector_table(tmp_path / "u", {"x": f"{tmp_path}/x.npy"}, metadata, **options)


def test_files_that_do_not_go_together(tmp_path):
    for name in ("img_0", "img_2", "txt_0", "txt_1"):
        np.save(tmp_path / f"{name}.npy", unit(4))
    with pytest.raises(UserError, match=r"img_2\.npy of image would go with .*txt_1\.npy of text"):
        write_vector_table(tmp_path / "t", {"image": f"{tmp_path}/img_*.npy", "text": f"{tmp_path}/txt_*.npy"})


def test_files_of_others_are_never_replaced(tmp_path):
    frame = pd.DataFrame({"text": list("abcd"), "v": unit(4).tolist()})
    frame.to_parquet(tmp_path / "part-00000.parquet")
    before = (tmp_path / "part-00000.parquet").read_bytes()
    with pytest.raises(UserError, match=r"part-00000\.parquet is of something else, and a table would replace it"):
        write_vector_table(tmp_path, {"text": f"{tmp_path}/part-00000.parquet:v"})
    assert (tmp_path / "part-00000.parquet").read_bytes() == before
    write_vector_table(tmp_path / "t", {"text": f"{tmp_path}/part-00000.parquet:v"})
    (tmp_path / "t" / "manifest.json").unlink()  # as if it had been interrupted
    assert write_vector_table(tmp_path / "t", {"text": f"{tmp_path}/part-00000.parquet:v"}) == 4
    with pytest.raises(UserError, match="/proc/x: no folder for a table"):
        write_vector_table(Path("/proc/x"), {"text": f"{tmp_path}/part-00000.parquet:v"})


def test_rows_without_ids_are_no_samples_ids(tmp_path):
    """A selection by the numbers of rows is refused where samples have ids of their own, which may be the same numbers."""
    rows = unit(8)
    rows[1], rows[3] = rows[0], rows[2]
    np.save(tmp_path / "x.npy", rows)
    pd.DataFrame({"sample_id": range(7, -1, -1), "text": list("abcdefgh")}).to_csv(tmp_path / "own.csv", index=False)
    pd.DataFrame({"text": list("abcdefgh")}).to_csv(tmp_path / "rows.csv", index=False)
    for metadata, table in ((None, "numbers"), (f"{tmp_path}/own.csv", "own")):
        write_vector_table(tmp_path / table, {"text": f"{tmp_path}/x.npy"}, metadata)
        arguments = ["data", "dedup-near", str(tmp_path / table), str(tmp_path / f"{table}.parquet"), "--field", "text"]
        assert (done := CliRunner().invoke(app, arguments)).exit_code == 0, done.output
    with pytest.raises(UserError, match="made of vectors that are known by the numbers of their rows"):
        write_selected(str(tmp_path / "own.csv"), tmp_path / "new", str(tmp_path / "numbers.parquet"), workers=1)
    write_selected(str(tmp_path / "own.csv"), tmp_path / "new", str(tmp_path / "own.parquet"), workers=1)
    (shard,) = open_shards(str(tmp_path / "new" / "*.tar"))
    kept = {json.loads(shard.read(row, ["json"])["json"])["sample_id"] for row in range(len(shard))}
    assert len(kept) == 6 and len(kept & {7, 6}) == len(kept & {5, 4}) == 1  # of each two equal rows one


def test_vectors_of_any_length_are_asked_for(tmp_path):
    rows = unit(4)
    np.save(tmp_path / "x.npy", 3 * rows)
    with pytest.raises(UserError, match=r"x\.npy, row 0: the vector has not length 1: .* --normalize \(length 3; 4 are so\)"):
        write_vector_table(tmp_path / "table", {"x": f"{tmp_path}/x.npy"})
    write_vector_table(tmp_path / "table", {"x": f"{tmp_path}/x.npy"}, model=("ViT-B-32", "laion2b"), normalize=True)
    manifest = json.loads((tmp_path / "table/manifest.json").read_text())
    assert (manifest["model"], manifest["pretrained"]) == ("ViT-B-32", "laion2b")  # as `load` takes them, for queries
    torch.testing.assert_close(EmbeddingTable.read(tmp_path / "table").fields["x"].double().numpy(), rows, rtol=0, atol=1e-6)
    for scale in (1e-300, 1e-30, 1e200):
        np.save(tmp_path / "y.npy", scale * rows)
        write_vector_table(tmp_path / f"{scale}", {"x": f"{tmp_path}/y.npy"}, normalize=True)
        torch.testing.assert_close(
            EmbeddingTable.read(tmp_path / f"{scale}").fields["x"].double().numpy(), rows, rtol=0, atol=1e-6
        )
    with pytest.raises(UserError, match="already holds an embedding table"):
        write_vector_table(tmp_path / "table", {"x": f"{tmp_path}/x.npy"})


def test_mistakes(tmp_path):
    def write(**files):
        options = {name: files.pop(name) for name in ("metadata", "key", "group") if name in files}
        return write_vector_table(tmp_path / "out", {field: f"{tmp_path}/{name}" for field, name in files.items()}, **options)

    bad = unit(5)
    bad[3, 2] = np.nan
    for name, array in {
        "ok": unit(5), "short": unit(4), "narrow": unit(5, 6), "nan": bad, "flat": np.ones(5), "ints": np.ones((5, 8), np.int8),
        "objects": np.array([[{}]], dtype=object), "none": np.ones((0, 8)), "w-0": unit(2, 8), "w-1": unit(3, 6),
    }.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "torn.npy").write_bytes((tmp_path / "ok.npy").read_bytes()[:100])
    np.savez(tmp_path / "archive.npz", unit(5))
    pd.DataFrame(
        {"sample_id": [1, 2, 3, 2, 5], "name": list("abcde"), "v": [[1.0], [1.0, 2.0], [1.0], [1.0], [1.0]]}
    ).to_parquet(tmp_path / "rows.parquet")
    rows = f"{tmp_path}/rows.parquet"
    for files, message in (
        ({"a": "ok.npy", "b": "short.npy"}, r"their numbers of rows differ or are 0: a has 5, b has 4"),
        ({"a": "none.npy"}, "a has 0"),
        ({"a": "ok.npy", "b": "narrow.npy"}, r"field 'b': embeddings \[5, 6\]"),
        ({"a": "nan.npy"}, r"nan\.npy, row 3: the vector is not finite"),
        ({"a": "flat.npy"}, r"flat\.npy: float64 \[5\], where vectors are"),
        ({"a": "ints.npy"}, r"ints\.npy: int8 \[5, 8\], where vectors are"),
        ({"a": "objects.npy"}, r"objects\.npy: not an \.npy file of numbers"),
        ({"a": "torn.npy"}, r"torn\.npy: not an \.npy file of numbers"),
        ({"a": "archive.npz"}, "an archive of several arrays"),
        ({"a": "w-*.npy"}, r"w-1\.npy: vectors of 6 numbers, where others have 8"),
        ({"a": "nothing-*.npy"}, "no shard at"),
        ({"a": "rows.parquet"}, r"name the column of the vectors, as .*rows\.parquet:embedding"),
        ({"a": "rows.parquet:w"}, "rows.parquet has no column 'w'"),
        ({"a": "rows.parquet:name"}, "column 'name' holds .*string, where vectors are lists"),
        ({"a": "rows.parquet:v"}, "has vectors of 1 to 2 numbers, not 1"),
        ({"a": "ok.npy", "metadata": rows}, "rows 1 and 3 have one sample_id"),
        (
            {"a": "ok.npy", "metadata": rows, "key": "title"},
            "--key title: a column of numbers or texts, which in .*rows.parquet is not there",
        ),
        ({"a": "ok.npy", "group": "name"}, "name its files with --metadata"),
    ):
        with pytest.raises(UserError, match=message):
            write(**files)
        assert not (tmp_path / "out" / "manifest.json").exists()
    for arguments in (["image"], ["image=", "text=x"], ["image=a", "image=b"]):
        done = CliRunner().invoke(app, ["data", "table", str(tmp_path / "out"), *arguments])
        assert done.exit_code == 2 and "not of the form FIELD=FILES" in done.output
