"""Indexes of many tars in one mapped file: the same as each alone, one for all processes, made anew when a tar changes."""

import hashlib
import io
import multiprocessing
import os
import tarfile

import numpy as np
import pytest

from mmcontrast.data import MixtureOrder, SampleOrder, ShardDataset, held_out, open_shards
from mmcontrast.data import mapped as module
from mmcontrast.data.held_out import Part
from mmcontrast.data.shard import MemberIndex
from mmcontrast.data.tar import index_file, index_tar
from mmcontrast.modalities import TextModality


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """A folder of tars that Python's own library wrote: other numbers of samples and members in each, one without a sample, and
    a name that is not UTF-8. They are mapped, few as they are."""
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "LEAST", 0)
    (tmp_path / "tars").mkdir()
    for number, samples in enumerate((5, 0, 3, 17)):
        write(tmp_path / "tars" / f"{number}.tar", samples, ["txt"] if number == 2 else ["json", "txt"])
    return tmp_path / "tars"


def write(path, samples, extensions, text="text"):
    with tarfile.open(path, "w") as tar:
        for row in range(samples):
            for extension in extensions if row != 1 else extensions[:1]:
                data = b"{}" if extension == "json" else f"{text} {row}".encode()
                entry = tarfile.TarInfo(f"{path.stem}-{row}\udcff.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def members(shard):
    return [(shard.keys[row], shard.read(row, shard.extensions)) for row in range(len(shard))]


def own_bytes(array):
    """The bytes that an array holds itself, not those of a file that is mapped."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.nbytes if isinstance(array, np.ndarray) else 0


def test_the_same_as_each_tar_alone(tars):
    """Places, sizes, keys and digests; on the first start, from the file, and with a tar that is named twice."""
    names = sorted(map(str, tars.glob("*.tar")))
    for patterns in (str(tars / "*.tar"), str(tars / "*.tar"), [*names, names[0]]):
        shards = open_shards(patterns)
        for name, shard in zip([*names, names[0]], shards, strict=False):
            alone = index_tar(name)
            assert (shard.name, shard.extensions, shard.digest, shard.notes) == (
                name, alone.extensions, alone.digest, alone.notes,
            )  # fmt: skip
            assert [*shard.keys] == [*alone.keys] and members(shard) == members(alone)
            for extension in alone.extensions:
                assert shard.sizes_of(extension).dtype == np.int64
                assert shard.sizes_of(extension).tolist() == alone.sizes_of(extension).tolist()
                assert shard.has(extension).tolist() == alone.has(extension).tolist()
            assert own_bytes(shard.places) == own_bytes(shard.sizes) == own_bytes(shard.keys.text) == 0
    assert len([*(tars.parent / "cache" / "index").glob("*.tars")]) == 2, "one for each set of names"


def test_few_are_not_put_together(tars, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 2**24)
    assert [len(shard) for shard in open_shards(str(tars / "*.tar"))] == [5, 0, 3, 17]
    assert not [*(tars.parent / "cache" / "index").glob("*.tars")]


@pytest.mark.parametrize("damage", ["shorter", "no footer", "another version", "not there"])
def test_a_file_that_is_not_whole_is_made_anew(tars, damage, monkeypatch):
    open_shards(str(tars / "*.tar"))
    (path,) = (tars.parent / "cache" / "index").glob("*.tars")
    data = path.read_bytes()
    if damage == "another version":
        monkeypatch.setattr(module, "VERSION", 99)
    elif damage == "not there":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 3] if damage == "shorter" else data[:-8] + bytes(8))
    assert [len(shard) for shard in open_shards(str(tars / "*.tar"))] == [5, 0, 3, 17]
    assert (path.read_bytes() == data) == (damage != "another version")


def test_a_tar_that_changes_is_found_and_what_is_mapped_stays(tars):
    before = open_shards(str(tars / "*.tar"))
    kept = [*before[3].keys]
    write(tars / "0.tar", 6, ["txt"], "another text")
    after = open_shards(str(tars / "*.tar"))
    assert [len(shard) for shard in after] == [6, 0, 3, 17]
    assert members(after[0])[5][1] == {"txt": b"another text 5"}
    assert [*before[3].keys] == kept, "the file that was there is still mapped"


def test_without_a_cache_each_process_holds_its_own(tars, monkeypatch, caplog):
    (tars.parent / "file").write_bytes(b"")
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tars.parent / "file" / "cache"))
    assert [len(shard) for shard in open_shards(str(tars / "*.tar"))] == [5, 0, 3, 17]
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tars.parent / "cache"))
    monkeypatch.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert [len(shard) for shard in open_shards(str(tars / "*.tar"))] == [5, 0, 3, 17]
    assert "each process holds its own, of 4 tars" in caplog.text
    assert not [*(tars.parent / "cache" / "index").glob("*.partial")]


def _open(barrier, scans, digests, folder, cache):
    os.environ["MMCONTRAST_CACHE"], module.LEAST = cache, 0
    scan = module.index_tar

    def counted(name, again=False, file=None):
        if not index_file(name).exists():
            scans.put(name)
        return scan(name, again, file)

    from mmcontrast.data import index

    module.index_tar = index.index_tar = counted
    barrier.wait(60)
    digests.put("".join(shard.digest for shard in open_shards(f"{folder}/*.tar")))


def test_processes_that_start_together_scan_each_tar_once(tars, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, scans, digests = context.Barrier(4), context.Queue(), context.Queue()
    workers = [
        context.Process(target=_open, args=(barrier, scans, digests, str(tars), str(tmp_path / "new"))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    found = {digests.get(timeout=60) for _ in workers}
    scanned = [scans.get(timeout=60) for _ in range(4)]
    for worker in workers:
        worker.join(60)
    assert len(found) == 1 and scans.empty()
    assert sorted(scanned) == sorted(map(str, tars.glob("*.tar")))


def test_a_part_of_mapped_tars(tars, monkeypatch):
    """Held out and trained on are all samples, each once, and hold four bytes of each themselves."""
    text = {"text": TextModality()}
    sides = [ShardDataset(str(tars / "*.tar"), text, {}, part=Part(0.4, side)) for side in (True, False)]
    keys = [[side.key(position) for position in range(len(side))] for side in sides]
    every = [key for shard in open_shards(str(tars / "*.tar")) for key in shard.keys]
    assert keys[0] and sorted([*keys[0], *keys[1]]) == sorted(every)
    assert all(isinstance(shard.shard, MemberIndex) for shard in sides[0].shards)
    assert all(shard.rows.dtype == np.int32 for side in sides for shard in side.shards if len(shard))
    monkeypatch.setattr(held_out, "KEPT", 3)
    held_out._recent.clear()
    again = ShardDataset(str(tars / "*.tar"), text, {}, part=Part(0.4, True))
    assert again.digest == sides[0].digest and not held_out._recent, "hashes of many samples are not held"


def digest_of(order, steps, ranks=4):
    whole = hashlib.blake2b(digest_size=8)
    for step in steps:
        for rank in range(ranks):
            whole.update(np.array(order.places(step, rank, ranks), dtype="<i8").tobytes())
    return whole.hexdigest()


def test_the_order_of_an_epoch_is_that_of_before():
    """Bit for bit: digests of what the package gave before indexes were mapped."""
    sizes = (1000, 137, 0, 2640, 5)
    plain = SampleOrder(sizes, 64, 3, 8, 10, 120)
    lengths = np.random.default_rng(1).integers(1, 1000, sum(sizes))
    bucketed = SampleOrder(sizes, 64, 3, 8, 10, 120, "", "text", lambda positions: lengths[positions])
    other = SampleOrder((400, 311), 64, 3, 8, 10, 120)
    mixed, single = (MixtureOrder((plain, other), (0.7, 0.3), kind) for kind in ("mixed", "single"))
    steps = [0, 1, 7, 58, 59, 60, 200]
    found = [digest_of(order, steps) for order in (plain, bucketed, mixed, single)]
    assert found == EXPECTED
    assert plain.state()["shard_sizes"] == sizes


EXPECTED = ["50e17c2e4b27a277", "5f3e53243d7df786", "4ddcabbe541c8120", "b60b2323bab489bd"]
