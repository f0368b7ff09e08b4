"""Mined negatives: drawn and read by ids, the same for any ranks, workers and interruptions, and what the table lacks."""

import hashlib
import io
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmcontrast.data import (
    ClusterOrder,
    MixtureDataset,
    MixtureOrder,
    SampleOrder,
    ShardDataset,
    negatives,
    training_batches,
    write_shard,
)
from mmcontrast.data.negatives import COLUMNS, MinedNegatives, open_candidates, open_negatives
from mmcontrast.data.neighbours import by_position
from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality, TextModality

BATCH, N, BAD, WITHOUT = 12, 72, 5, 9  # samples; one whose picture cannot be decoded, one that has none
MODALITIES = {
    "image": ImageModality(8, augment=[{"type": "RandomCrop", "size": 8}]),
    "text": TextModality(context_length=8),
}


def picture(k):
    """Noise around a level, by which it is known again after augmentation."""
    target = io.BytesIO()
    noise = np.random.default_rng(k).integers(0, 8, (12, 14, 3))
    Image.fromarray((3 * k + noise).astype(np.uint8)).save(target, "PNG")
    return target.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Ids from 100 on, but for every sixth sample, which says none; pairs have one group."""
    folder = tmp_path_factory.mktemp("shards")
    for number, rows in enumerate(np.split(np.arange(N), (20, 33))):
        samples = []
        for k in rows.tolist():
            members = {"png": b"no picture" if k == BAD else picture(k), "txt": f"number {k}"}
            if k % 6:
                members["json"] = {"sample_id": 100 + k, "group_id": k // 2}
            if k == WITHOUT:
                del members["png"]
            samples.append({"__key__": f"k{k:02d}", **members})
        write_shard(folder / f"{number}.tar", samples)
    return str(folder / "*.tar")


@pytest.fixture(scope="module")
def candidates(shards):
    """By position: the next samples, 0 to 6 of them."""
    return {k: [(k + 1 + j) % N for j in range(k % 7)] for k in range(N)}


@pytest.fixture(scope="module")
def mined(shards, candidates, tmp_path_factory):
    """A table in another order than the samples', with a sample that has no row."""
    ids = [ShardDataset(shards, MODALITIES, {}).sample_id(k) for k in range(N)]
    order = np.random.default_rng(1).permutation([k for k in range(N) if k != 13])
    path = tmp_path_factory.mktemp("mined") / "mined.parquet"
    rows = {"sample_id": [ids[k] for k in order], "candidate_ids": [[ids[c] for c in candidates[k]] for k in order]}
    pq.write_table(pa.table(rows), path)
    return str(path)


def opened(shards, table, kind="plain", field="image", count=2):
    dataset = ShardDataset(shards, MODALITIES, {}, seed=4, training=True)
    sizes = tuple(map(len, dataset.shards))
    order = SampleOrder(sizes, BATCH, 4, 4, 5, 20, dataset.digest)
    if kind == "clusters":
        order = ClusterOrder(BATCH, 4, 4, dataset.digest, "", np.arange(N) * 7 % 3)
    if kind == "mixed":
        sources = {"x": ShardDataset(shards.replace("*", "[0]"), MODALITIES, {}, seed=4, training=True)}
        sources["y"] = ShardDataset(shards.replace("*", "[12]"), MODALITIES, {}, seed=4, training=True)
        orders = [SampleOrder(tuple(map(len, s.shards)), BATCH, 4, 4, 5, 20, s.digest) for s in sources.values()]
        dataset, order = MixtureDataset(sources, MODALITIES), MixtureOrder(tuple(orders), (0.3, 0.7))
    dataset.negatives = [open_negatives(dataset, table, field, [f"{field}.negative.{k}" for k in range(count)], 4)]
    return dataset, order


def batches(dataset, order, steps, world_size=1, num_workers=0):
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "num_workers": num_workers, "pin_memory": False}
        yield list(training_batches(dataset, order, steps, **options))


def seen(shards, table, steps, world_size, num_workers, kind="plain"):
    """(ids, which negatives are there, hash of their pixels, what was bad) of every step, of all ranks."""
    dataset, order = opened(shards, table, kind)
    for parts in zip(*batches(dataset, order, steps, world_size, num_workers), strict=True):
        names = ("image.negative.0", "image.negative.1")
        here = [[int(x) for part in parts for x in part.present[name]] for name in names]
        rows = [part.values[name][: int(part.present[name].sum())] for name in names for part in parts]
        pixels = hashlib.sha256(b"".join(row.numpy().tobytes() for row in rows)).hexdigest()
        yield [int(i) for p in parts for i in p.sample_ids], here, pixels, [bad["error"] for p in parts for bad in p.replaced]


def test_each_sample_has_those_of_its_row(shards, mined, candidates):
    """Known again by their pixels: none of another sample, of the same group, undecodable or without the field; nearly all
    of a row come in some epoch."""
    dataset, order = opened(shards, mined)
    positions = {dataset.sample_id(k): k for k in range(N)}
    groups = [k // 2 if k % 6 else dataset.sample_id(k) for k in range(N)]
    shown: dict[int, set[int]] = {}
    ((*found,),) = batches(dataset, order, range(9 * order.steps_per_epoch))
    assert found[0].encoded_as == {"image.negative.0": "image", "image.negative.1": "image"}
    for batch in found:
        for name in batch.encoded_as:
            rows = iter(batch.values[name])
            for sample_id, here in zip(batch.sample_ids.tolist(), batch.present[name].tolist(), strict=True):
                if here:
                    level = round((float(next(rows).float().mean()) - 3.5) / 3)
                    shown.setdefault(positions[sample_id], set()).add(level)
    total = missed = 0
    for k in range(N):
        lacking = {BAD, WITHOUT, *(c for c in candidates[k] if groups[c] == groups[k])}
        wanted = set(candidates[k]) - lacking if k not in (13, BAD) else set()
        assert shown.get(k, set()) <= wanted and (len(candidates[k]) > 2 or shown.get(k, set()) == wanted), k
        total, missed = total + len(wanted), missed + len(wanted - shown.get(k, set()))
    assert missed < 0.05 * total
    left_out = [bad["error"] for batch in found for bad in batch.replaced if "left out" in bad["error"]]
    assert left_out and all("k05" in error and "a negative of" in error for error in left_out)


@pytest.mark.parametrize("kind", ["plain", "mixed", "clusters"])
def test_interrupted_with_other_ranks_and_workers(shards, mined, kind):
    whole = list(seen(shards, mined, range(24), 1, 0, kind))
    assert all(0 < sum(here[1]) < BATCH for _, here, _, _ in whole)
    settings = itertools.cycle([(2, 2), (4, 0), (1, 3), (4, 2)])
    for (start, stop), (world_size, workers) in zip(itertools.pairwise([0, 4, 11, 19, 24]), settings, strict=False):
        assert list(seen(shards, mined, range(start, stop), world_size, workers, kind)) == whole[start:stop]


def test_parts_of_a_batch_keep_their_own(shards, mined):
    dataset, order = opened(shards, mined)
    ((batch,),) = batches(dataset, order, range(1))
    name = "image.negative.0"
    whole = iter(batch.values[name])
    row_of = {int(i): next(whole) for i, here in zip(batch.sample_ids, batch.present[name], strict=True) if here}
    for part in (*batch.split(5), *batch.deal(3)):
        assert part.encoded_as == batch.encoded_as
        rows = iter(part.values[name])
        for sample_id, here in zip(part.sample_ids.tolist(), part.present[name].tolist(), strict=True):
            assert here == (sample_id in row_of) and (not here or torch.equal(next(rows), row_of[sample_id]))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=12), count=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_draws(sizes, count, seed):
    """All of a short row, else `count` different ones, in the table's order; another choice in some epoch; negative ids too."""
    ids = np.sort(np.random.default_rng(seed).choice(np.arange(-50, 50), len(sizes), replace=False)) * 2**57
    starts = np.cumsum([0, *sizes])
    mined = MinedNegatives("f", tuple("abcd"[:count]), seed, "", ids, starts, np.arange(starts[-1]))
    for row, size in enumerate(sizes):
        drawn = [mined.draw(epoch, int(ids[row])) for epoch in range(30)]
        everything = list(range(starts[row], starts[row + 1]))
        for positions in drawn:
            assert (
                len(positions) == min(size, count) and positions == sorted(set(positions)) and set(positions) <= {*everything}
            )
        assert drawn == [mined.draw(epoch, int(ids[row])) for epoch in range(30)]
        assert size <= count or len({tuple(positions) for positions in drawn}) > 1
    assert mined.draw(0, 1) == []


class Known:
    shards = ()

    def __init__(self, ids):
        self.ids = np.array(ids, dtype=np.int64)

    def sample_ids(self):
        return self.ids


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_candidates_are_found_as_a_dictionary_finds_them(data, tmp_path, monkeypatch):
    """Candidates of any rows in any order, some of unknown samples, empty, null, in several files; by position too."""
    monkeypatch.setattr(negatives, "ROWS", data.draw(st.integers(1, 5)))
    monkeypatch.setattr(negatives, "LOOKED_UP", data.draw(st.integers(1, 5)))
    ids = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12, unique=True))
    some = st.sampled_from([*ids, *[i ^ 1 for i in ids]])
    rows = data.draw(st.dictionaries(some, st.none() | st.lists(some, max_size=6), min_size=1, max_size=12))
    most, cut = data.draw(st.none() | st.integers(1, 6)), data.draw(st.integers(0, len(rows)))
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    for number, part in enumerate((slice(0, cut), slice(cut, None))):
        columns = [list(rows)[part], list(rows.values())[part]]
        made = pa.table([pa.array(columns[0], pa.int64()), pa.array(columns[1], pa.list_(pa.int64()))], list(COLUMNS))
        pq.write_table(made, folder / f"{number}.parquet", row_group_size=2)
    place = {own: position for position, own in enumerate(ids)}
    wanted = {k: [place[c] for c in (row or [])[:most] if c in place] for k, row in rows.items() if k in place}
    if not any(wanted.values()):
        with pytest.raises(UserError, match="no candidate"):
            open_candidates(Known(ids), str(folder), "o", "skip", most)
        return
    found = open_candidates(Known(ids), str(folder), "o", "skip", most)
    assert found.ids.tolist() == sorted(wanted)
    assert [found.positions[a:b].tolist() for a, b in itertools.pairwise(found.starts)] == [wanted[k] for k in sorted(wanted)]
    near = by_position(found, np.array(ids))
    assert [near.positions[a:b].tolist() for a, b in itertools.pairwise(near.starts)] == [wanted.get(k, []) for k in ids]
    known = {*rows} <= {*ids} and {c for row in rows.values() for c in (row or [])[:most]} <= {*ids}
    if not known:
        with pytest.raises(UserError, match=r"is no sample of the training data .*set o.unknown_ids=skip"):
            open_candidates(Known(ids), str(folder), "o", "error", most)


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_what_the_table_or_the_data_lack_is_named(shards, tmp_path, caplog):
    dataset = ShardDataset(shards, MODALITIES, {}, training=True)
    ask = {"field": "text", "names": ["n"], "seed": 0}
    good = table(tmp_path / "good.parquet", sample_id=["101", "102"], candidate_ids=[["103", "104"], None])
    found = open_negatives(dataset, good, **ask)
    assert found.ids.tolist() == [101, 102] and found.starts.tolist() == [0, 2, 2] and found.positions.tolist() == [3, 4]
    other = table(tmp_path / "other.parquet", sample_id=[101, 7], candidate_ids=[[103, 8], [9]])
    with pytest.raises(UserError, match=r"other.parquet, row 0 \(sample_id 101\): its candidate 8 is no sample .* \(3 ids are"):
        open_negatives(dataset, other, **ask)
    caplog.clear()
    left = open_negatives(dataset, other, **ask, unknown_ids="skip")
    assert "2 candidates are skipped" in caplog.text and "no candidates for 71 of 72 samples" in caplog.text
    assert left.ids.tolist() == [101] and left.positions.tolist() == [3]
    query = table(tmp_path / "query.parquet", sample_id=[101, 7], candidate_ids=[[103], []])
    with pytest.raises(UserError, match="row 1: the sample_id 7 is no sample"):
        open_negatives(dataset, query, **ask)
    for name, columns, message in (
        (
            "twice",
            {"sample_id": [101, 102, 101], "candidate_ids": [[103], [103], []]},
            "rows 0 and 2 are both of the sample 101",
        ),
        ("flat", {"sample_id": [101], "candidate_ids": [102]}, "candidate_ids is int64, not a list"),
        ("lacks", {"sample_id": [101], "cluster": [102]}, "lacks 'candidate_ids' and has sample_id, cluster"),
        ("null", {"sample_id": [101], "candidate_ids": [[102, None]]}, "1 ids are null"),
        ("float", {"sample_id": [101.5], "candidate_ids": [[102]]}, "neither a whole number nor a text"),
        ("none", {"sample_id": [101], "candidate_ids": [[5]]}, None),
    ):
        made, message = table(tmp_path / f"{name}.parquet", **columns), message or "no candidate of"
        with pytest.raises(UserError, match=message):
            open_negatives(dataset, made, **ask, unknown_ids="skip")
    (tmp_path / "x.parquet").write_text("no Parquet")
    for name, message in (("x.parquet", "cannot be read"), ("y.parquet", "no file")):
        with pytest.raises(UserError, match=message):
            open_negatives(dataset, str(tmp_path / name), **ask)


def test_the_digest_is_of_what_the_table_says(shards, tmp_path):
    dataset = ShardDataset(shards, MODALITIES, {}, training=True)

    def digest(field="text", names=("n",), **columns):
        return open_negatives(dataset, table(tmp_path / "t.parquet", **columns), field, names, 0).digest

    rows = {"sample_id": [101, 102], "candidate_ids": [[103, 104], [105]]}
    of = digest(**rows)
    assert of == digest(**rows, scores=[[0.5, 0.4], [0.1]])
    others = [
        digest("image", **rows),
        digest(names=("n", "m"), **rows),
        digest(**rows | {"candidate_ids": [[103], [104, 105]]}),
    ]
    assert len({of, *others}) == 4
