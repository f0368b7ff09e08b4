"""Samples of a table that are known by their rows: what names them is refused once the table has changed."""

import pandas as pd
import pytest
import torch
from PIL import Image

from mmcontrast.curation.cluster import cluster
from mmcontrast.curation.mine import MiningOptions, mine
from mmcontrast.curation.score import ScoreOptions, score
from mmcontrast.data import open_dataset
from mmcontrast.data.clusters import clusters_of
from mmcontrast.data.negatives import open_negatives
from mmcontrast.embedding_job import embed_shards
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality
from tests.models.transformers_models import clip, saved


def test_rows_that_may_be_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))
    table = tmp_path / "pairs.csv"
    for k in range(12):
        Image.effect_noise((20, 20), 90.0).convert("RGB").save(tmp_path / f"{k}.png")
    frame = pd.DataFrame({"image": [f"{k}.png" for k in range(12)], "text": [f"number {k}" for k in range(12)]})
    frame.to_csv(table, index=False)
    modality = TextModality()
    torch.manual_seed(0)
    embed_shards(str(saved(clip(), tmp_path / "model")), str(table), tmp_path / "table", device="cpu")
    score(tmp_path / "table", tmp_path / "scored.parquet", ScoreOptions("image", "text", top=0.5))
    mine(tmp_path / "table", tmp_path / "mined.parquet", MiningOptions("image", "text", count=2))
    cluster(tmp_path / "table", tmp_path / "clusters.parquet", "text", 2)

    def opened(**options):
        return open_dataset({"shards": str(table), **options}, {"text": modality}, {}, training=True)

    def uses():
        yield lambda: opened(select=str(tmp_path / "scored.parquet"))
        yield lambda: open_negatives(opened(), str(tmp_path / "mined.parquet"), "text", ["n"], 0, "skip")
        yield lambda: clusters_of(opened(), str(tmp_path / "clusters.parquet"))

    for use in uses():
        use()
    frame[1:].to_csv(table, index=False)
    for use in uses():
        with pytest.raises(UserError, match="was made of pairs.csv as it was before: its samples have no sample_id"):
            use()
