"""Embedding tables of vectors from elsewhere: .npy and Parquet as numpy, pandas and datasets write them."""

import json

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


def test_vectors_of_any_length_are_asked_for(tmp_path):
    rows = unit(4)
    np.save(tmp_path / "x.npy", 3 * rows)
    with pytest.raises(UserError, match=r"x\.npy, row 0: the vector has not length 1: .* --normalize \(length 3; 4 are so\)"):
        write_vector_table(tmp_path / "table", {"x": f"{tmp_path}/x.npy"})
    write_vector_table(tmp_path / "table", {"x": f"{tmp_path}/x.npy"}, model=("ViT-B-32", "laion2b"), normalize=True)
    manifest = json.loads((tmp_path / "table/manifest.json").read_text())
    assert (manifest["model"], manifest["pretrained"]) == ("ViT-B-32", "laion2b")  # as `load` takes them, for queries
    torch.testing.assert_close(EmbeddingTable.read(tmp_path / "table").fields["x"].double().numpy(), rows, rtol=0, atol=1e-6)
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
        ({"a": "rows.parquet:w"}, "w: .*rows.parquet has no such column"),
        ({"a": "rows.parquet:name"}, "column 'name' holds .*string, where vectors are lists"),
        ({"a": "rows.parquet:v"}, "vectors of 1 and of 2 numbers"),
        ({"a": "ok.npy", "metadata": rows}, "rows 1 and 3 have one sample_id"),
        ({"a": "ok.npy", "metadata": rows, "key": "title"}, "--key title: .*rows.parquet has no such column"),
        ({"a": "ok.npy", "group": "name"}, "name its files with --metadata"),
    ):
        with pytest.raises(UserError, match=message):
            write(**files)
        assert not (tmp_path / "out" / "manifest.json").exists()
    for arguments in (["image"], ["image=", "text=x"], ["image=a", "image=b"]):
        done = CliRunner().invoke(app, ["data", "table", str(tmp_path / "out"), *arguments])
        assert done.exit_code == 2 and "not of the form FIELD=FILES" in done.output
