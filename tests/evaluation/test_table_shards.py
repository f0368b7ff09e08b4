"""A table that several processes write, slice by slice."""

import itertools
import json
import threading

import pytest
import torch

from mmcontrast.config import load_config
from mmcontrast.embedding_job import embed_shards
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, TableSlice
from mmcontrast.models import make_model
from mmcontrast.run_folder import prepare_folder
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents


def a_table(rows: range) -> EmbeddingTable:
    ids = torch.arange(rows.start, rows.stop)
    vectors = {"image": torch.nn.functional.normalize(1 + ids[:, None] + torch.arange(4.0))}
    return EmbeddingTable(vectors, {"image": ids % 3 > 0}, ids, ids // 2, [{"key": f"k{k}"} for k in rows])


@pytest.mark.parametrize("order", itertools.permutations((1, 2, 3)))
def test_in_any_order_the_last_slice_completes_the_table(tmp_path, monkeypatch, order):
    monkeypatch.setattr("mmcontrast.evaluation.embed.PART_ROWS", 3)
    for count, number in enumerate(order, 1):
        part = TableSlice.parse(tmp_path / "t", f"{number}/3")
        assert not part.done({"run": "a"})
        part.write([a_table(part.rows(11))], 11, {"run": "a"})
        assert part.done({"run": "a"}) and part.complete() == (count == 3)
        assert (tmp_path / "t" / "manifest.json").exists() == (count == 3)
    a_table(range(11)).write(tmp_path / "whole")
    table, whole = EmbeddingTable.read(tmp_path / "t"), EmbeddingTable.read(tmp_path / "whole")
    assert torch.equal(table.fields["image"], whole.fields["image"]) and table.metadata == whole.metadata
    assert torch.equal(table.present["image"], whole.present["image"])
    assert torch.equal(table.sample_ids, whole.sample_ids) and torch.equal(table.group_ids, whole.group_ids)
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert [(part["name"], part["rows"]) for part in manifest["parts"]] == [
        ("part-00000", 3), ("part-00001", 3), ("part-00002", 1), ("part-00003", 3), ("part-00004", 1),
    ] and manifest["rows"] == 11  # fmt: skip
    assert {path.suffix for path in (tmp_path / "t").iterdir()} == {".json", ".safetensors", ".parquet"}


def test_many_at_once(tmp_path):
    def one(number):
        part = TableSlice(tmp_path, number, 16)
        part.write([a_table(part.rows(50))], 50, {})
        done.append(part.complete())

    done: list[bool] = []
    threads = [threading.Thread(target=one, args=[number]) for number in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(done) and len(done) == 16
    assert EmbeddingTable.read(tmp_path).metadata == [{"key": f"k{k}"} for k in range(50)]


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "-1/3", "a/b"])
def test_slices_that_are_none(tmp_path, text):
    with pytest.raises(UserError, match="not of the form I/N"):
        TableSlice.parse(tmp_path, text)


def test_a_slice_is_embedded_once_and_never_mixed_with_another_table(config_file, corpus, tmp_path, monkeypatch):
    config, out = load_config(config_file), tmp_path / "t"
    prepare_folder(config, overwrite=False)
    model, folder = make_model(config.fields, config.towers, config.model, 0), config.folder / "checkpoints"
    checkpoint.save(folder, 6, Contents(model.state_dict(), {}, {}, config.to_yaml()))
    shards = str(corpus / "val-*.tar")

    def embed(text, shards=shards, which="last"):
        part = TableSlice.parse(out, text)
        return embed_shards(config.folder, shards, out, part=part, checkpoint=which, device="cpu", batch_size=7)

    assert not embed("2/2")
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not embed("2/2", which="6") and written == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match="slices: 2 there, 3 here"):
        embed("1/3")
    with pytest.raises(UserError, match="shards: '.*' there"):
        embed("1/2", shards=str(corpus / "train-*.tar"))
    assert embed("1/2")
    assert embed_shards(config.folder, shards, tmp_path / "whole", device="cpu", batch_size=24)
    table, whole = EmbeddingTable.read(out), EmbeddingTable.read(tmp_path / "whole")
    assert table.metadata == whole.metadata and len(table) == 24
    for field, embeddings in whole.fields.items():
        torch.testing.assert_close(table.fields[field], embeddings)
    (out / "manifest.json").unlink()
    monkeypatch.setattr("mmcontrast.embedding_job.load", lambda *_: pytest.fail("it is done"))
    assert embed("1/2") and EmbeddingTable.read(out).metadata == whole.metadata  # as if nobody had seen all slices
    with pytest.raises(UserError, match="already holds an embedding table"):
        embed_shards(config.folder, shards, tmp_path / "whole", part=TableSlice(tmp_path / "whole", 1, 2), device="cpu")
    with pytest.raises(UserError, match="24 samples cannot make 25 slices"):
        TableSlice(out, 3, 25).rows(24)
