"""Samples held out from training: the same samples however shards are written, named or ordered; no picture on both sides."""

import io
import json
import random
import tempfile
import uuid
from collections import defaultdict
from datetime import datetime, timedelta

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmcontrast.config import load_config
from mmcontrast.data import ShardDataset, ShardOptions, all_batches, open_dataset
from mmcontrast.data.held_out import Part, divide, hashes_of, joined
from mmcontrast.data.index import open_shards
from mmcontrast.errors import UserError
from mmcontrast.modalities import ImageModality, TextModality
from mmcontrast.runs import make_run_context
from mmcontrast.suites import open_suite, run_suite
from mmcontrast.training.data import make_training_data
from tests.command import train
from tests.results import results_of

NUMBER, SHARE = 300, 0.2


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def png(k: int) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), k % 251, dtype=np.uint8) + np.arange(3, dtype=np.uint8) * (k // 251)).save(target, "PNG")
    return target.getvalue()


def sides(shards, keys=None, share=SHARE):
    """The captions of both sides, held out first."""
    modalities = {"image": ImageModality(4), "text": TextModality(context_length=8)}
    found = []
    for part in (Part(share, True), Part(share, False)):
        dataset = ShardDataset(shards, modalities, keys or {}, training=not part.held_out, part=part)
        found.append([dataset.members(k, dataset.keys["text"]) for k in range(len(dataset))])
    return [[next(iter(members.values())).decode() for members in side] for side in found]


def write_tars(folder, samples, size):
    folder.mkdir(exist_ok=True)
    for start in range(0, len(samples), size):
        with webdataset.TarWriter(str(folder / f"{start:05d}.tar")) as writer:
            for sample in samples[start : start + size]:
                writer.write(sample)
    return str(folder / "*.tar")


def test_the_side_is_that_of_the_group_in_shards_folders_and_tables(tmp_path):
    """60 groups of 5: a group is on one side, the same one in each form, shuffled, cut otherwise, or as other types of ids."""
    rows = [{"caption": f"c{k}", "group": k % 60, "k": k} for k in range(NUMBER)]
    shuffled = random.Random(0).sample(rows, len(rows))

    def tar_samples(rows, group=int):
        return [
            {"__key__": f"{r['k']:05d}", "txt": r["caption"], "png": png(r["k"]), "json": {"group_id": group(r["group"])}}
            for r in rows
        ]

    frame = pd.DataFrame(
        {"image": [f"{r['k']}.png" for r in rows], "text": [r["caption"] for r in rows], "group_id": [r["group"] for r in rows]}
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.sample(frac=1, random_state=1).to_csv(tmp_path / "b.csv", index=False)
    floats = frame.assign(group_id=frame.group_id.astype(float))  # as pandas makes of ids with gaps
    floats.to_parquet(tmp_path / "c.parquet")
    frame.drop(columns="group_id").assign(json=[json.dumps({"group_id": g}) for g in frame.group_id]).to_parquet(
        tmp_path / "d.parquet"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    for r in rows:
        (folder / f"{r['k']}.txt").write_text(r["caption"])
        (folder / f"{r['k']}.png").write_bytes(png(r["k"]))
        (folder / f"{r['k']}.json").write_text(json.dumps({"group_id": r["group"]}))
    forms = [write_tars(tmp_path / "one", tar_samples(rows), 100), write_tars(tmp_path / "two", tar_samples(shuffled, str), 37)]
    forms += [str(tmp_path / name) for name in ("a.csv", "b.csv", "c.parquet", "d.parquet", "folder")]
    found = [sides(form) for form in forms]
    held_out, rest = (set(side) for side in found[0])
    assert len(held_out) + len(rest) == NUMBER and not held_out & rest and 20 < len(held_out) < 110
    assert len({int(c[1:]) % 60 for c in held_out} | {int(c[1:]) % 60 for c in rest}) == 60
    assert not {int(c[1:]) % 60 for c in held_out} & {int(c[1:]) % 60 for c in rest}
    for form, (own, others) in zip(forms, found, strict=True):
        assert (set(own), set(others)) == (held_out, rest), form
    again = sides(forms[0])  # from what is kept of tars
    assert again == found[0] and list((tmp_path / "cache" / "index").glob("*.held-out.npz"))
    assert set(sides(forms[0], share=0.1)[0]) < held_out < set(sides(forms[0], share=0.5)[0])


def pictures_of(captions):
    return {int(caption[1:]) // 5 for caption in captions}


@pytest.mark.parametrize("kind", ["uuid", "date", "timestamp", "two csv"])
def test_groups_of_any_type_are_those_of_training(tmp_path, kind):
    """Ids are divided as training reads them; pandas prints those of a CSV's column with gaps as 1.0."""
    groups = [k // 4 for k in range(NUMBER)]
    day = datetime(2020, 1, 1)
    values = {
        "uuid": pa.array([uuid.UUID(int=group).bytes for group in groups], pa.uuid()),
        "date": pa.array([(day + timedelta(group)).date() for group in groups]),
        "timestamp": pa.array([day + timedelta(group) for group in groups]),
    }
    table = {"text": [f"c{k}" for k in range(NUMBER)], "group_id": values.get(kind, pa.array(groups))}
    if kind == "two csv":
        frame = pa.table(table).to_pandas()
        frame[:130].to_csv(tmp_path / "a.csv", index=False)
        frame[130:].assign(group_id=lambda rows: rows.group_id.where(rows.index != NUMBER - 1)).to_csv(
            tmp_path / "b.csv", index=False
        )
        shards = str(tmp_path / "*.csv")
    else:
        pq.write_table(pa.table(table), tmp_path / "t.parquet")
        shards = str(tmp_path / "t.parquet")
    text = {"text": TextModality()}
    parts = (open_dataset({"shards": shards, "held_out": 0.3}, text, {}), open_dataset(shards, text, {}, without=0.3))
    held_out, rest = ({part[k].group_id for k in range(len(part))} for part in parts)
    assert held_out and not held_out & rest
    assert len(held_out | rest) == len(set(groups)) + (kind == "two csv")  # the last row has none


def test_ids_in_bytes_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "group_id": [b"1", b"1"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column 'group_id' holds bytes, not numbers or texts"):
        open_shards(str(tmp_path / "t.parquet"))


def test_rows_that_show_one_picture_are_on_one_side(tmp_path):
    """Five captions of each of 60 pictures, in rows of their own, with no group: by path, by bytes, as datasets writes them."""
    captions, numbers = [f"c{k}" for k in range(NUMBER)], [k // 5 for k in range(NUMBER)]
    paths = [f"{'./' if k % 2 else ''}x/{n}.png" for k, n in enumerate(numbers)]
    pd.DataFrame({"filepath": paths, "text": captions}).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame({"photo": paths, "text": captions, "sample_id": range(NUMBER)}).to_csv(
        tmp_path / "b.tsv", sep="\t", index=False
    )
    pq.write_table(pa.table({"image": [png(n) for n in numbers], "text": captions}), tmp_path / "c.parquet")
    pq.write_table(
        pa.table({"image": pa.array([png(n) for n in numbers]).dictionary_encode(), "text": captions}), tmp_path / "d.parquet"
    )
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    pictures = [{"bytes": png(n), "path": None} for n in numbers]
    datasets.Dataset.from_dict({"image": pictures, "text": captions}, features=features).save_to_disk(tmp_path / "e")
    for name, keys in (
        ("a.csv", {"image": ["filepath"]}),
        ("b.tsv", {"image": ["photo"]}),
        ("c.parquet", {}),
        ("d.parquet", {}),
        ("e", {}),
    ):
        held_out, rest = sides(str(tmp_path / name), keys)
        assert len(held_out) + len(rest) == NUMBER and len(held_out) > 10, name
        assert not pictures_of(held_out) & pictures_of(rest), name


def test_rows_of_one_key_or_one_picture_are_on_one_side_over_any_chain(tmp_path):
    """Product k has the pictures k and k + 1 of each ten, so ten products make one chain."""
    rows = [(str(k // 2), f"{(k + 1) // 2 if (k + 1) // 2 % 10 else (k // 2) * 1000 + 5}.png", f"c{k}") for k in range(NUMBER)]
    pd.DataFrame(rows, columns=["key", "image", "text"]).to_csv(tmp_path / "a.csv", index=False)
    held_out, rest = ([rows[int(c[1:])] for c in side] for side in sides(str(tmp_path / "a.csv")))
    for column in (0, 1):
        assert not {row[column] for row in held_out} & {row[column] for row in rest}
    assert held_out and rest


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_chains_are_joined_as_a_search_joins_them(links):
    first, second = (np.array(numbers, dtype=np.int64) for numbers in zip(*links, strict=True))
    neighbours = defaultdict(set)
    for a, b in links:
        neighbours["a", a].add(("b", b))
        neighbours["b", b].add(("a", a))

    def least(a):
        seen, left = set(), [("a", a)]
        while left:
            if (node := left.pop()) not in seen:
                seen.add(node)
                left += neighbours[node]
        return min(number for kind, number in seen if kind == "a")

    assert joined(first, second).tolist() == [least(a) for a, _ in links]


@given(st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_that_belong_together_have_one_hash_over_several_tables(data):
    """Rows of one group; of those without one, rows of one key or one picture; tables in any order, with any types."""
    small = st.integers(0, 6)
    row = st.tuples(st.none() | small, small, st.none() | small)
    tables = data.draw(st.lists(st.lists(row, min_size=1, max_size=12), min_size=1, max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        for number, rows in enumerate(tables):
            groups, keys, pictures = zip(*rows, strict=True)
            group_type = data.draw(st.sampled_from([pa.int64(), pa.float64(), pa.string(), pa.decimal128(20, 0)]))
            columns = {
                "group_id": pa.array(groups, pa.int64()).cast(group_type),
                "key": pa.array([f"k{k}" for k in keys]),
                "image": pa.array([None if p is None else f"{p}.png" for p in pictures], pa.string()),
            }
            pq.write_table(pa.table(columns), f"{folder}/{number}.parquet")
        order = data.draw(st.permutations(range(len(tables))))
        found = hashes_of(open_shards([f"{folder}/{number}.parquet" for number in order]), ["image"])
        rows = [row for number in order for row in tables[number]]
        for (group, key, picture), one in zip(rows, found, strict=True):
            for (other_group, other_key, other_picture), other in zip(rows, found, strict=True):
                if group is not None or other_group is not None:
                    together = group == other_group
                else:
                    together = key == other_key or (picture is not None and picture == other_picture)
                assert one == other or not together
        assert len(set(found.tolist())) >= len({group for group, _, _ in rows if group is not None})


def test_without_ids_the_key_decides_whatever_the_shards_are(tmp_path):
    samples = [{"__key__": f"k{k}", "txt": f"c{k}", "png": png(k)} for k in range(NUMBER)]
    one, other = (
        sides(write_tars(tmp_path / name, rows, size)) for name, rows, size in (("a", samples, 70), ("b", samples[::-1], 9))
    )
    assert [set(side) for side in one] == [set(side) for side in other]
    more = sides(write_tars(tmp_path / "a", [*samples, *({**s, "__key__": f"new{k}"} for k, s in enumerate(samples))], 70))
    assert set(one[0]) <= set(more[0])  # data that are added change nobody's side
    broken = write_tars(tmp_path / "c", [{**s, "json": b"{" if k % 2 else b"{}"} for k, s in enumerate(samples)], 70)
    assert [set(side) for side in sides(broken)] == [set(side) for side in one]


def test_the_order_of_training_knows_what_is_held_out_and_never_shows_it(tmp_path):
    """Not even in the place of a sample that cannot be decoded; which, held out, is absent and reported."""
    samples = [{"__key__": f"k{k}", "txt": f"c{k}", "png": b"none" if k % 3 == 0 else png(k)} for k in range(NUMBER)]
    shards = write_tars(tmp_path / "a", samples, 70)
    modalities = {"image": ImageModality(4), "text": TextModality(context_length=8)}
    held_out, rest = ({f"k{c[1:]}" for c in side} for side in sides(shards))
    training = ShardDataset(shards, modalities, {}, training=True, part=Part(SHARE, False))
    seen = [training[0, k] for k in range(len(training))]
    assert {sample.metadata["key"] for sample in seen} <= rest and any(sample.replaces for sample in seen)
    assert (
        len(
            {
                ShardDataset(shards, modalities, {}, part=part).digest
                for part in (None, Part(0.2, False), Part(0.3, False), Part(0.2, True))
            }
        )
        == 4
    )
    split = open_dataset(ShardOptions(shards=shards, held_out=SHARE), modalities, {})
    batches = list(all_batches(split, 16))
    assert {entry["key"] for batch in batches for entry in batch.metadata} == held_out
    bad = [
        entry["key"]
        for batch in batches
        for entry, here in zip(batch.metadata, batch.present["image"], strict=True)
        if not here
    ]
    assert bad and all(int(key[1:]) % 3 == 0 for key in bad) and len(bad) == sum(len(batch.replaced) for batch in batches)
    with pytest.raises(UserError, match="cannot identify|not an image|cannot be decoded|k0"):
        list(all_batches(open_dataset(shards, modalities, {}), 16))


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_too_few_on_a_side_are_refused_with_a_share_that_works(tmp_path, share):
    shards = write_tars(tmp_path / "a", [{"__key__": f"k{k}", "txt": f"c{k}", "png": png(k)} for k in range(12)], 5)
    with pytest.raises(
        UserError, match="12 samples, of 12 groups, are held out, and each side takes 2 at least: a share of "
    ) as error:
        divide(open_shards(shards), Part(share, True), [])
    better = float(str(error.value).partition("a share of ")[2].split()[0])
    assert min(map(len, sides(shards, share=better))) >= 2
    same = write_tars(
        tmp_path / "b", [{"__key__": f"k{k}", "txt": "c", "png": png(k), "json": {"group_id": 1}} for k in range(12)], 5
    )
    with pytest.raises(UserError, match="of 12 samples, of 1 groups, .*: name evaluation.splits of other data"):
        divide(open_shards(same), Part(0.5, True), [])


def test_splits_name_what_is_held_out(config_file, corpus, tmp_path):
    def splits(*overrides):
        splits = load_config(config_file, overrides).evaluation.splits
        return {name: ShardOptions.of(shards) for name, shards in splits.items()}

    train_shards, share = str(corpus / "train-*.tar"), ["data.held_out=0.3"]
    own = ShardOptions(shards=train_shards, held_out=0.3)
    assert splits(*share) == splits()  # a split of its own is named: nothing is added
    assert splits(*share, "evaluation.splits={}") == {"held_out": own}
    assert splits(*share, "evaluation.splits={val: held_out, other: x.tar}") == {
        "val": own,
        "other": ShardOptions(shards="x.tar"),
    }
    both = "data.train={a: {shards: a.csv, keys: {text: [title]}, weight: 2}, b: {shards: b.csv, files: /b}}"
    of_a, of_b = (
        ShardOptions(shards="a.csv", keys={"text": ["title"]}, held_out=0.3),
        ShardOptions(shards="b.csv", files="/b", held_out=0.3),
    )
    assert splits(*share, both, "evaluation.splits={}") == {"a": of_a, "b": of_b}
    assert splits(*share, both, "evaluation.splits={val: held_out:b}") == {"val": of_b}
    for overrides, message in (
        (["evaluation.splits={val: held_out}"], "evaluation.splits.val: held_out: nothing is held out: set data.held_out"),
        ([*share, both, "evaluation.splits={val: held_out}"], "of which source. There is held_out:a, held_out:b"),
        ([*share, "evaluation.splits={val: held_out:c}"], "of which source. There is held_out$"),
        ([f"evaluation.splits={{val: {{shards: '{train_shards}', held_out: 0.1}}}}"], "would be trained on"),
        ([f"evaluation.splits={{val: {{shards: ['{train_shards}'], held_out: '0.4'}}}}", *share], "would be trained on"),
        ([*share, "evaluation.splits={val: {shards: x.tar, held_out: much}}"], "held_out: .*valid number"),
        (["data.held_out=much"], "data.held_out: .*valid number"),
        (["data.held_out=1.5"], "data.held_out: .*less than 1"),
        (["data.held_out=0"], "data.held_out: .*greater than 0"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(config_file, overrides)
    config_file.write_text(load_config(config_file, [*share, "evaluation.splits={}"]).to_yaml())
    assert splits() == {"held_out": own}
    with pytest.raises(UserError, match="held_out: 0.3 of data.train is held out there, but data.held_out is 0.1"):
        splits("data.held_out=0.1")
    config = load_config(config_file, ["data.sequential=true"])
    with pytest.raises(UserError, match="data.held_out.*no data.sequential"):
        make_training_data(config.data, config.fields, None, 16, 0)


def test_several_sources_have_a_split_each(config_file, corpus):
    tars = sorted(map(str, corpus.glob("train-*.tar")))
    tree = yaml.safe_load(config_file.read_text())
    tree["data"] |= {"train": {"a": {"shards": tars[:2]}, "b": {"shards": tars[2]}}, "held_out": 0.3}
    tree["evaluation"] = {}
    config_file.write_text(yaml.safe_dump(tree))
    job = make_run_context(load_config(config_file, ["train.epochs=1"]))
    assert list(job.eval_datasets) == ["a", "b"]
    for name, split in job.eval_datasets.items():
        source = job.dataset.sources[name]
        ids = [{one.sample_id(k) for k in range(len(one))} for one in (split, source)]
        assert len(split) + len(source) == 32 * (1 + (name == "a")) and not ids[0] & ids[1]
    assert job.options.total_steps == len(job.dataset) // 16


def test_a_run_is_evaluated_on_what_it_was_not_trained_on(config_file, tmp_path):
    options = ["data.held_out=0.3", "evaluation.splits={}", "evaluation.geometry=false", "data.record_samples=true"]
    done = train(config_file, *options, "train.steps=5")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    config = load_config(run / "config.yaml")
    job = make_run_context(config)
    held_out = {job.eval_datasets["held_out"].sample_id(k) for k in range(len(job.eval_datasets["held_out"]))}
    seen = {number for line in (run / "samples.jsonl").read_text().splitlines() for number in json.loads(line)["ids"]}
    assert held_out and not held_out & seen and len(held_out) + len(job.dataset) == 96
    results = results_of(run)
    assert results["held_out/retrieval/image_to_text/num_queries"] == len(held_out)
    again = run_suite(str(run), open_suite(str(run), None, ["resamples=0"], tmp_path / "again")).values  # by another command
    assert again.keys() == results.keys()
    one = 1.01 / len(held_out)  # of another number of threads, two candidates may change places
    assert all(again[name] == pytest.approx(value, rel=one, abs=one) for name, value in results.items())
    refused = train(config_file, *options, "data.held_out=0.4", "--resume", "train.steps=7")
    message = " ".join(refused.stderr.split())
    assert refused.returncode == 2 and "cannot resume" in message and "(data.held_out was 0.3, is 0.4)" in message
