"""Whose sample is whose: keys that repeat from shard to shard, ids that are given, as numbers and as texts."""

import json
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcontrast.data import MixtureDataset, ShardDataset, StreamDataset, all_batches, clusters_of, write_shard
from mmcontrast.data import verify as verify_module
from mmcontrast.data.files import identities
from mmcontrast.data.ids import default_id, id_of, stable_hash
from mmcontrast.data.inspect import inspect_shards
from mmcontrast.data.verify import Reading, verify_shards, verify_sources
from mmcontrast.errors import UserError
from mmcontrast.modalities import DecodeError, TextModality

TEXT = {"text": TextModality(context_length=8)}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def tar(path, count=40, **about):
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:  # numbers from 0, as everybody does
        for k in range(count):
            entry = {"json": {name: value(k) for name, value in about.items()}} if about else {}
            writer.write({"__key__": f"{k:09d}", "txt": f"{path.parent.name} {path.stem} {k}", **entry})


def ids(dataset):
    (batch,) = all_batches(dataset, len(dataset))
    return batch.sample_ids.tolist(), batch.group_ids.tolist()


def shards_with_repeated_keys(tmp_path, kind):
    """120 samples, three with each key."""
    if kind in ("tars", "mixture", "stream"):
        for name in "abc":
            tar(tmp_path / f"{name}.tar")
        return [str(tmp_path / "?.tar")]
    if kind == "img2dataset":  # outputs of several calls: the same names of tars
        for name in "abc":
            tar(tmp_path / name / "00000.tar")
        return [str(tmp_path / "*" / "00000.tar")]
    if kind in ("folders", "sub-folders"):
        for name in "abc":
            (tmp_path / "all" / name).mkdir(parents=True)
            for k in range(40):
                (tmp_path / "all" / name / f"{k}.txt").write_text(f"{name} {k}")
        return [str(tmp_path / "all" / ("?" if kind == "folders" else ""))]
    for name in "abc":
        (tmp_path / name).mkdir()
        rows = {"key": [f"{k:09d}" for k in range(40)], "text": [f"{name} {k}" for k in range(40)]}
        if kind == "csv":
            lines = [f"{key},{text}" for key, text in zip(*rows.values(), strict=True)]
            (tmp_path / name / "x.csv").write_text("key,text\n" + "\n".join(lines))
        else:
            pq.write_table(pa.table(rows), tmp_path / name / "x.parquet")
    return [str(tmp_path / name / f"x.{kind}") for name in "abc"]


KINDS = ["tars", "img2dataset", "folders", "sub-folders", "csv", "parquet", "mixture"]


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_repeat_are_different_samples(tmp_path, kind):
    patterns = shards_with_repeated_keys(tmp_path, kind)
    if kind == "mixture":
        sources = {name: ShardDataset(str(tmp_path / f"{name}.tar"), TEXT, {}) for name in "abc"}
        dataset = MixtureDataset(sources, TEXT)
        (batch,) = [dataset.collate([dataset[0, k] for k in range(len(dataset))])]
        found = batch.sample_ids.tolist(), batch.group_ids.tolist()
        assert [dataset.sample_id(k) for k in (0, 40)] == [found[0][0], found[0][40]]
    else:
        found = ids(ShardDataset(patterns, TEXT, {}))
    for of in found:
        assert len(set(of)) == 120 and min(of) >= 0 and max(of) < 2**63


def test_rows_of_one_key_are_different_samples(tmp_path):
    pq.write_table(pa.table({"key": ["a", "a", "b"], "text": ["one", "two", "three"]}), tmp_path / "x.parquet")
    assert len(set(ids(ShardDataset(str(tmp_path / "x.parquet"), TEXT, {}))[1])) == 3


def test_ids_are_the_same_on_every_mount_and_in_every_order_of_opening(tmp_path):
    for mount in ("one", "other/deeper"):
        for name in "ab":
            tar(tmp_path / mount / name / "00000.tar", 3)
    opened = [ShardDataset(str(tmp_path / mount / "{a,b}" / "00000.tar"), TEXT, {}) for mount in ("one", "other/deeper")]
    assert ids(opened[0]) == ids(opened[1]) and opened[0].digest == opened[1].digest
    turned = ShardDataset(str(tmp_path / "one" / "{b,a}" / "00000.tar"), TEXT, {})
    assert ids(turned)[0] == ids(opened[0])[0][3:] + ids(opened[0])[0][:3]
    stream = StreamDataset(str(tmp_path / "one" / "{a,b}" / "00000.tar"), TEXT, {}, 0)
    some = {sample.sample_id for sample, _ in zip(stream, range(60), strict=False)}
    assert some == set(ids(opened[0])[0])


def test_identities_of_shards():
    assert identities(["/x/a.tar", "/x/b.tar"]) == ["a.tar", "b.tar"]
    assert identities(["/x/1/a.tar", "/y/2/a.tar", "/y/2/b.tar"]) == ["1/a.tar", "2/a.tar", "2/b.tar"]
    assert identities(["/x/a.tar", "/x/a.tar"]) == ["a.tar", "a.tar"], "a shard named twice is one"
    assert identities(["https://h/a.tar?signature=1", "s3://h/b.tar"]) == ["a.tar", "b.tar"]
    assert len(set(identities(["https://h/get?shard=1", "https://h/get?shard=2"]))) == 2
    assert len(set(identities(["https://one/a.tar", "https://other/a.tar"]))) == 2


def test_the_same_shard_in_two_sources_is_the_same_samples(tmp_path):
    tar(tmp_path / "a.tar", 4)
    tar(tmp_path / "b" / "a.tar", 4)
    sources = {"x": tmp_path / "a.tar", "y": tmp_path / "a.tar", "z": tmp_path / "b" / "a.tar"}
    dataset = MixtureDataset({name: ShardDataset(str(path), TEXT, {}) for name, path in sources.items()}, TEXT, ["z"])
    found = [dataset.sample_id(k) for k in range(12)]
    assert found[:4] == found[4:8] and not set(found[:4]) & set(found[8:])


def test_renamed_shards_have_another_digest_only_where_ids_are_made_of_their_names(tmp_path):
    digests = {}
    for name in ("a", "b"):
        tar(tmp_path / f"plain-{name}.tar", 3)
        tar(tmp_path / f"said-{name}.tar", 3, sample_id=lambda k: k)
    for kind in ("plain", "said"):
        first = (tmp_path / f"{kind}-a.tar").read_bytes()
        (tmp_path / f"{kind}-b.tar").write_bytes(first)
        digests[kind] = {ShardDataset(str(tmp_path / f"{kind}-{name}.tar"), TEXT, {}).digest for name in "ab"}
    assert len(digests["plain"]) == 2 and len(digests["said"]) == 1


TEXTS = [str(uuid.UUID(int=7)), "https://a.b/c.jpg?x=1", "007", "1e5", "COCO_val2014_000000000042", "été", "12.0", "+5", " 5",
         "x" * 300, "18446744073709551615", "9223372036854775808"]  # fmt: skip


def test_ids_may_be_texts(tmp_path):
    """In a json, a CSV and a Parquet file; one that is a whole number as it is printed is that number."""
    values, names = [*TEXTS, "12", "-3", "0"], ("json", "csv", "parquet")
    write_shard(
        tmp_path / "x.tar",
        [
            {"__key__": f"k{k:02d}", "txt": "t", "json": {"sample_id": v, "group_id": TEXTS[k % 3]}}
            for k, v in enumerate(values)
        ],
    )
    table = pa.table({"text": ["t"] * len(values), "sample_id": values, "group_id": [TEXTS[k % 3] for k in range(len(values))]})
    pq.write_table(table, tmp_path / "x.parquet")
    table.to_pandas().to_csv(tmp_path / "x.csv", index=False)
    found = [ids(ShardDataset(str(tmp_path / f"x.{n.replace('json', 'tar')}"), TEXT, {})) for n in names]
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [*map(stable_hash, TEXTS), 12, -3, 0] and len(set(found[0][1])) == 3 and min(found[0][1]) >= 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=30), st.integers(1 - 2**63, 2**63 - 1), st.integers().map(str)), unique_by=str))
def test_different_texts_are_different_ids(values):
    values = [v for v in values if v != "" and not (isinstance(v, str) and any("\ud800" <= c <= "\udfff" for c in v))]
    assert len({id_of("sample_id", v, -1) for v in values}) == len(values)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "True is neither a whole number nor a text"),
        (1.5, "1.5 is neither"),
        ([3], "is neither"),
        ({"a": 1}, "is neither"),
        (2**63, "beyond 64 bits: write it as a text"),
        (1e300, "beyond 64 bits"),
        (2.0**60, "has been rounded to a float"),
    ],
)
def test_ids_that_are_none_are_refused(value, message):
    with pytest.raises(DecodeError, match=message):
        id_of("group_id", value, 0)
    assert id_of("group_id", 12.0, 0) == 12 and id_of("group_id", None, 5) == id_of("group_id", "", 5) == 5


def test_a_sample_id_that_repeats_is_found(tmp_path):
    tar(tmp_path / "a.tar", 5, sample_id=lambda k: f"u{k}")
    tar(tmp_path / "b.tar", 5, sample_id=lambda k: f"u{k + 4}")
    report = verify_shards(str(tmp_path / "?.tar"), 1, progress=False)
    (fault,) = report["faults"]
    assert fault["shard"].endswith("b.tar") and fault["sample"] == "000000000"
    assert "sample_id 'u4' is that of" in fault["error"] and "a.tar, sample '000000004', too" in fault["error"]
    tar(tmp_path / "b.tar", 5, sample_id=lambda k: k, group_id=lambda k: "g")
    assert not verify_shards(str(tmp_path / "?.tar"), 1, progress=False)["faults"]
    assert "1 groups in them; the largest has 5" in [*inspect_shards([str(tmp_path / "?.tar")])]


def test_two_texts_of_one_hash_are_told(tmp_path, monkeypatch):
    tar(tmp_path / "a.tar", 3, sample_id=lambda k: f"u{k}")
    monkeypatch.setattr("mmcontrast.data.ids.stable_hash", lambda text: 77)
    monkeypatch.setattr(verify_module, "ProcessPoolExecutor", InProcess)
    faults = verify_shards(str(tmp_path / "a.tar"), 1, progress=False)["faults"]
    assert [fault["sample"] for fault in faults] == ["000000001", "000000002"]
    assert "sample_id 'u1' has the same hash as 'u0'" in faults[0]["error"]


class InProcess:
    def __init__(self, workers, initializer, initargs):
        initializer(*initargs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


@pytest.mark.parametrize("kind", ["csv", "parquet", "two tables", "categorical"])
def test_a_sample_id_that_repeats_in_tables_is_refused_when_they_are_opened(tmp_path, kind):
    values = pa.array(["a", "b", "a"] if kind != "two tables" else ["a", "b", "c"])
    table = pa.table({"text": ["x", "y", "z"], "sample_id": values.dictionary_encode() if kind == "categorical" else values})
    if kind == "csv":
        table.to_pandas().to_csv(tmp_path / "x.csv", index=False)
    else:
        pq.write_table(table, tmp_path / "x.parquet")
    if kind == "two tables":
        pq.write_table(pa.table({"text": ["z"], "sample_id": ["b"]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r", row [02]: its sample_id '[ab]' is that of .*, row [01] too; a sample_id is one"):
        ShardDataset(str(tmp_path / "[xy].*"), TEXT, {})
    assert len(verify_shards(str(tmp_path / "[xy].*"), 1, progress=False)["faults"]) == 1


def test_an_entry_that_few_samples_have_is_found(tmp_path, monkeypatch, caplog):
    samples = [{"__key__": f"{k}", "json": {"caption": "rare"} if k == 77 else {}, "other.txt": "a"} for k in range(200)]
    shard = write_shard(tmp_path / "x.tar", samples) and str(tmp_path / "x.tar")
    text, keys = {"text": TextModality()}, {"text": ["json:caption"]}
    for partial in (True, False):
        dataset = ShardDataset(shard, text, keys, partial=partial)
        assert [k for k in range(200) if "text" in dataset[k].values] == [77]
    monkeypatch.setattr("mmcontrast.data.dataset.MORE_PROBES", 20)
    assert not ShardDataset(shard, text, keys, partial=True).keys
    assert "field 'text' is left out: of 20 samples none has json:caption" in caplog.text


def test_sources_that_share_numbers_are_told(tmp_path):
    for name in "ab":
        tar(tmp_path / f"{name}.tar", 5, sample_id=lambda k: k)
    sources = {name: (str(tmp_path / f"{name}.tar"), Reading()) for name in "ab"}
    (note,) = verify_sources(sources, ["a", "b"], 1, progress=False)["notes"]
    assert "a and b: 5 samples have the same sample_id" in note
    assert not verify_sources(sources, ["a"], 1, progress=False)["notes"]


def test_clusters_by_keys_that_repeat_are_refused(tmp_path):
    for name in "ab":
        tar(tmp_path / f"{name}.tar", 3)
    dataset = ShardDataset(str(tmp_path / "?.tar"), TEXT, {})
    pq.write_table(pa.table({"key": [f"{k:09d}" for k in range(3)], "cluster": [0, 1, 0]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="several samples have the key '000000000': name them by sample_id"):
        clusters_of(dataset, str(tmp_path / "c.parquet"))
    given = {"sample_id": [str(dataset.sample_id(k)) for k in range(6)], "cluster": [*"aabbcc"]}
    pq.write_table(pa.table(given), tmp_path / "d.parquet")
    assert clusters_of(dataset, str(tmp_path / "d.parquet"))[0].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_bad_sample_is_named_by_its_id_and_path(tmp_path):
    (tmp_path / "x.csv").write_text("text,sample_id\nfine,a\n   ,u-17\n")
    sample = ShardDataset(str(tmp_path / "x.csv"), TEXT, {}, training=True)[0, 1]
    (bad,) = sample.replaces
    assert "x.csv, sample_id 'u-17', row 1, sample 'x-1', member .text: an empty text" in bad["error"]
    assert bad["sample_id"] == "u-17" and bad["key"] == "x-1" and json.dumps(bad)
    (tmp_path / "files" / "deep").mkdir(parents=True)
    (tmp_path / "files" / "deep" / "a.txt").write_bytes(b"\xff")
    (fault,) = verify_shards(str(tmp_path / "files"), 1, progress=False)["faults"]
    assert "(deep/a.txt)" in fault["where"]
    assert default_id("a", "b") != default_id("b", "a") and torch.tensor(default_id("a", "b")).dtype == torch.int64


@pytest.mark.parametrize("kind", ["tar", "csv", "parquet"])
def test_what_a_sample_counts_is_a_finite_number(tmp_path, kind):
    """Read from the json, or from a table's column; what is none makes a bad sample that names shard and key."""
    given = [0.5, 0, None, 3]
    if kind == "tar":
        write_shard(
            tmp_path / "x.tar", [{"__key__": f"k{k}", "txt": "a", "json": {"sample_weight": w}} for k, w in enumerate(given)]
        )
    else:
        table = pa.table(
            {"key": [f"k{k}" for k in range(4)], "text": ["a"] * 4, "sample_weight": pa.array(given, pa.float64())}
        )
        pq.write_table(table, tmp_path / "x.parquet") if kind == "parquet" else pa.csv.write_csv(table, tmp_path / "x.csv")
    data = ShardDataset(str(tmp_path / f"x.{kind}"), TEXT, {})
    assert data.collate([data[k] for k in range(4)]).weights.tolist() == [0.5, 0.0, 1.0, 3.0]
    for bad in ("-1", "-1e-9", "1e39", "Infinity", "true", '"0.5"', "[1]"):
        write_shard(tmp_path / "bad.tar", [{"__key__": "k7", "txt": "a", "json": f'{{"sample_weight": {bad}}}'.encode()}])
        sample = ShardDataset(str(tmp_path / "bad.tar"), TEXT, {})[0]
        assert sample.error and "bad.tar, sample 'k7'" in sample.error and "sample_weight" in sample.error, bad
