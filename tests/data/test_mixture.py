"""Mixtures: exact weights, every source's own epochs, the same batches for any number of ranks, fields that a source lacks."""

import itertools
from collections import Counter

import pytest

from mmcontrast.data import MixtureDataset, MixtureOrder, SampleOrder, ShardDataset, training_batches, write_shard
from mmcontrast.data import order as order_module
from mmcontrast.data.mixture import SLOTS
from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality, TextModality, VectorModality
from tests.data.samples import png

SIZES, WEIGHTS = ((100, 37), (64, 5, 200), (41,)), (0.5, 0.3, 0.2)


def mixture(batches="mixed", weights=WEIGHTS):
    orders = tuple(SampleOrder(sizes, 16, 3, 4, 10, 12, str(k)) for k, sizes in enumerate(SIZES))
    return MixtureOrder(orders, weights, batches)


STARTS = [0, *itertools.accumulate(sum(sizes) for sizes in SIZES)]


def source_of(position):
    return next(k for k in range(3) if position < STARTS[k + 1])


@pytest.mark.parametrize("batches", ["mixed", "single"])
def test_weights_hold_and_every_source_walks_its_epochs(batches):
    """In all to within one slot a lane; a source's lane shows all it has before it shows any of it again."""
    order = mixture(batches)
    steps = SLOTS // (1 if batches == "single" else 4)
    places = [order.places(step) for step in range(steps)]
    counts = Counter(source_of(position) for step in places for _, position in step)
    unit = 16 if batches == "single" else 4  # a step's samples, or a slot in each of four lanes
    for source, weight in enumerate(WEIGHTS):
        assert abs(counts[source] / unit - SLOTS * weight) <= 1
    if batches == "single":
        assert all(len({source_of(position) for _, position in step}) == 1 for step in places)
    else:
        assert all(len({source_of(position) for _, position in step}) > 1 for step in places[:20])
    for source, sizes in enumerate(SIZES):
        seen = Counter((epoch, position) for step in places for epoch, position in step if source_of(position) == source)
        assert set(seen.values()) == {1}, "no place twice"
        epochs = Counter(epoch for epoch, _ in seen)
        length = sum(sizes) // 4 * 4
        whole = [epoch for epoch in epochs if epoch < max(epochs) - 1]
        assert whole and all(epochs[epoch] == length for epoch in whole)
        assert {p for e, p in seen} == set(range(STARTS[source], STARTS[source + 1])), "all of it is seen in the end"


@pytest.mark.parametrize("batches", ["mixed", "single"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batch(world_size, batches):
    order = mixture(batches)
    for step in (0, 1, 77, 5000):
        parts = [order.places(step, rank, world_size) for rank in range(world_size)]
        assert [place for part in parts for place in part] == order.places(step)
    with pytest.raises(UserError, match="3 ranks cannot share"):
        order.places(0, 0, 3)


def test_weights_that_are_too_small_and_sources_that_are_are_refused():
    with pytest.raises(UserError, match="the smallest weight is 0.0001"):
        mixture(weights=(0.9, 0.0999, 0.0001))
    with pytest.raises(UserError, match="20 samples, fewer than train.batch_size=64"):
        SampleOrder((20,), 64, 0, 8, 8, 8)


@pytest.fixture
def sources(tmp_path):
    """Pictures with texts, and texts alone; both number their samples from 0."""
    for name, count, extra in (("pictures", 40, {"png": png()}), ("words", 90, {})):
        samples = [
            {"__key__": f"k{k:02d}", "txt": f"{name} {k}", "json": {"sample_id": k, "group_id": k // 2}, **extra}
            for k in range(count)
        ]
        write_shard(tmp_path / f"{name}.tar", samples)
    return {name: str(tmp_path / f"{name}.tar") for name in ("pictures", "words")}


def opened(sources, own_ids=()):
    modalities = {"image": ImageModality(8), "text": TextModality(context_length=8)}
    datasets = {name: ShardDataset(shards, modalities, {}, 0, training=True, partial=True) for name, shards in sources.items()}
    orders = tuple(SampleOrder(tuple(map(len, d.shards)), 8, 0, 2, 5, 20, d.digest) for d in datasets.values())
    return MixtureDataset(datasets, modalities, own_ids), MixtureOrder(orders, (0.25, 0.75))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_field_that_a_source_lacks_is_absent(sources, num_workers):
    dataset, order = opened(sources)
    batches = training_batches(dataset, order, range(20), rank=0, world_size=1, num_workers=num_workers, pin_memory=False)
    seen = Counter()
    for batch in batches:
        names = [entry["source"] for entry in batch.metadata]
        seen.update(names)
        assert (batch.ids["image"] >= 0).tolist() == [name == "pictures" for name in names]
        assert (batch.ids["text"] >= 0).all() and len(batch) == 8
    assert 20 <= seen["pictures"] <= 60 and seen.total() == 160


def test_ids_that_mean_nothing_to_the_others_are_kept_apart(sources):
    shared, apart = (opened(sources, own_ids)[0] for own_ids in ((), ("words",)))
    for dataset in (shared, apart):
        assert dataset.sample_ids().tolist() == [dataset.sample_id(position) for position in range(len(dataset))]
    assert shared[0, 0].sample_id == shared[0, 40].sample_id == 0 and shared[0, 1].group_id == shared[0, 41].group_id
    assert apart[0, 0].sample_id == 0 and apart[0, 40].sample_id > 10**6
    assert apart[0, 40].group_id == apart[0, 41].group_id != apart[0, 42].group_id


def test_a_field_of_no_source_is_refused(sources):
    datasets = opened(sources)[0].sources
    with pytest.raises(UserError, match="field 'vector': no sample of any source"):
        MixtureDataset(datasets, {"vector": VectorModality(3)})


def test_many_sources_keep_their_epochs_at_hand(monkeypatch):
    """Of every source the two last, however many there are: nothing is made again for each lane."""
    made = []
    make = order_module._Epoch
    monkeypatch.setattr(order_module, "_Epoch", lambda order, epoch: made.append((order.data, epoch)) or make(order, epoch))
    orders = tuple(SampleOrder((400,), 64, 3, 8, 10, 12, str(k)) for k in range(20))
    order = MixtureOrder(orders, (0.05,) * 20)
    for step in range(60):
        order.places(step)
    assert len(made) == len(set(made)) and {source for source, _ in made} == {str(k) for k in range(20)}


def test_weights_never_drift():
    """To within two slots of each window of a lane, and to within one of all windows so far."""
    order, seen = mixture(weights=(0.4713, 0.0611, 0.4676)), Counter()
    for number in range(12):
        counts = Counter(source for source, _ in order._slots(2, number * SLOTS, (number + 1) * SLOTS))
        seen += counts
        for source, weight in enumerate(order.weights):
            assert abs(counts[source] - SLOTS * weight) < 2 and abs(seen[source] - (number + 1) * SLOTS * weight) < 1
