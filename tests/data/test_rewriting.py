"""`mmcontrast data write`: the samples of a selection in shards of their own, as tarfile and webdataset read them."""

import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import webdataset

from mmcontrast.data import rewriting
from mmcontrast.data.rewriting import write_selected
from mmcontrast.data.verify import verify_shards
from mmcontrast.errors import UserError
from tests.curation.pairs import bytes_of, jpeg, write_pairs


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def members(*paths):
    found = {}
    for path in paths:
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def test_the_samples_that_are_kept_are_written_as_they_are(tmp_path):
    folder = write_pairs(tmp_path / "data", shards=3, rows=8)
    kept = [1, 2, 5, 7, 100, 203, 207]
    (tmp_path / "own.csv").write_text("sample_id\n" + "\n".join(map(str, kept)))
    manifest = write_selected(str(folder / "*.tar"), tmp_path / "new", str(tmp_path / "own.csv"), "part", 3, workers=2)
    names = ["part-00000.tar", "part-00001.tar", "part-00002.tar"]
    split = manifest["splits"]["part"]
    assert {shard["name"]: shard["samples"] for shard in split["shards"]} == dict(zip(names, (3, 3, 1), strict=True))
    assert split["members"] == {"jpg": 7, "json": 7, "txt": 7} and split["samples"] == 7
    before = members(*sorted(folder.glob("*.tar")))
    after = members(*(tmp_path / "new" / name for name in names))
    keys = [f"{k // 100:05d}{k % 100:04d}" for k in kept]
    assert after == {name: data for name, data in before.items() if name.partition(".")[0] in keys} and len(after) == 21
    read = list(webdataset.WebDataset([str(tmp_path / "new" / name) for name in names], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == keys
    assert not verify_shards(str(tmp_path / "new" / "*.tar"), 1, progress=False)["faults"]


def test_what_was_interrupted_goes_on(tmp_path, monkeypatch):
    folder = write_pairs(tmp_path / "data", shards=2)
    (tmp_path / "own.csv").write_text("sample_id\n" + "\n".join(map(str, range(0, 108, 2))))
    given = str(folder / "*.tar"), tmp_path / "new", str(tmp_path / "own.csv"), "train", 3
    write_selected(*given, workers=1)
    expected = bytes_of(tmp_path / "new")
    for gone in ("manifest.json", "train-00001.tar"):
        (tmp_path / "new" / gone).unlink()
    (tmp_path / "new" / ".train-00001.tar.0.partial").write_bytes(b"torn")
    when = os.stat(tmp_path / "new" / "train-00000.tar").st_mtime_ns
    write_selected(*given, workers=1)
    assert bytes_of(tmp_path / "new") == expected and os.stat(tmp_path / "new" / "train-00000.tar").st_mtime_ns == when
    with pytest.raises(UserError, match="shards of another selection"):
        write_selected(*given[:4], 4, workers=1)
    (folder / "x-00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds other shards"):
        write_selected(str(folder / "0*.tar"), folder, str(tmp_path / "own.csv"), "x", 3, workers=1)
    assert rewriting.BEGUN in expected


def test_two_at_once_write_what_one_does(tmp_path):
    """Each shard under a name of its own until it is whole: nobody counts what another has just begun."""
    folder = write_pairs(tmp_path / "data", shards=3)
    (tmp_path / "own.csv").write_text("sample_id\n" + "\n".join(map(str, range(150))))
    given = str(folder / "*.tar"), str(tmp_path / "own.csv"), "train", 2
    write_selected(given[0], tmp_path / "one", *given[1:], workers=1)
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: write_selected(given[0], tmp_path / "two", *given[1:], workers=1), range(2)):
            pass
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    assert not verify_shards(str(tmp_path / "two" / "*.tar"), 1, progress=False)["faults"]


def test_files_of_a_table_are_members_by_their_suffix(tmp_path):
    """In the columns that open_clip's own training reads; keys with dots, which a tar would cut."""
    for k in range(3):
        (tmp_path / f"{k}.jpg").write_bytes(jpeg(k))
    frame = pd.DataFrame(
        {"filepath": [f"{k}.jpg" for k in range(3)], "title": list("xyz"), "key": [f"v1.{k}" for k in range(3)]}
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame[["key"]][:2].to_csv(tmp_path / "kept.csv", index=False)
    write_selected(str(tmp_path / "t.csv"), tmp_path / "out", str(tmp_path / "kept.csv"), workers=1)
    found = members(tmp_path / "out" / "train-00000.tar")
    assert set(found) == {"v1_0.jpg", "v1_0.json", "v1_1.jpg", "v1_1.json"} and found["v1_1.jpg"] == jpeg(1)
    assert json.loads(found["v1_1.json"])["title"] == "y"
    frame.rename(columns={"filepath": "photo"}).to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(UserError, match="no column is a member of a tar, of photo, title, key: name those of files filepath"):
        write_selected(str(tmp_path / "p.csv"), tmp_path / "other", str(tmp_path / "kept.csv"), workers=1)


def test_keys_that_repeat_and_tables(tmp_path):
    for shard in "ab":
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for row in range(3):
                writer.write({"__key__": str(row), "txt": f"{shard}{row}", "seg.png": b"any bytes"})
    frame = pd.DataFrame({"image": [jpeg(k) for k in range(3)], "caption": list("xyz"), "score": [1.5, 2.5, None]})
    frame.to_parquet(tmp_path / "t.parquet")
    kept = pd.DataFrame({"keep": [True, False, True]})
    keys = pd.Series(["t-0", "t-1", "t-2"], name="key")
    pd.concat([keys, kept], axis=1).to_csv(tmp_path / "rows.csv", index=False)
    write_selected(str(tmp_path / "t.parquet"), tmp_path / "of-table", str(tmp_path / "rows.csv"), workers=1)
    found = members(tmp_path / "of-table" / "train-00000.tar")
    assert found["t-0.image"] == jpeg(0) and found["t-2.caption"] == b"z" and len(found) == 6
    assert json.loads(found["t-0.json"])["score"] == 1.5 and "score" not in json.loads(found["t-2.json"])
    from mmcontrast.data import ShardDataset
    from mmcontrast.modalities import TextModality

    whole = ShardDataset(str(tmp_path / "[ab].tar"), {"text": TextModality()}, {})
    pd.DataFrame({"sample_id": [whole.sample_id(k) for k in (0, 2, 3)]}).to_parquet(tmp_path / "ids.parquet")
    write_selected(str(tmp_path / "[ab].tar"), tmp_path / "of-tars", str(tmp_path / "ids.parquet"), workers=1)
    found = members(tmp_path / "of-tars" / "train-00000.tar")
    assert {name: data for name, data in found.items() if name.endswith("txt")} == {
        "00000-0-0.txt": b"a0",
        "00000-2-2.txt": b"a2",
        "00001-0-0.txt": b"b0",
    }
    assert found["00001-0-0.seg.png"] == b"any bytes"
