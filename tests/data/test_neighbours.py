"""Batches of neighbours: each sample once an epoch, beside its nearest, the same for any number of ranks."""

import itertools
from collections import Counter

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcontrast.data import MixtureDataset, NeighbourOrder, ShardDataset, open_neighbours, training_batches, write_shard
from mmcontrast.data.neighbours import Neighbours
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality

TEXT = {"text": TextModality(context_length=8)}


def rows_as(rows):
    """Neighbours of lists of positions."""
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Neighbours("table", starts, np.array([k for row in rows for k in row], dtype=np.int32))


def order(rows, batch_size=8, seed=1, lanes=4, nearest=128, count=64, share=0.5):
    return NeighbourOrder(batch_size, seed, lanes, "data", "table", nearest, count, share, rows_as(rows))


def epoch_of(of, epoch):
    """[steps, batch] positions."""
    steps = [of.places(epoch * of.steps_per_epoch + step) for step in range(of.steps_per_epoch)]
    assert all(number == epoch for step in steps for number, _ in step)
    return [[position for _, position in step] for step in steps]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), samples=st.integers(8, 70), batch_size=st.sampled_from([4, 8]), seed=st.integers(0, 2**40))
def test_each_sample_once_an_epoch_whatever_the_table_says(data, samples, batch_size, seed):
    """But for fewer than a batch; of samples without a row, rows that name one twice or the sample itself, and hubs."""
    few = st.lists(st.integers(0, samples - 1), max_size=12)
    rows = data.draw(st.lists(few, min_size=samples, max_size=samples))
    nearest = data.draw(st.integers(1, 12))
    count, share = data.draw(st.integers(1, nearest)), data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    of = order(rows, batch_size, seed, 4, nearest, count, share)
    epochs = [epoch_of(of, epoch) for epoch in (0, 1, 2)]
    for steps in epochs:
        seen = Counter(position for step in steps for position in step)
        assert set(seen.values()) == {1} and 0 <= samples - len(seen) < batch_size and set(seen) <= set(range(samples))
        for step in steps:  # who is no seed is a neighbour of one before it
            seeds, left = [], 0
            for position in step:
                if left and position in rows[seeds[-1]][:nearest]:
                    left -= 1
                else:
                    seeds, left = [*seeds, position], count
    assert samples < 24 or epochs[0] != epochs[1]
    for step in (0, of.steps_per_epoch):
        for world_size in (1, 2, 4):
            parts = [of.places(step, rank, world_size) for rank in range(world_size)]
            assert [place for part in parts for place in part] == of.places(step)
    again = order(rows, batch_size, seed, 4, nearest, count, share)
    assert epoch_of(again, 2) == epochs[2], "not a function of the epoch alone"


@pytest.mark.parametrize(("share", "near"), [(0.5, 5), (1.0, 10), (0.2, 2), (0.0, 0)])
def test_some_are_the_nearest_and_the_others_any_of_them(share, near):
    """Of 40 neighbours 10 come, of those that are in no batch yet: the nearest, and random ones of the rest."""
    rows = [list(range(1, 41)), *[[] for _ in range(400)]]
    random_ones = Counter()
    of = order(rows, batch_size=401, lanes=1, nearest=40, count=10, share=share)
    for epoch in range(300):
        (step,) = epoch_of(of, epoch)
        before, beside = step[: step.index(0)], step[step.index(0) + 1 :]
        left = [k for k in range(1, 41) if k not in before]
        if len(left) <= 10:
            assert beside[: len(left)] == left
        elif len(beside) >= 10:
            assert beside[:near] == left[:near]
            assert beside[near:10] == sorted({*beside[near:10]} & {*left[near:]}) and len(beside[near:10]) == 10 - near
            random_ones.update(beside[near:10])
    assert share == 1 or {*range(near + 1, 41)} <= {*random_ones}
    assert share < 1 or max(random_ones, default=0) == 0


def test_look_alikes_share_a_batch():
    """Of 64 groups of 8 that name each other, whole groups are in batches of 16; of the nearest 4 of them no more."""
    rows = [[8 * (k // 8) + j for j in range(8) if j != k % 8] for k in range(512)]
    steps = epoch_of(order(rows, batch_size=16), 0)
    assert all(len({position // 8 for position in step}) == 2 for step in steps) and len(steps) == 32
    steps = epoch_of(order(rows, batch_size=16, nearest=4, count=1), 0)
    pairs = sum(a // 8 == b // 8 for step in steps for a, b in itertools.pairwise(step))
    assert 150 < pairs < 350, "seeds and one neighbour each, as far as there is one"
    shuffled = [{position // 8 for position in step} for step in epoch_of(order([[]] * 512, batch_size=16), 0)]
    assert sum(len(groups) > 10 for groups in shuffled) > 28, "without neighbours any samples"
    assert len({tuple(sorted(step)) for epoch in (0, 1) for step in epoch_of(order(rows, batch_size=16), epoch)}) > 40


def test_state_says_what_the_order_was_made_of():
    of = order([[]] * 9, nearest=4, count=2)
    assert of.state() == {
        "batch_size": 8, "seed": 1, "lanes": 4, "data": "data", "table": "table", "nearest": 4, "count": 2, "share": 0.5,
    }  # fmt: skip
    with pytest.raises(UserError, match="7 samples, fewer than train.batch_size=8"):
        order([[]] * 7)
    with pytest.raises(UserError, match="data.lanes=8 must divide train.batch_size=12"):
        order([[]] * 30, 12, lanes=8)
    with pytest.raises(UserError, match="3 ranks cannot share"):
        of.places(0, 0, 3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Ids from 100 on, but for every tenth sample, which says none."""
    folder = tmp_path_factory.mktemp("shards")
    samples = [
        {"__key__": f"k{k:02d}", "txt": f"number {k}", **({"json": {"sample_id": 100 + k}} if k % 10 else {})}
        for k in range(48)
    ]
    write_shard(folder / "a.tar", samples[:29])
    write_shard(folder / "b.tar", samples[29:])
    return str(folder / "*.tar")


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_read_by_ids_from_a_file_or_a_folder(shards, tmp_path):
    """Written by pandas and in parts; without some rows; of one data set and of two sources; and batches of it."""
    dataset = ShardDataset(shards, TEXT, {}, training=True)
    ids = dataset.sample_ids()
    lists = {k: [8 * (k // 8) + (k + j) % 8 for j in range(1, 8)] for k in range(48) if k != 17}
    rows = [(ids[k], [ids[j] for j in lists[k]]) for k in np.random.default_rng(0).permutation(sorted(lists))]
    frame = pandas.DataFrame(rows, columns=["sample_id", "candidate_ids"]).assign(score=0.5)
    frame.to_parquet(tmp_path / "mined.parquet", row_group_size=10)
    (tmp_path / "parts").mkdir()
    for number, part in enumerate((frame[:20], frame[20:20], frame[20:])):
        part.to_parquet(tmp_path / "parts" / f"{number}.parquet")
    (tmp_path / "parts" / "mined.summary.json").write_text("{}")
    digests = set()
    for name in ("mined.parquet", "parts"):
        found = open_neighbours(dataset, str(tmp_path / name), 5)
        assert [found.positions[a:b].tolist() for a, b in itertools.pairwise(found.starts)] == [
            lists.get(k, [])[:5] for k in range(48)
        ]
        digests.add(found.digest)
    assert len(digests) == 1 and digests != {open_neighbours(dataset, str(tmp_path / "parts"), 4).digest}
    mixture = MixtureDataset({name: ShardDataset(shards.replace("*", name), TEXT, {}, training=True) for name in "ab"}, TEXT)
    assert open_neighbours(mixture, str(tmp_path / "parts"), 5).positions.tolist() == found.positions.tolist()
    of = NeighbourOrder(8, 0, 4, dataset.digest, found.digest, 5, 5, 0.5, found)
    options = {"world_size": 1, "num_workers": 2, "pin_memory": False}
    read = [batch.sample_ids.tolist() for batch in training_batches(dataset, of, range(6), rank=0, **options)]
    assert read == [[int(ids[position]) for position in step] for step in epoch_of(of, 0)]


def test_what_does_not_fit_is_named(shards, tmp_path, caplog):
    dataset = ShardDataset(shards, TEXT, {}, training=True)
    good = {"sample_id": [101, 102], "candidate_ids": [[102, 103], [101]]}
    other = table(tmp_path / "other.parquet", sample_id=[101, 7], candidate_ids=[[103, 8, 104], [102]])
    with pytest.raises(UserError, match=r"data.batches: .*candidate 8 is no sample.* set data.batches.unknown_ids=skip"):
        open_neighbours(dataset, other, 128)
    left = open_neighbours(dataset, other, 2, "skip")
    assert left.positions.tolist() == [3] and "data.batches: " in caplog.text
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice").mkdir()
    for name in ("a", "b"):
        table(tmp_path / "twice" / f"{name}.parquet", **good)
    embeddings = table(tmp_path / "part-00000.parquet", key=["a"], sample_id=[101], group_id=[1], metadata=["{}"])
    for name, message in (
        (tmp_path / "twice", "rows 0 and 2 are both of the sample 101"),
        (tmp_path / "empty", "the folder .*empty holds no Parquet file"),
        (tmp_path / "none.parquet", "data.batches: no file"),
        (embeddings, "data.batches: .*lacks 'candidate_ids' and has key, sample_id"),
    ):
        with pytest.raises(UserError, match=message):
            open_neighbours(dataset, str(name), 128)
