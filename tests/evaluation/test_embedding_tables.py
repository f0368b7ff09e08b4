"""Embedding tables in memory and on disk."""

import os
from dataclasses import replace

import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmcontrast.data import ShardDataset
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.cache import table_folder
from mmcontrast.evaluation.repeats import repeats_note
from mmcontrast.modalities import ImageModality
from mmcontrast.search.table import StoredTable


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr("mmcontrast.evaluation.embed.PART_ROWS", 2)
    table = EmbeddingTable(
        {"image": F.normalize(torch.randn(5, 4))}, {"image": torch.rand(5) < 0.5},
        torch.arange(5), torch.tensor([0, 0, 1, 1, 2**40]),
        [{"key": f"k{k}", "name": "é"} for k in range(5)],
    )  # fmt: skip
    table.write(tmp_path / "t")
    again = EmbeddingTable.read(tmp_path / "t")
    assert torch.equal(again.fields["image"], table.fields["image"])
    assert torch.equal(again.present["image"], table.present["image"])
    assert torch.equal(again.group_ids, table.group_ids) and again.metadata == table.metadata
    assert len(list((tmp_path / "t").glob("*.parquet"))) == 3


def test_rows_that_are_no_unit_vectors_are_refused_when_written_and_when_read(tmp_path):
    """Also by what reads a table block by block. Two fields may share a mask; float16 is stored as the manifest says."""
    present, ids = torch.tensor([True, True, False]), torch.arange(3)
    unit = F.normalize(torch.randn(3, 4)) * present[:, None]
    table = EmbeddingTable(
        {"a": unit.half(), "b": unit}, {"a": present, "b": present}, ids, ids, [{"key": f"k{k}"} for k in ids]
    )
    table.write(str(tmp_path / "right"))
    assert EmbeddingTable.read(str(tmp_path / "right")).fields["a"].dtype == torch.float32
    assert (tmp_path / "right" / "part-00000.safetensors").stat().st_mode == (
        tmp_path / "right" / "manifest.json"
    ).stat().st_mode
    for rows, message in (
        (3 * unit, r"field 'b', row 0, sample 'k0' .*length is 3, not 1 \(2 of 2 are so\): normalize"),
        (unit * torch.tensor([[1.0], [0.0], [0.0]]), "row 1, .*length is 0, not 1"),
        (unit[:, :3], r"field 'b': embeddings \[3, 3\] .* of 4 numbers"),
        (unit[:2], r"field 'b': embeddings \[2, 4\] .* there are 3 samples"),
    ):
        with pytest.raises(UserError, match=message):
            replace(table, fields={"a": unit, "b": rows}).write(tmp_path / "wrong")
    replace(table, curvature=1.0, fields={"a": 3 * unit}, present={"a": present}).write(tmp_path / "hyperbolic")
    assert len(EmbeddingTable.read(tmp_path / "hyperbolic")) == 3
    manifest = tmp_path / "hyperbolic" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"curvature": 1.0', '"other": 1'))
    with pytest.raises(UserError, match="length is 3, not 1"):
        EmbeddingTable.read(tmp_path / "hyperbolic")
    with pytest.raises(UserError, match="length is 3, not 1"):
        list(StoredTable(tmp_path / "hyperbolic").blocks("a"))


def test_embeddings_are_kept_for_the_files_that_a_table_names_as_they_are(tmp_path):
    """A picture that is replaced under its name is embedded again, though the table did not change."""
    for name in "ab":
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    pandas.DataFrame({"path": ["a.png", "b.png", None], "title": "abc"}).to_csv(tmp_path / "x.csv", index=False)

    def folder():
        dataset = ShardDataset(str(tmp_path / "x.csv"), {"image": ImageModality(size=8)}, {"image": ["path"]})
        return table_folder("model", dataset, tmp_path)

    first = folder()
    assert folder() == first
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    os.utime(tmp_path / "b.png", ns=(10**18, 10**18))
    second = folder()
    assert second != first
    (tmp_path / "b.png").unlink()
    assert folder() not in (first, second)


def test_pictures_that_rows_of_several_groups_share_are_noted():
    """Five captions of a picture in a CSV without group_id: each copy is a wrong answer for the others."""
    rows = F.normalize(torch.randn(4, 8))[torch.tensor([0, 0, 1, 1, 2, 3])]
    present, ids = torch.tensor([True] * 5 + [False]), torch.arange(6)
    table = EmbeddingTable({"image": rows}, {"image": present}, ids, ids, [{"key": ""}] * 6)
    assert repeats_note(table, "val", "image") == (
        "val: 4 of 5 samples have the image of a sample of another group, and each counts as a wrong answer for the others:"
        " give rows about one thing one group_id"
    )
    grouped = replace(table, group_ids=torch.tensor([0, 0, 1, 1, 2, 3]))
    assert repeats_note(grouped, "val", "image") is None
    partly = replace(table, group_ids=torch.tensor([0, 0, 1, 7, 2, 3]))
    assert repeats_note(partly, "val", "image").startswith("val: 2 of 5 ")
