"""Batches on their way: as many as the memory holds, few open files, and no step that takes longer with more shards."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmcontrast.data import MixtureOrder, SampleOrder, ShardDataset, loading, training_batches, write_shard
from mmcontrast.data import files as module
from mmcontrast.data.loading import PREFETCHED, batches_ahead, bytes_of_sample, free_memory
from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality, VectorModality


@pytest.fixture
def shards(tmp_path):
    rows = np.arange(24, dtype=np.float32).reshape(12, 2)
    for number in range(3):
        samples = [{"__key__": f"{number}{k}", "npy": rows[4 * number + k], "txt": f"text {k}"} for k in range(4)]
        write_shard(tmp_path / f"{number}.tar", samples)
    return str(tmp_path / "*.tar")


def test_as_many_batches_as_half_of_the_free_memory_holds(shards):
    """ViT-B/16's 4,096 pictures a rank, on a machine with eight ranks of eight workers: 617 MB a batch."""
    pictures = ShardDataset(shards, {"vector": VectorModality(2)}, {})
    pictures.modalities = {"image": ImageModality(224), "vector": VectorModality(2)}
    assert bytes_of_sample(pictures) == 3 * 224 * 224 + 8
    batch_bytes = 4096 * bytes_of_sample(pictures)
    for free, ahead in ((2**41, PREFETCHED), (2 * 2**37, 3), (2**37, 1), (2**20, 1), (0, 1)):
        assert batches_ahead(batch_bytes, 64, free) == ahead
        assert ahead == 1 or 2 * ahead * 64 * batch_bytes <= free
    assert batches_ahead(0, 64, 0) == 1
    assert 0 < free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("prefetch", "free", "factor"), [(None, 2**50, 4), (None, 64, 1), (8, 0, 2), (1, 0, 1), (1000, 0, 250)]
)
def test_what_is_asked_for_is_what_workers_have_ready(shards, monkeypatch, prefetch, free, factor):
    """And the batches are the same."""
    asked = []

    class Loader(loading.DataLoader):
        def __init__(self, *arguments, **options):
            asked.append(options["prefetch_factor"])
            super().__init__(*arguments, **options | {"num_workers": 0, "prefetch_factor": None})

    monkeypatch.setattr(loading, "DataLoader", Loader)
    monkeypatch.setattr(loading, "free_memory", lambda: free)
    dataset = ShardDataset(shards, {"vector": VectorModality(2)}, {}, training=True)
    order = SampleOrder((4, 4, 4), 4, 0, 2, 2, 4)
    options = {"rank": 0, "world_size": 2, "num_workers": 2, "pin_memory": False}
    read = [batch.sample_ids.tolist() for batch in training_batches(dataset, order, range(6), **options, prefetch=prefetch)]
    alone = list(training_batches(dataset, order, range(6), **options | {"num_workers": 0}))
    assert asked == [factor, None] and read == [batch.sample_ids.tolist() for batch in alone]


def opened(monkeypatch):
    """Return a list that grows by the name of each file that is opened for reading samples."""
    names, own = [], module._Descriptor.__init__

    def counting(self, name):
        names.append(name)
        own(self, name)

    monkeypatch.setattr(module._Descriptor, "__init__", counting)
    module._open_descriptor.cache_clear()
    return names


def test_a_shard_is_opened_once_for_all_of_its_samples(shards, monkeypatch):
    dataset = ShardDataset(shards, {"vector": VectorModality(2)}, {})
    names = opened(monkeypatch)
    for position in [*range(12), *range(11, -1, -1)]:
        assert dataset[position].values["vector"].tolist() == [2 * position, 2 * position + 1]
    assert len(names) == 3


def test_no_more_than_so_many_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_open_descriptor", module.lru_cache(2)(module._open_descriptor.__wrapped__))
    files = []
    for number in range(9):
        (tmp_path / f"{number}").write_bytes(b"%d" % number)
        files.append(module.open_file(str(tmp_path / f"{number}")))

    def num_open():
        return sum(file.resolve().is_relative_to(tmp_path) for file in Path("/proc/self/fd").iterdir())

    assert num_open() == 0
    for file in files * 2:
        assert file.read(0, 1) == Path(file.name).read_bytes()
        assert num_open() <= 2
    kept = module._open_descriptor(files[0])
    module._open_descriptor.cache_clear()
    assert os.pread(kept.number, 1, 0) == b"0", "what another thread reads at the moment stays open"
    del kept
    assert num_open() == 0


def test_a_file_that_has_changed_is_never_read_as_what_it_was(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"before")
    file = module.open_file(str(tmp_path / "x"))
    assert file.read(0, 6) == b"before"
    (tmp_path / "y").write_bytes(b"after!")
    os.replace(tmp_path / "y", tmp_path / "x")
    assert file.read(0, 6) == b"before", "the file that was indexed is still open"
    module._open_descriptor.cache_clear()
    with pytest.raises(UserError, match="shard .*x has changed since it was indexed: start again"):
        file.read(0, 6)
    (tmp_path / "x").unlink()
    with pytest.raises(UserError, match="x cannot be read: No such file"):
        file.read(0, 6)


def test_a_file_that_a_server_has_forgotten_is_opened_again(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"still here")
    file = module.open_file(str(tmp_path / "x"))
    names, read = opened(monkeypatch), os.pread
    file.read(0, 5)
    stale = iter([OSError(116, "Stale file handle")])

    def forgetful(*arguments):
        for error in stale:
            raise error
        return read(*arguments)

    monkeypatch.setattr(module.os, "pread", forgetful)
    assert file.read(6, 10) == b"here" and len(names) == 2


class Counted(tuple):
    """Sizes of shards that count how often all of them are gone through."""

    passes = 0

    def __iter__(self):
        type(self).passes += 1
        return super().__iter__()


def test_a_step_takes_no_longer_with_more_shards():
    """No step goes through all of them: only an order's beginning and an epoch's."""
    Counted.passes = 0
    sizes = Counted((10,) * 40)
    plain, other = SampleOrder(sizes, 4, 0, 4, 2, 8), SampleOrder(Counted((10,) * 80), 4, 0, 4, 2, 8)
    mixture = MixtureOrder((plain, other), (0.5, 0.5))
    for order in (plain, mixture):
        order.places(0)
        before = Counted.passes
        for step in range(1, 60):
            order.places(step)
        assert Counted.passes == before


AT_EXIT = """
import atexit, time
atexit.register(time.sleep, 0.5)  # runs after what is registered later
import torch
from torch.utils.data import DataLoader
from mmcontrast.data.loading import start_worker
batches = iter(DataLoader(torch.arange(999), batch_size=4, num_workers=2, worker_init_fn=start_worker))
next(batches)
"""


def test_a_process_that_ends_beside_its_workers_says_nothing():
    """torch raises for a worker that has ended, in whatever the interpreter does last."""
    command = [sys.executable, "-W", "ignore::UserWarning", "-c", AT_EXIT]  # torch warns of more workers than cores
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
