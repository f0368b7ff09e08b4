"""Scores of samples against their definition in float64, and the selections that they make."""

import json
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from mmcontrast.cli import app
from mmcontrast.data import write_shard
from mmcontrast.data.dataset import ShardDataset
from mmcontrast.modalities import TextModality
from tests.curation.tables import write_table


@pytest.fixture
def made(tmp_path):
    image, text = (F.normalize(torch.randn(500, 12), dim=1) for _ in "12")
    image[3], text[3:5] = 0, 0  # absent
    return write_table(tmp_path / "table", {"image": image, "text": text}), tmp_path


def run(folder, name, *options):
    return CliRunner().invoke(
        app, ["data", "score", str(folder / "table"), str(folder / name), "--pair", "image", "text", *options]
    )


def test_scores_are_cosines_and_the_best_are_kept(made):
    table, folder = made
    cosines = (table.fields["image"].double() * table.fields["text"].double()).sum(1).numpy()
    there = np.arange(500)[[k not in (3, 4) for k in range(500)]]
    done = run(folder, "all.parquet")
    assert done.exit_code == 0, done.output
    rows = pandas.read_parquet(folder / "all.parquet")
    assert rows["sample_id"].tolist() == table.sample_ids.tolist() and rows["key"].tolist()[:2] == ["k0", "k1"]
    np.testing.assert_allclose(rows["score"].to_numpy()[there], cosines[there], atol=1e-7)
    assert rows["score"].isna().tolist() == [k in (3, 4) for k in range(500)] == (~rows["keep"]).tolist()
    assert rows["reason"][3] == "no image and no text" and rows["reason"][4] == "no text"

    assert run(folder, "top.parquet", "--top", "0.1").exit_code == 0
    rows = pandas.read_parquet(folder / "top.parquet")
    assert set(np.flatnonzero(rows["keep"])) == set(there[np.argsort(cosines[there])[-50:]])  # of all samples a tenth
    assert rows["reason"][~rows["keep"] & rows["score"].notna()].str.contains("the top 0.1").all()

    assert run(folder, "min.parquet", "--min", "0.2").exit_code == 0
    rows = pandas.read_parquet(folder / "min.parquet")
    assert set(np.flatnonzero(rows["keep"])) == set(there[rows["score"].to_numpy()[there] >= np.float32(0.2)])
    summary = json.loads((folder / "min.summary.json").read_text())
    assert summary["kept"] == rows["keep"].sum() and summary["without_score"] == 2
    assert "<svg" in (folder / "min.report.html").read_text()


def test_training_reads_what_scores_and_near_duplicates_keep(made):
    """The files of stages of tables are selections of the shards that the tables were made of."""
    _, folder = made
    samples = [{"__key__": f"k{row}", "txt": "a text", "json": {"sample_id": 1000 + row}} for row in range(500)]
    write_shard(folder / "0.tar", samples)
    assert run(folder, "top.parquet", "--top", "0.1").exit_code == 0
    arguments = [
        "data",
        "dedup-near",
        str(folder / "table"),
        str(folder / "near.parquet"),
        "--field",
        "image",
        "--epsilon",
        "0.5",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    for name in ("top", "near"):
        rows = pandas.read_parquet(folder / f"{name}.parquet")
        dataset = ShardDataset(str(folder / "0.tar"), {"text": TextModality()}, {}, select=str(folder / f"{name}.parquet"))
        kept = rows["sample_id"][rows["keep"]].tolist()
        assert 0 < len(kept) < 500 and dataset.sample_ids().tolist() == kept == [dataset.sample_id(k) for k in range(len(kept))]


def test_a_table_of_tangent_vectors_is_refused(tmp_path):
    rows = torch.randn(20, 4)
    table = write_table(tmp_path / "cosines", {"image": F.normalize(rows, dim=1), "text": F.normalize(rows, dim=1)})
    replace(table, curvature=1.0).write(tmp_path / "table")
    done = run(tmp_path, "out.parquet")
    assert done.exit_code == 2 and "is of a hyperbolic model" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min", "0.1", "--top", "0.1"], "say one of the two"), (["--top", "2"], "at most 1"), (["--min", "nan"], "finite"),
        (["--min", "1.5"], "no sample is kept: the largest score is"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_nothing_is_left(made, options, message):
    _, folder = made
    done = run(folder, "out.parquet", *options)
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert {path.name for path in folder.iterdir()} == {"table"}
