"""Shards at URLs, from a real server that drops, stalls, truncates and is overloaded: the same samples, or a clear error."""

import random
import re
from pathlib import Path

import pytest

from mmcontrast.data import (
    SampleOrder,
    ShardDataset,
    all_batches,
    files,
    index_shard,
    open_shards,
    training_batches,
    write_shard,
)
from mmcontrast.data.held_out import Part, divide
from mmcontrast.data.inspect import inspect_shards
from mmcontrast.data.range_cache import CHUNK, RangeCache
from mmcontrast.data.verify import verify_shards
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality
from tests.command import call_on_ranks
from tests.data.web_server import FAULTS, serving


@pytest.fixture
def server(corpus):
    with serving(corpus) as running:
        yield running


@pytest.fixture(autouse=True)
def hurried(monkeypatch, tmp_path):
    """Short pauses, and caches that are empty."""
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(files, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(files, "STALLED", 0.3)
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def shards_of(server):
    return f"{server.url}/train-{{00000..00002}}.tar"


def all_members(shards, each=1):
    return [(shard.keys[row], shard.read(row, shard.extensions)) for shard in shards for row in range(0, len(shard), each)]


@pytest.mark.parametrize("gib", ["0", "1"])
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_the_same_samples_come_however_the_server_behaves(server, corpus, monkeypatch, fault, gib):
    """Two in three requests fail, in the scan and in the reading; nothing is lost or changed."""
    monkeypatch.setenv("MMCONTRAST_CACHE_GIB", gib)
    server.plan = [fault, fault, ""] * (6 if fault == "stall" else 20)
    shards = open_shards(shards_of(server))
    local = open_shards(str(corpus / "train-*.tar"))
    each = 1 if gib == "1" else 4  # without a cache each is a request
    assert all_members(shards, each) == all_members(local, each)
    assert [shard.digest for shard in shards] == [shard.digest for shard in local]
    assert server.seen[fault] >= 6 or not fault


def test_batches_are_those_of_local_shards(server, tmp_path):
    """In the training order, decoded by forked workers that read many samples at a time, with faults all along."""
    write_shard(tmp_path / "a.tar", [{"__key__": f"k{k}", "txt": f"number {k}", "json": {"sample_id": k}} for k in range(40)])
    server.folder = tmp_path
    local, order = run_of_texts(str(tmp_path / "a.tar"))
    remote, same_order = run_of_texts(f"{server.url}/a.tar")
    assert order == same_order and remote.remote and not local.remote
    server.plan = [*FAULTS, "", ""] * 4

    def batches(dataset, num_workers):
        running = training_batches(dataset, order, range(6), rank=0, world_size=1, num_workers=num_workers, pin_memory=False)
        return [(batch.sample_ids.tolist(), batch.values["text"].tolist()) for batch in running]

    assert batches(local, 0) == batches(remote, 2) == batches(remote, 0)


def test_what_is_held_out_is_that_of_local_shards(server, corpus):
    shards, local = open_shards(shards_of(server)), open_shards(str(corpus / "train-*.tar"))
    server.plan = [*FAULTS, "", ""] * 2
    both = [[part.rows.tolist() for part in divide(of, Part(0.3, True), [])] for of in (shards, local)]
    assert both[0] == both[1] and 1 < sum(map(len, both[0])) < 95


def run_of_texts(shards):
    dataset = ShardDataset(shards, {"text": TextModality(context_length=8)}, {}, seed=4, training=True)
    return dataset, SampleOrder((len(dataset),), 12, 4, 4, 5, 20, dataset.digest)


@pytest.fixture
def patient(monkeypatch):
    """No request is made twice because the machine is busy."""
    monkeypatch.setattr(files, "STALLED", 60.0)


def test_reading_is_by_ranges_and_the_cache_keeps_them(server, monkeypatch, patient):
    monkeypatch.setenv("MMCONTRAST_CACHE_GIB", "0")
    (shard,) = open_shards(f"{server.url}/train-00000.tar")
    server.ranges.clear()
    picture = shard.read(3, ["png"])["png"]
    ((name, start, stop),) = server.ranges
    assert name == "train-00000.tar" and stop - start == len(picture)
    shard.read(3, ["png", "txt", "json"])
    assert len(server.ranges) == 2, "members that are near each other come in one request"

    monkeypatch.setenv("MMCONTRAST_CACHE_GIB", "1")
    for row in range(len(shard)):
        shard.read(row, shard.extensions)
    after = len(server.ranges)
    assert after == 2 + -(-shard.file.size // CHUNK)
    assert all_members([index_shard(f"{server.url}/train-00000.tar")]) == all_members([shard])
    assert len(server.ranges) == after, "neither the index nor the bytes are fetched again"
    server.stamp = "2"  # the file is another one now
    index_shard(f"{server.url}/train-00000.tar")
    assert len(server.ranges) > after


def test_what_will_not_pass_is_said_at_once(server, tmp_path, patient):
    with pytest.raises(UserError, match=r"nowhere\.tar cannot be read .*404"):
        open_shards(f"{server.url}/nowhere.tar")
    server.with_ranges = False
    with pytest.raises(UserError, match=r"whole files only.*data\.sequential"):
        open_shards(f"{server.url}/train-00000.tar")
    assert len(server.ranges) <= 1, "known from the first answer's head"
    for url in ("pipe:touch harmed", "file:///etc/passwd", "ftp://host/x.tar", "simplecache::http://host/x.tar", "local://x"):
        with pytest.raises(UserError, match=r"are not opened|no shard at"):
            open_shards(url)


def test_a_server_that_stays_away_ends_the_run_with_the_reason(server, monkeypatch, patient):
    monkeypatch.setenv("MMCONTRAST_CACHE_GIB", "0")
    (shard,) = open_shards(f"{server.url}/train-00000.tar")
    dataset, order = run_of_texts(f"{server.url}/train-00000.tar")
    server.always = "503"
    with pytest.raises(UserError, match=r"train-00000\.tar could not be read in 8 attempts over .* \(ClientResponseError: 503"):
        shard.file.fetch(0, 100)
    for num_workers in (0, 2):
        running = training_batches(dataset, order, range(2), rank=0, world_size=1, num_workers=num_workers, pin_memory=False)
        with pytest.raises(UserError, match=r"in 8 attempts.*--resume continues"):
            next(running)


def test_verify_and_inspect_read_from_a_url(server, tmp_path):
    shards = f"{server.url}/train-0000{{0,1}}.tar"
    server.plan = ["503", "drop", ""] * 3
    report = verify_shards(shards, workers=1, progress=False)
    assert (report["shards"], report["samples"], report["members"], report["faults"]) == (2, 64, 256, [])
    assert "2 shards, 64 samples" in next(iter(inspect_shards([shards])))


def hammer(number, folder):
    """Read ranges all over four files from a cache that holds about one of them; all must be right."""
    cache, chooser = RangeCache(Path(folder), 12 * CHUNK), random.Random(number)
    size = 10 * CHUNK + 100
    for _ in range(15):
        name = f"file {chooser.randrange(4)}"
        start = chooser.randrange(size)
        stop = min(size, start + chooser.randrange(1, 2 * CHUNK))
        data = cache.read(name, size, start, stop, lambda a, b, name=name: pattern(name, a, b))
        assert data == pattern(name, start, stop)


def pattern(name, start, stop):
    """Bytes that tell their file and their place."""
    period = 251 + int(re.sub(r"\D", "", name))
    block = bytes(k % 256 for k in range(period))
    first = start % period
    return (block * ((stop - start) // period + 2))[first : first + stop - start]


def test_many_processes_share_one_cache_of_a_limited_size(tmp_path):
    call_on_ranks(f"{__name__}:hammer", 4, str(tmp_path))
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert 0 < sum(path.stat().st_size for path in kept) <= 13 * CHUNK
    assert not [path for path in kept if path.suffix == ".partial"]


def test_a_torn_chunk_is_fetched_again_and_a_full_disk_keeps_nothing(tmp_path, monkeypatch):
    cache, fetched = RangeCache(tmp_path, 100 * CHUNK), []

    def fetch(start, stop):
        fetched.append((start, stop))
        return pattern("file 1", start, stop)

    assert cache.read("file 1", 1000, 10, 20, fetch) == pattern("file 1", 10, 20)
    assert cache.read("file 1", 1000, 30, 40, fetch) == pattern("file 1", 30, 40) and fetched == [(0, 1000)]
    (chunk,) = [path for path in tmp_path.rglob("*-000000") if path.is_file()]
    chunk.write_bytes(chunk.read_bytes()[:500])
    assert cache.read("file 1", 1000, 30, 40, fetch) == pattern("file 1", 30, 40) and len(fetched) == 2
    monkeypatch.setattr("mmcontrast.data.range_cache.KEPT_FREE", 2**60)
    for _ in range(2):
        assert cache.read("file 2", 1000, 30, 40, fetch) == pattern("file 1", 30, 40)
    assert len(fetched) == 4


def test_a_cache_that_cannot_be_written_is_none(tmp_path, server, monkeypatch):
    (tmp_path / "taken").write_text("a file where a folder would be")
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "taken"))
    assert len(all_members(open_shards(f"{server.url}/train-00000.tar"))) == 32


def test_evaluation_reads_from_a_url(server):
    dataset = ShardDataset(f"{server.url}/val-00000.tar", {"text": TextModality(context_length=8)}, {})
    assert sum(map(len, all_batches(dataset, 8, num_workers=1))) == 24


def test_files_of_the_cache_do_not_stay_open(tmp_path):
    def opened():
        return [file for file in Path("/proc/self/fd").iterdir() if file.resolve().is_relative_to(tmp_path)]

    cache = RangeCache(tmp_path, 100 * CHUNK)
    for k in range(20):
        cache.read(f"file {k}", 1000, 0, 1000, lambda a, b: bytes(b - a))
    assert not opened()
