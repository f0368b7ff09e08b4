"""Training on a selection: the samples that it keeps alone, with the ids, sides and order that they would have anyway."""

import json
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml

from mmcontrast.curation.filter import Filter
from mmcontrast.curation.rules import parse_rules
from mmcontrast.curation.run_stage import run_stage
from mmcontrast.data import MixtureDataset, ShardDataset, ShardOptions, index_shard, open_dataset
from mmcontrast.data.held_out import Part
from mmcontrast.data.parts import ShardPart, narrowed
from mmcontrast.data.selection import open_selection, selected
from mmcontrast.data.shard import Keys
from mmcontrast.data.tar import TarIndex
from mmcontrast.data.verify import verify_sources
from mmcontrast.data_commands import _sources
from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality, TextModality
from mmcontrast.run_checks import check_components
from mmcontrast.runs import make_run_context
from tests.command import NO_EVALUATION, train
from tests.curation.pairs import pair, write_pairs


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def similar(shards, out, least=0.5):
    run_stage(Filter(parse_rules({"rules": [{"column": "json:similarity", "min": least}]}, "rules")), shards, out, workers=1)
    return str(out)


def dataset(shards, select=None, **options):
    return ShardDataset(str(shards), {"image": ImageModality(8), "text": TextModality()}, {}, select=select, **options)


def keys_of(data):
    return [data.key(k) for k in range(len(data))]


def ids(data):
    return [data[k].sample_id for k in range(len(data))]


def write_part(folder, keep):
    pq.write_table(pa.table({"keep": keep}), next((folder / "parts").iterdir()))


KEPT = [k for s in range(3) for k in range(s * 100, s * 100 + 8) if k * 37 % 100 >= 50]


def test_what_a_selection_keeps_is_what_is_read(tmp_path):
    folder = write_pairs(tmp_path / "data")
    whole, kept = dataset(folder / "*.tar"), dataset(folder / "*.tar", similar(str(folder / "*.tar"), tmp_path / "sel"))
    assert ids(kept) == KEPT and 0 < len(KEPT) < len(whole)
    by_id = {sample.sample_id: sample for sample in (whole[k] for k in range(len(whole)))}
    for k in range(len(kept)):
        sample = kept[k]
        assert sample.metadata == by_id[sample.sample_id].metadata
        assert (sample.values["image"] == by_id[sample.sample_id].values["image"]).all()
    assert kept.digest != whole.digest
    assert kept.lengths("text", np.arange(len(kept))).tolist() == [len(by_id[i].metadata["caption"]) for i in KEPT]


def test_shards_are_found_wherever_they_have_gone(tmp_path):
    folder = write_pairs(tmp_path / "data")
    select = similar(str(folder / "*.tar"), tmp_path / "sel")
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = dataset(tmp_path / "elsewhere" / "*.tar", select)
    assert ids(moved) == KEPT and moved.digest == dataset(folder / "*.tar", select).digest
    assert ids(dataset(folder / "00001.tar", select)) == [k for k in KEPT if 100 <= k < 200]
    write_pairs(tmp_path / "more", samples=[[pair(7, row) for row in range(4)]])
    with pytest.raises(UserError, match=r"more/00000.tar is not in it.*mmcontrast data filter"):
        dataset(tmp_path / "more" / "*.tar", select)


@pytest.mark.parametrize("kind", ["tars", "folder", "table"])
def test_the_held_out_part_of_a_selection_is_the_selection_of_the_held_out_part(tmp_path, kind):
    samples = [pair(0, row) for row in range(80)]
    if kind == "tars":
        pattern = str(write_pairs(tmp_path / "data", samples=[samples[:50], samples[50:]]) / "*.tar")
    elif kind == "folder":
        pattern = str(tmp_path / "data")
        for sample in samples:
            (tmp_path / "data").mkdir(exist_ok=True)
            for name in ("jpg", "txt", "json"):
                data = sample[name] if isinstance(sample[name], bytes) else sample[name].encode()
                (tmp_path / "data" / f"{sample['__key__']}.{name}").write_bytes(data)
    else:
        pattern = str(tmp_path / "pairs.parquet")
        about = [json.loads(sample["json"]) for sample in samples]
        frame = pd.DataFrame(about).assign(image=[sample["jpg"] for sample in samples])
        frame.to_parquet(pattern, row_group_size=7)
    select = similar(pattern, tmp_path / "sel")
    sides = {held: {True: [], False: []} for held in (True, False)}
    for held in (True, False):
        for chosen in (True, False):
            found = dataset(pattern, select if chosen else None, part=Part(0.3, held))
            sides[held][chosen] = ids(found)
    kept = set(ids(dataset(pattern, select)))
    assert kept == {k for k in range(80) if k * 37 % 100 >= 50}
    for held in (True, False):
        assert sides[held][True] == [k for k in sides[held][False] if k in kept] and sides[held][True]
    groups = [{k // 2 for k in sides[held][True]} for held in (True, False)]
    assert not groups[0] & groups[1]
    fresh = ids(dataset(pattern, select, part=Part(0.3, True)))  # with the cache that the others left
    assert fresh == sides[True][True]


def test_a_tars_index_lets_go_of_what_is_dropped():
    """A hundredth of a million samples: what stays in memory is what that many have."""
    n, rows = 1_000_000, np.arange(0, 1_000_000, 100)
    text = np.frombuffer(b"".join(b"%09d" % k for k in range(n)), dtype=np.uint8)
    keys = Keys(text, np.arange(1, n + 1) * 9)
    places = np.arange(3 * n).reshape(n, 3)
    whole = TarIndex("big.tar", keys, ("jpg", "json", "txt"), "0" * 16, places, places + 1, None)
    few = narrowed(whole, rows)
    assert [few.keys[k] for k in (0, 1, 9999)] == ["000000000", "000000100", "000999900"]
    assert few.sizes_of("txt")[7] == whole.sizes_of("txt")[700] and few.identity(7) == whole.identity(700)
    held = [few.keys.text, few.keys.ends, few.places, few.sizes, few.rows]
    assert sum(array.nbytes for array in held) < len(rows) * 9 * 9
    for array in held:  # nor do they keep what they were cut from
        while isinstance(array.base, np.ndarray):
            array = array.base
        assert (array if array.base is None else memoryview(array.base)).nbytes < 1e6
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    again = narrowed(whole, rows[:100])
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(again) == 100 and grown < 100_000
    assert narrowed(whole, np.arange(n)) is whole
    assert len(narrowed(whole, np.empty(0, dtype=np.int64))) == 0


def test_a_users_own_lists(tmp_path):
    folder = write_pairs(tmp_path / "data")
    pattern = folder / "*.tar"
    pd.DataFrame({"key": ["000010002", "000000005"]}).to_csv(tmp_path / "keys.csv", index=False)
    assert ids(dataset(pattern, str(tmp_path / "keys.csv"))) == [5, 102]  # in the shards' order; zeros in front stay
    frame = pd.DataFrame({"sample_id": [3, 4, 207, 999], "keep": [True, False, True, True], "score": [0.1, 0.2, 0.3, 0.4]})
    frame.to_parquet(tmp_path / "ids.parquet")
    assert ids(dataset(pattern, str(tmp_path / "ids.parquet"))) == [3, 207]
    frame.astype(str).to_csv(tmp_path / "ids.csv", index=False)
    assert ids(dataset(pattern, str(tmp_path / "ids.csv"))) == [3, 207]
    pq.write_table(pa.table({"json:uid": [f"{7:032x}", f"{100:032x}"]}), tmp_path / "uids.parquet")
    assert ids(dataset(pattern, str(tmp_path / "uids.parquet"))) == [7, 100]
    by_stage = dataset(pattern, similar(str(pattern), tmp_path / "sel"))
    pd.DataFrame({"key": keys_of(by_stage)[::-1]}).to_csv(tmp_path / "same.csv", index=False)
    assert dataset(pattern, str(tmp_path / "same.csv")).digest == by_stage.digest  # the same samples, however they are named
    uids = np.array([(0, 100), (0, 6)], dtype="u8,u8")  # as DataComp's lists are
    np.save(tmp_path / "uids.npy", uids)
    assert ids(dataset(pattern, str(tmp_path / "uids.npy"))) == [6, 100]


def test_ids_that_samples_do_not_say_themselves(tmp_path):
    """As an embedding table, and what is made of it, has them: two shards whose keys are the same."""
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for row in range(5):
                writer.write({"__key__": f"{row}", "txt": f"shard {shard} row {row}"})
    texts = {"text": TextModality()}
    whole = ShardDataset(str(tmp_path / "*.tar"), texts, {})
    chosen = [ids(whole)[k] for k in (1, 8)]
    pq.write_table(pa.table({"sample_id": chosen}), tmp_path / "ids.parquet")
    kept = ShardDataset(str(tmp_path / "*.tar"), texts, {}, select=str(tmp_path / "ids.parquet"))
    assert [kept.members(k, ["txt"])["txt"] for k in range(2)] == [b"shard 0 row 1", b"shard 1 row 3"] and ids(kept) == chosen
    (tmp_path / "keys.csv").write_text("key\n3\n")
    with pytest.raises(UserError, match=r"several samples have the key '3'.*name them by sample_id"):
        ShardDataset(str(tmp_path / "*.tar"), texts, {}, select=str(tmp_path / "keys.csv"))


def test_rows_of_tables_go_by_their_number(tmp_path):
    frame = pd.DataFrame({"caption": [f"text {k}" for k in range(50)], "similarity": np.arange(50) / 50})
    frame.to_parquet(tmp_path / "pairs.parquet")
    select = similar(str(tmp_path / "pairs.parquet"), tmp_path / "sel", 0.9)
    texts = {"text": TextModality()}
    whole, kept = (ShardDataset(str(tmp_path / "pairs.parquet"), texts, {}, select=of) for of in (None, select))
    assert isinstance(kept.shards[0], ShardPart) and ids(kept) == ids(whole)[45:] and keys_of(kept) == keys_of(whole)[45:]
    repeated = frame.assign(sample_id=[*range(49), 3])
    repeated.to_parquet(tmp_path / "repeated.parquet")
    with pytest.raises(UserError, match="row 49: its sample_id '3' is that of .*row 3 too"):
        ShardDataset(str(tmp_path / "repeated.parquet"), texts, {})
    select = similar(str(tmp_path / "repeated.parquet"), tmp_path / "sel2", 0.9)  # a selection that drops one of the two
    assert ids(ShardDataset(str(tmp_path / "repeated.parquet"), texts, {}, select=select)) == [45, 46, 47, 48, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "not complete: run its stage again"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "is no selection's"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": "2"}'), "its format is '2'"),
        (lambda folder: shutil.rmtree(folder / "parts"), "cannot be read"),
        (lambda folder: next((folder / "parts").iterdir()).write_bytes(b"PAR1"), "cannot be read"),
        (lambda folder: write_part(folder, [True]), "1 rows for a shard of 8"),
        (lambda folder: write_part(folder, [1] * 8), "not truth values"),
        (lambda folder: write_part(folder, [None, *[True] * 7]), "with 1 nulls"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, change, message):
    folder = write_pairs(tmp_path / "data", shards=1)
    select = similar(str(folder / "*.tar"), tmp_path / "sel")
    change(tmp_path / "sel")
    with pytest.raises(UserError, match=message):
        dataset(folder / "*.tar", select)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\na\n", "needs a column sample_id, key or json:NAME; it has name"),
        ("key,keep\n000000001,perhaps\n", "row 0: keep is 'perhaps', neither true nor false"),
        ("key,keep\n000000001,true\n000000001,false\n", "the key '000000001' is there twice, once kept and once not"),
        ("key,keep\n000000001,true\n,true\n", "row 1: no key"),
        ("key\nnobody\n", "no sample of .*00000.tar and 2 more is kept"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(tmp_path, text, message):
    folder = write_pairs(tmp_path / "data")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        dataset(folder / "*.tar", str(tmp_path / "list.csv"))
    for name in ("gone.csv", "list.txt"):
        if name == "list.txt":
            (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match=r"no file or folder|neither a stage's folder"):
            open_selection(tmp_path / name)


def test_shards_that_are_alike_are_told_apart_by_their_names(tmp_path):
    """Equal keys and sizes have one digest: of two such shards with other parts, each has its own."""
    for place, scores in (("a", (0.1, 0.9)), ("b", (0.9, 0.1))):
        (tmp_path / place).mkdir()
        with webdataset.TarWriter(str(tmp_path / place / "00000.tar"), mtime=0) as writer:
            for row, score in enumerate(scores):
                writer.write({"__key__": str(row), "txt": f"text {place}{row}", "json": {"similarity": score}})
    select = similar([str(tmp_path / place / "*.tar") for place in "ab"], tmp_path / "sel")
    shards = [index_shard(tmp_path / place / "00000.tar") for place in "ab"]
    assert shards[0].digest == shards[1].digest
    kept = selected(shards, open_selection(select))
    assert [shard.rows.tolist() for shard in kept] == [[1], [0]]
    shutil.copy(tmp_path / "a" / "00000.tar", tmp_path / "00000.tar")
    with pytest.raises(UserError, match=r"00000.tar may be .*a/00000.tar and .*b/00000.tar"):
        selected([index_shard(tmp_path / "00000.tar")], open_selection(select))


def test_splits_name_a_selection_too(tmp_path):
    folder = write_pairs(tmp_path / "data")
    given = ShardOptions(shards=str(folder / "*.tar"), select=similar(str(folder / "*.tar"), tmp_path / "sel"))
    assert given.shown() == {"shards": given.shards, "select": given.select}
    assert ids(open_dataset(given, {"text": TextModality()}, {})) == KEPT


@pytest.fixture
def config(config_file, tmp_path):
    """The small config, trained on pairs, of pictures and texts."""
    tree = yaml.safe_load(config_file.read_text())
    del tree["fields"]["audio"], tree["towers"]["audio"]
    folder = write_pairs(tmp_path / "data", shards=3, rows=40)
    tree["fields"]["image"]["modality"] = {"type": "image", "size": 16, "channels": 1}
    tree["data"] = {"train": str(folder / "*.tar"), "num_workers": 0, "block": 8, "window": 32}
    tree["evaluation"] = {}
    tree["train"] |= {"batch_size": 8, "steps": 4}
    config_file.write_text(yaml.safe_dump(tree))
    return config_file, folder


def job_of(config_file, *overrides):
    from mmcontrast.config import load_config

    loaded = load_config(config_file, overrides)
    check_components(loaded)
    return make_run_context(loaded)


def test_training_reads_a_selection(config, tmp_path):
    """A selection of one source and of several, with clusters and held-out samples: each epoch shows the kept samples once."""
    file, folder = config
    select = similar(str(folder / "*.tar"), tmp_path / "sel")
    job = job_of(file, f"data.select={select}", "data.held_out=0.2")
    kept = {s * 100 + row for s in range(3) for row in range(40) if (s * 100 + row) * 37 % 100 >= 50}
    (split,) = job.eval_datasets.values()
    trained, held = set(ids(job.dataset)), set(ids(split))
    assert trained | held == kept and not trained & held and len(held) > 3
    sources = f"{{a: {{shards: {folder}/00000.tar}}, b: {{shards: '{folder}/0000[12].tar', select: {tmp_path}/own.csv}}}}"
    (tmp_path / "own.csv").write_text("sample_id\n" + "\n".join(map(str, range(100, 120))))
    job = job_of(file, f"data.train={sources}", f"data.select={select}")
    assert isinstance(job.dataset, MixtureDataset)
    assert set(ids(job.dataset)) == {k for k in kept if k < 100} | set(range(100, 120))
    clusters = pd.DataFrame({"sample_id": sorted(kept), "cluster": [k % 3 for k in sorted(kept)]})
    clusters.to_parquet(tmp_path / "clusters.parquet")
    job = job_of(file, f"data.select={select}", f"data.clusters={tmp_path}/clusters.parquet")
    assert set(ids(job.dataset)) == kept
    with pytest.raises(UserError, match=r"data.select: .*no data.sequential"):
        job_of(file, f"data.select={select}", "data.sequential=true")


def test_a_run_with_another_selection_is_not_resumed(config, tmp_path):
    file, folder = config
    select, other = (similar(str(folder / "*.tar"), tmp_path / name, least) for name, least in (("sel", 0.3), ("other", 0.6)))
    done = train(file, *NO_EVALUATION, f"data.select={select}", "train.checkpoint_every=2", "data.record_samples=true")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "runs" / "small" / "samples.jsonl").read_text().splitlines()
    seen = [k for line in lines for k in json.loads(line)["ids"]]
    assert all(k * 37 % 100 >= 30 for k in seen) and len(set(seen)) == len(seen) == 32
    more = "train.checkpoint_every=2", "train.steps=6", "--resume"
    refused = train(file, *NO_EVALUATION, f"data.select={other}", *more)
    assert refused.returncode == 2 and "data.select was" in " ".join(refused.stderr.split())
    shutil.copytree(select, tmp_path / "moved")  # the same samples, kept elsewhere
    again = train(file, *NO_EVALUATION, f"data.select={tmp_path}/moved", *more)
    assert again.returncode == 0, again.stderr[-2000:]


def test_verify_reads_what_training_would(config, tmp_path):
    """A damaged sample that was dropped is no fault of a config that selects others; of what is kept, faults are named."""
    file, folder = config
    samples = [pair(0, row, picture=b"\xff\xd8\xff broken" if row in (3, 7) else None) for row in range(20)]
    samples[9] = pair(0, 9, sample_id=8)
    folder = write_pairs(tmp_path / "damaged", samples=[samples])
    rules = {"rules": [{"type": "pixels", "min": 1}]}
    run_stage(Filter(parse_rules(rules, "rules")), str(folder / "*.tar"), tmp_path / "well", workers=1)
    words = [str(file), f"data.train={folder}/*.tar"]
    faults = verify_sources(*_sources(words[0], words[1:]), 1, progress=False)["faults"]
    assert len(faults) == 3
    report = verify_sources(*_sources(words[0], [*words[1:], f"data.select={tmp_path}/well"]), 1, progress=False)
    (fault,) = report["faults"]
    assert report["samples"] == 18 and "000000009" in fault["where"] and "000000008" in fault["error"]


def test_ids_of_a_csv_with_gaps_are_whole_numbers(tmp_path):
    """pandas prints 1.0 where a column has gaps; in a list, and in the data."""
    pd.DataFrame({"text": ["a", "b", "c", "d"], "sample_id": [1.0, 2.0, None, 4.0]}).to_csv(tmp_path / "t.csv", index=False)
    whole = open_dataset(str(tmp_path / "t.csv"), {"text": TextModality()}, {})
    found = ids(whole)
    assert found[:2] == [1, 2] and found[3] == 4 and whole.sample_ids().tolist() == found
    for kept in ([1, 4], [1.0, 4.0]):
        pd.DataFrame({"sample_id": kept}).to_csv(tmp_path / "keep.csv", index=False)
        options = {"shards": str(tmp_path / "t.csv"), "select": str(tmp_path / "keep.csv")}
        assert len(open_dataset(options, {"text": TextModality()}, {})) == 2
    pd.DataFrame({"text": ["a"], "sample_id": [2]}).to_csv(tmp_path / "u.csv", index=False)
    with pytest.raises(UserError, match="its sample_id '2' is that of"):
        open_dataset(str(tmp_path / "[tu].csv"), {"text": TextModality()}, {})
