"""Clusters of a table whose clusters are known, and a config that draws batches of them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from mmcontrast.config import load_config
from mmcontrast.curation.cluster import cluster
from mmcontrast.data import ClusterOrder
from mmcontrast.errors import UserError
from mmcontrast.evaluation import embed
from mmcontrast.runs import make_run_context
from mmcontrast.search import table as stored
from tests.curation.tables import write_table
from tests.training.teaching import N, write_config, write_vectors


def test_clusters_that_are_there_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "PART_ROWS", 128)
    monkeypatch.setattr(stored, "BLOCK_ROWS", 50)
    random = np.random.default_rng(0)
    centres, labels = np.linalg.qr(random.normal(size=(8, 8)))[0], random.integers(0, 6, 300)
    a = F.normalize(torch.from_numpy(centres[labels] + 0.08 * random.normal(size=(300, 8))).float())
    a[280:] = 0
    write_table(tmp_path / "table", {"a": a})
    for seed in range(9):  # k-means may end where two of them are one
        (tmp_path / "c.parquet").unlink(missing_ok=True)
        summary = cluster(tmp_path / "table", tmp_path / "c.parquet", "a", 6, seed, progress=False)
        rows = pq.read_table(tmp_path / "c.parquet").to_pylist()
        if summary["mean_distance"] < 0.05:
            break
    assert [row["sample_id"] for row in rows] == [*range(1000, 1300)] and rows[7]["key"] == "k7"
    numbers = [row["cluster"] for row in rows[:280]]
    assert len({*zip(numbers, labels[:280].tolist(), strict=True)}) == 6 == len({*numbers}), "one number a cluster"
    assert all((row["cluster"], row["distance"]) == (-1, None) for row in rows[280:])
    for number in range(6):
        here = np.flatnonzero(np.array(numbers) == number)
        centroid = F.normalize(a[here].double().mean(0), dim=0)
        for k in here:
            assert rows[k]["distance"] == pytest.approx(1 - (a[k].double() @ centroid).item(), abs=1e-5)
    assert summary["without_field"] == 20 and summary["smallest"] == min(np.bincount(numbers))
    assert json.loads((tmp_path / "c.summary.json").read_text()) == summary and "k7" in (tmp_path / "c.report.html").read_text()
    with pytest.raises(UserError, match="--clusters 281: 280 rows of"):
        cluster(tmp_path / "table", tmp_path / "d.parquet", "a", 281, progress=False)


def test_training_draws_batches_of_them(tmp_path):
    """By sample_id, as several shards may have the same keys."""
    shards = write_vectors(tmp_path / "t.tar")
    rows = torch.eye(2)[torch.arange(N) % 2]
    write_table(tmp_path / "table", {"a": rows}, ids=torch.arange(N))
    cluster(tmp_path / "table", tmp_path / "c.parquet", "a", 2, progress=False)
    job = make_run_context(load_config(write_config(tmp_path, shards, data={"clusters": str(tmp_path / "c.parquet")})))
    assert isinstance(job.order, ClusterOrder)
    assert (job.order.clusters == job.order.clusters[np.arange(N) % 2]).all() and {*job.order.clusters} == {0, 1}
