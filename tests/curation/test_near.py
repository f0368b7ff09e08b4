"""Near duplicates against a dense float64 SemDeDup, and planted ones among real pictures."""

import io
import json
from contextlib import suppress

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from mmcontrast.curation import kmeans, near
from mmcontrast.curation.blocks import Blocks
from mmcontrast.curation.cluster import cluster as cluster_table
from mmcontrast.curation.near import drop_near_duplicates, nearest_before
from mmcontrast.errors import UserError
from mmcontrast.evaluation import embed
from mmcontrast.search import table as stored
from tests.command import mmcontrast
from tests.curation.pairs import bytes_of
from tests.curation.tables import write_table

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dropped(folder, **options):
    out = folder / "near.parquet"
    out.unlink(missing_ok=True)
    summary = drop_near_duplicates(folder / "table", out, "a", progress=False, **options)
    return pq.read_table(out).to_pylist(), summary


def dense(x, order):
    """The largest similarity of each with those before it in the order, float64; −inf of the first."""
    scores = x[order].double() @ x[order].double().T
    scores[torch.ones_like(scores, dtype=torch.bool).tril()] = -torch.inf
    largest = torch.empty(len(x), dtype=torch.float64)
    largest[order] = scores.max(0).values
    return largest


@FAST
@given(n=st.integers(1, 40), tile=st.integers(1, 17), seed=st.integers(0, 2**31))
def test_a_running_maximum_is_that_of_the_whole(n, tile, seed, monkeypatch):
    monkeypatch.setattr(near, "TILE", tile)
    vectors = np.random.default_rng(seed).integers(-2, 3, (50, 3)).astype(np.float32)  # exact products, many of them equal
    rows = np.random.default_rng(seed).permutation(50)[:n]
    earlier, similarity = nearest_before(lambda some: vectors[some], rows)
    scores = (vectors[rows] @ vectors[rows].T).astype(np.float64)
    assert earlier[0] == -1 and np.isnan(similarity[0])
    for k in range(1, n):
        assert similarity[k] == scores[:k, k].max() == vectors[earlier[k]] @ vectors[rows[k]]
        assert earlier[k] in rows[:k]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """600 samples in parts, blocks and tiles; of pairs some are alike; some lack the field."""
    monkeypatch.setattr(embed, "PART_ROWS", 256)
    monkeypatch.setattr(stored, "BLOCK_ROWS", 100)
    monkeypatch.setattr(near, "TILE", 64)
    monkeypatch.setattr(near, "MAPPED", 10_000)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(600, 12, generator=generator)
    a[300:500] = a[:200] + torch.linspace(0.01, 0.8, 200)[:, None] * torch.randn(200, 12, generator=generator)
    a = F.normalize(a)
    a[550:] = 0
    return write_table(tmp_path / "table", {"a": a}, score=[float(k * 37 % 600) if k % 11 else None for k in range(600)])


def test_it_is_the_papers(table, tmp_path):
    """One cluster: the farthest from the mean's direction first. Several: by a column, which needs no centroid."""
    x = table.fields["a"][:550]
    rows, summary = dropped(tmp_path, clusters=1, epsilon=0.1)
    order = (x.double() @ F.normalize(x.double().mean(0), dim=0)).argsort()
    want = dense(x, order)
    sure = (want - 0.9).abs() > 1e-6
    for k, row in enumerate(rows[:550]):
        assert not sure[k] or row["keep"] == bool(want[k] <= 0.9)
        assert (row["reason"], row["duplicate_of"] is None) == ((None, True) if row["keep"] else ("near duplicate", False))
        assert row["similarity"] == (None if want[k] == -torch.inf else pytest.approx(want[k].item(), abs=1e-5))
        if not row["keep"]:
            assert float(x[row["duplicate_of"] - 1000] @ x[k]) == pytest.approx(row["similarity"], abs=1e-5)
    assert all(row["keep"] and row["similarity"] is None and row["cluster"] is None for row in rows[550:])
    assert summary["without_field"] == 50 and 40 < summary["dropped"] == sum(not row["keep"] for row in rows)
    assert summary["dropped_at_epsilon"]["0.1"] == summary["dropped"]

    rows, summary = dropped(tmp_path, clusters=5, epsilon=0.1, best="score")
    numbers = np.array([row["cluster"] for row in rows[:550]])
    score = np.array([-np.inf if k % 11 == 0 else float(k * 37 % 600) for k in range(550)])
    for cluster in range(5):
        here = np.flatnonzero((numbers == cluster) & (score > -np.inf))
        found = dense(x, torch.from_numpy(here[np.argsort(-score[here])]))
        for k in here:
            assert abs(found[k] - 0.9) < 1e-6 or rows[k]["keep"] == bool(found[k] <= 0.9)
    assert all(row["keep"] or numbers[row["duplicate_of"] - 1000] == row["cluster"] for row in rows[:550])


def test_numbers_may_be_texts(tmp_path):
    """As `data filter` reads them; what is none, a truth value too, comes last."""
    write_table(tmp_path / "table", {"a": F.normalize(torch.ones(4, 12))}, width=[True, 5, "900", "wide"])
    rows, _ = dropped(tmp_path, clusters=1, epsilon=0.1, best="width")
    assert [row["keep"] for row in rows] == [False, False, True, False]


def test_the_same_bytes_with_one_thread_and_with_two(table, tmp_path):
    files = []
    for threads in (1, 2, 2):
        faiss.omp_set_num_threads(threads)
        torch.set_num_threads(threads)
        dropped(tmp_path, clusters=7, seed=3)
        files.append((tmp_path / "near.parquet").read_bytes())
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    assert files[0] == files[1] == files[2]


def test_runs_that_were_killed_go_on(table, tmp_path, monkeypatch):
    """Ended at each block in turn and begun again: nothing is learnt, assigned or compared twice, with the same files."""
    monkeypatch.setattr(near, "KEPT", 100)
    source, done = tmp_path / "table", []
    stages = {
        "near": lambda out, epsilon=0.1: drop_near_duplicates(source, out, "a", epsilon, clusters=7, progress=False),
        "cluster": lambda out: cluster_table(source, out, "a", 7, progress=False),
    }
    learn, write = kmeans._learn, Blocks.write

    class Killed(BaseException):
        pass

    def killed(blocks, kind, number, *blocks_done):
        write(blocks, kind, number, *blocks_done)
        done.append((kind, number))
        raise Killed

    for name, stage in stages.items():
        stage(tmp_path / "whole" / name / "o.parquet")
        done.clear()
        monkeypatch.setattr(Blocks, "write", killed)
        monkeypatch.setattr(kmeans, "_learn", lambda *given: done.append("learnt") or learn(*given))
        while not (tmp_path / "killed" / name / "o.parquet").exists():
            with suppress(Killed):
                stage(tmp_path / "killed" / name / "o.parquet")
        monkeypatch.setattr(Blocks, "write", write)
        assert len(done) == len({*done}) >= 7 and done[0] == "learnt"
        assert {kind for kind, _ in done[1:]} == ({"assigned", "compared"} if name == "near" else {"assigned"})
        assert bytes_of(tmp_path / "killed" / name) == bytes_of(tmp_path / "whole" / name)
        assert len(bytes_of(tmp_path / "whole" / name)) == 3
    monkeypatch.setattr(Blocks, "write", killed)
    with pytest.raises(Killed):  # ε is of what comes after
        stages["near"](tmp_path / "o.parquet")
    monkeypatch.setattr(Blocks, "write", write)
    with pytest.raises(UserError, match="unfinished run wrote, of another options"):
        drop_near_duplicates(source, tmp_path / "o.parquet", "a", clusters=6, progress=False)
    stages["near"](tmp_path / "o.parquet", 0.2)
    stages["near"](tmp_path / "at-once.parquet", 0.2)
    assert (tmp_path / "o.parquet").read_bytes() == (tmp_path / "at-once.parquet").read_bytes()


def pictures():
    """Real ones: what lies in tiles of two photographs, of those in which something is to be seen."""
    for photograph in load_sample_images().images:
        for top in range(0, photograph.shape[0] - 63, 64):
            for left in range(0, photograph.shape[1] - 63, 64):
                part = Image.fromarray(photograph[top : top + 64, left : left + 64])
                if np.asarray(part.convert("L")).std() > 12:
                    yield part


def recompressed(picture):
    target = io.BytesIO()
    picture.save(target, "JPEG", quality=35)
    return Image.open(target)


def pixels(picture):
    small = np.asarray(picture.convert("RGB").resize((5, 5), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(small - small.mean((0, 1))).flatten()


def test_planted_near_duplicates_of_real_pictures(tmp_path):
    """Recompressed, resized, and cropped by 5 %, by an embedding of their pixels."""
    whole = [*pictures()]
    changes = [recompressed, lambda p: p.resize((37, 37)), lambda p: p.crop((2, 1, 63, 62))]
    planted = [change(picture) for change in changes for picture in whole]
    rows = F.normalize(torch.stack([pixels(picture) for picture in (*whole, *planted)]))
    write_table(tmp_path / "table", {"a": rows}, worth=[1.0] * len(whole) + [0.0] * len(planted))
    found, _ = dropped(tmp_path, epsilon=0.05, best="worth")
    is_dropped = np.array([not row["keep"] for row in found])
    recall, precision = is_dropped[len(whole) :].mean(), is_dropped[len(whole) :].sum() / is_dropped.sum()
    assert len(whole) > 60 and recall >= 0.99 and precision >= 0.95, (len(whole), recall, precision)


def test_the_command(table, tmp_path):
    out = tmp_path / "n.parquet"
    done = mmcontrast("data", "dedup-near", tmp_path / "table", out, "--field", "a", "--epsilon", 0.1)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "n.summary.json").read_text())
    output = " ".join(done.stderr.split())
    assert f"{summary['kept']:,} of 600 samples are kept" in output and "50 samples lack the field 'a' and are kept" in output
    assert json.loads(pq.read_metadata(out).metadata[b"mmcontrast"]) == summary and summary["options"]["clusters"] == 1
    assert "dropped, 0.9" in (tmp_path / "n.report.html").read_text()


def test_mistakes_are_named(table, tmp_path):
    for options, message in (
        ({"epsilon": 0.0}, "--epsilon 0.0"),
        ({"clusters": 551}, "--clusters 551: 550 rows of"),
        ({"best": "width"}, "--best width: no sample of"),
    ):
        with pytest.raises(UserError, match=message):
            dropped(tmp_path, **options)
        assert not [*tmp_path.glob("*.parquet"), *tmp_path.glob(".*.partial")]
