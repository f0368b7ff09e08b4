"""Tables as other people write them: pandas, Excel, DuckDB, polars; texts stay as they stand, metadata is not lost. And
captions in a sample's json."""

import csv
import datetime
import decimal
import io
import json
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcontrast.config import load_config
from mmcontrast.data import ShardDataset, StreamDataset, all_batches, open_shards, write_shard
from mmcontrast.data.inspect import inspect_shards
from mmcontrast.data.verify import Reading, verify_shards
from mmcontrast.data_commands import _reading
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality, VectorModality
from tests.data.samples import png

CLAP = Path(__file__).parent.parent.parent / "configs" / "clap.yaml"
ODD = ["007", "1e5", "true", "NA", "null", "NaN", "None", "1.0", "0x1F", "-0", "2020-01-01", "12:30", "1,5", "inf", " padded ",
       'say "hi"', "two\nlines", "a\r\nb", "été", "日本", "💙", "=SUM(A1)", "'quoted'", "a;b\tc",
       "1_000", "£3", "\ufeffx"]  # fmt: skip


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


class Bytes(TextModality):
    """The bytes that a field gets, one token each."""

    def tokens(self, raw):
        return torch.tensor(list(raw.encode()), dtype=torch.int64)


def texts(path, keys=("text",), **options):
    dataset = ShardDataset(str(path), {"text": Bytes()}, {"text": list(keys)}, **options)
    samples = [dataset[0, k] for k in range(len(dataset))]
    assert all(sample.error is None for sample in samples), samples
    return [bytes(s.values["text"].tolist()).decode() if s.values else None for s in samples], [s.metadata for s in samples]


def write(frame, path, how):
    if how == "pandas":
        frame.to_csv(path, index=False)
    elif how == "pandas, all quoted":
        frame.to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    elif how == "Excel":  # a mark of the order of bytes, CRLF
        frame.to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n")
    elif how == "Excel with semicolons":
        frame.to_csv(path, index=False, sep=";", encoding="utf-8-sig", lineterminator="\r\n")
    elif how == "tabs":
        frame.to_csv(path, index=False, sep="\t")
    else:
        frame.to_parquet(path, index=False)


@pytest.mark.parametrize("how", ["pandas", "pandas, all quoted", "Excel", "Excel with semicolons", "tabs", "Parquet"])
def test_captions_stay_as_they_stand(tmp_path, how):
    """Each alone in its column, as the odd one after a thousand others, and as the first of them."""
    path = tmp_path / ("x.parquet" if how == "Parquet" else "x.csv")
    columns = {f"c{k}": [odd, *["17"] * 300, odd, None] for k, odd in enumerate(ODD)}
    write(pd.DataFrame({"seconds": ["1"] * 303, **columns}), path, how)
    (shard,) = open_shards(str(path))
    for k, odd in enumerate(ODD):
        expected = [odd.encode(), b"17", odd.encode(), None]
        assert [shard.read(row, [f"c{k}"]).get(f"c{k}") for row in (0, 1, 301, 302)] == expected
    assert texts(path, ["c0"])[0][:2] == ["007", "17"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_caption_column_of_pandas_round_trips(tmp_path_factory, data):
    """CSV and Parquet of text, of text as a category: captions and labels are what they were."""
    alphabet = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")  # pandas leaves a lone \r bare
    entry = st.one_of(st.none(), st.text(alphabet, max_size=12), st.sampled_from(ODD))
    values = data.draw(st.lists(entry, min_size=1, max_size=8))
    folder = tmp_path_factory.mktemp("tables")
    frame = pd.DataFrame({"n": range(len(values)), "text": pd.Series(values, dtype=object)})
    how = data.draw(st.sampled_from(["pandas", "pandas, all quoted", "Excel", "Excel with semicolons", "Parquet", "category"]))
    if how == "category":
        frame["text"] = frame["text"].astype("category")
    path = folder / ("x.parquet" if how in ("Parquet", "category") else "x.csv")
    write(frame, path, how)
    (shard,) = open_shards(str(path))
    got = [shard.read(row, ["text"]).get("text") for row in range(len(shard))]
    expected = [value.encode() if value or (value == "" and path.suffix == ".parquet") else None for value in values]
    assert got == expected
    metadata = [json.loads(shard.read(row, ["json"])["json"]) for row in range(len(shard))]
    assert [entry["n"] for entry in metadata] == list(range(len(values)))
    for value, entry in zip(values, metadata, strict=True):
        assert str(entry.get("text", "")) == (value or ""), "a number is one only where its text is that of it"


def test_numbers_are_metadata_where_they_are_safe(tmp_path):
    rows = {
        "i": ["1", "-2", ""], "f": ["0.5", "", "1e-05"], "mixed": ["1", "2.5", ""], "padded": ["01", "2", "3"],
        "long": ["1.50", "2.0", "3.0"], "big": [str(2**64), "1", "2"], "words": ["true", "NA", "1"], "late": ["", "", "7"],
    }  # fmt: skip
    pd.DataFrame(rows | {"text": ["a", "b", "c"]}).to_csv(tmp_path / "x.csv", index=False)
    for _ in range(2):  # the second time from the copy
        _, read = texts(tmp_path / "x.csv")
        assert [[metadata.get(name) for metadata in read] for name in rows] == [
            [1, -2, None], [0.5, None, 1e-05], [1, 2.5, None], ["01", "2", "3"], ["1.50", "2.0", "3.0"],
            [str(2**64), "1", "2"], ["true", "NA", "1"], [None, None, 7],
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["cat", "dog", None], pa.dictionary(pa.int8(), pa.string())),
        ([b"cat", b"dog", None], pa.binary_view()),
        (["cat", "dog", None], pa.string_view()),
        (["cat", "dog", None], pa.large_string()),
        ([["a", "b"], [], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        ([["a", "b"], ["c"], None], pa.list_(pa.string_view())),
        ([[1.5, 2.0, 3.0, 4.0], [0.0] * 4, None], pa.list_(pa.float32(), 4)),
        ([[1, 2], [3], None], pa.large_list(pa.int64())),
        ([{"a": "x", "b": [1, 2]}, {"a": None, "b": []}, None], pa.struct([("a", pa.string()), ("b", pa.list_(pa.int8()))])),
        ([{"a": "x"}, {"a": "y"}, None], pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))])),
        ([datetime.datetime(2020, 1, 2, 3, 4, 5, 6), None, None], pa.timestamp("us", "UTC")),
        ([1577934245000000007, None, None], pa.timestamp("ns")),
        ([datetime.date(2020, 1, 2), None, None], pa.date32()),
        ([datetime.time(1, 2, 3), None, None], pa.time64("us")),
        ([datetime.timedelta(seconds=3), None, None], pa.duration("s")),
        ([decimal.Decimal("1.50"), decimal.Decimal("-2.00"), None], pa.decimal128(10, 2)),
        ([True, False, None], pa.bool_()),
        ([2**63 + 5, 1, None], pa.uint64()),
        ([float("nan"), float("inf"), 0.5], pa.float64()),
        ([0.5, 1.5, None], pa.float16()),
        ([uuid.UUID(int=5).bytes, None, None], pa.uuid()),
        ([["x", "y"], ["z"], None], pa.map_(pa.string(), pa.int8())),
    ],
    ids=lambda value: str(value) if isinstance(value, pa.DataType) else "",
)
def test_columns_of_every_type_are_metadata(tmp_path, values, kind):
    if pa.types.is_map(kind):
        values = [[(name, 1) for name in entry or ()] for entry in values]
    column = pa.array([value if value is None or kind != pa.float16() else np.float16(value) for value in values], kind)
    pq.write_table(pa.table({"text": ["a", "b", "c"], "extra": column}), tmp_path / "x.parquet")
    try:
        pq.read_table(tmp_path / "x.parquet")
    except pa.ArrowInvalid:  # what pyarrow itself cannot read: before version 26 the rows of a list of fixed size that are null
        with pytest.raises(UserError, match="x.parquet cannot be read as a table"):
            texts(tmp_path / "x.parquet")
        return
    read = [metadata.get("extra") for metadata in texts(tmp_path / "x.parquet")[1]]
    if pa.types.is_binary_view(kind):
        assert read == [None] * 3
        assert verify_shards(str(tmp_path / "x.parquet"), 1, progress=False)["notes"] == ["2 members .extra"]
        return
    assert read[0] is not None or values[0] != values[0]
    expected = {
        pa.float32(): values,
        pa.timestamp("ns"): ["2020-01-02 03:04:05.000000007", None, None],
        pa.date32(): ["2020-01-02", None, None],
        pa.time64("us"): ["01:02:03.000000", None, None],
        pa.decimal128(10, 2): ["1.50", "-2.00", None],
        pa.float64(): [None, None, 0.5],
        pa.uuid(): [str(uuid.UUID(int=5)), None, None],
    }.get(kind)
    if expected:
        assert read == expected
    elif isinstance(values[0], str | list | bool | int | float | dict) and not pa.types.is_map(kind):
        assert read == values
    assert json.dumps(read, allow_nan=False)
    sizes = open_shards(str(tmp_path / "x.parquet"))[0]
    assert sizes.has("extra").tolist() == [value is not None for value in values]
    assert (sizes.sizes_of("extra") >= 0).tolist() == sizes.has("extra").tolist()
    assert [*inspect_shards([str(tmp_path / "x.parquet")])]


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int8(), pa.string()), pa.string_view(), pa.large_string()], ids=str)
def test_captions_and_keys_of_every_type_of_text(tmp_path, kind):
    pq.write_table(pa.table({"key": pa.array(["k", "l"], kind), "text": pa.array(["007", None], kind)}), tmp_path / "x.parquet")
    read, metadata = texts(tmp_path / "x.parquet")
    assert read == ["007", None] and [entry["key"] for entry in metadata] == ["k", "l"]
    assert open_shards(str(tmp_path / "x.parquet"))[0].sizes_of("text").tolist() == [3, -1]


def test_vectors_are_members_and_a_column_json_is_metadata(tmp_path):
    rows = {
        "npy": [[float(k)] * 100 for k in range(2)],
        "json": [{"sample_id": "u1", "caption": "deep"}, {"sample_id": "u2", "caption": None}],
        "other": ['{"a": 1}', None],
    }
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    dataset = ShardDataset(
        str(tmp_path / "x.parquet"), {"vector": VectorModality(100), "text": Bytes()}, {"text": ["json:caption"]}
    )
    (batch,) = all_batches(dataset, 2)
    assert batch.values["vector"][1].tolist() == [1.0] * 100 and "npy" not in batch.metadata[0]
    assert batch.metadata[0]["sample_id"] == "u1" and batch.present["text"].tolist() == [True, False]
    pq.write_table(pa.table({"text": ["a"], "json": ['{"caption": "x"}']}), tmp_path / "y.parquet")
    assert texts(tmp_path / "y.parquet", ["json:caption"])[0] == ["x"]


def test_spaces_around_the_names_of_columns_are_none_of_theirs(tmp_path, caplog):
    (tmp_path / "x.csv").write_text("text , group_id\na,7\nb,7\n")
    dataset = ShardDataset(str(tmp_path / "x.csv"), {"text": Bytes()}, {"text": ["text"]})
    (batch,) = all_batches(dataset, 2)
    assert batch.metadata[0]["group_id"] == 7 and len(set(batch.group_ids.tolist())) == 1 and not caplog.records
    (tmp_path / "y.csv").write_text("text,Group_ID\na,7\nb,7\n")
    ShardDataset(str(tmp_path / "y.csv"), {"text": Bytes()}, {"text": ["text"]})
    assert "column 'Group_ID' is not read as group_id: rename it" in caplog.text


def test_a_quote_within_a_cell_is_a_character(tmp_path):
    """An inch is written 5", as pandas and pyarrow read it."""
    (tmp_path / "x.csv").write_text('text,n\na pipe of 5" and more,1\nb,2\n')
    assert texts(tmp_path / "x.csv", ["text"])[0] == ['a pipe of 5" and more', "b"]


def test_quotes_of_a_table_with_tabs_may_be_text(tmp_path):
    """Dumps of captions do not quote; what pandas writes does."""
    lines = ['a "quoted" dog', '"quoted start of a caption', "a horse", '"another one', '"said" he']
    (tmp_path / "x.tsv").write_text("text\tn\n" + "".join(f"{line}\t{k}\n" for k, line in enumerate(lines)))
    assert texts(tmp_path / "x.tsv", ["text"])[0] == lines
    pd.DataFrame({"text": [*lines, "two\nlines"], "n": range(6)}).to_csv(tmp_path / "y.tsv", sep="\t", index=False)
    assert texts(tmp_path / "y.tsv", ["text"])[0] == [*lines, "two\nlines"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text,n\ncaf\xe9,1\n".encode("latin-1"), "x.csv is not UTF-8: save it as that"),
        (b"text,n\n" + b"a,1\n" * 5_000 + b"caf\xe9,1\n", "x.csv is not UTF-8"),
        ("text,n\ncafé,1\n".encode("utf-16"), "x.csv is not UTF-8"),
        (b"text,n\n", "no sample in 1 shards"),
        (b"", "cannot be read as a table"),
        (b"\n\n", "x.csv"),
        (b"text,n\na,1\nb\n", r"cannot be read as a table \(CSV parse error: (Row #3: )?Expected 2 columns, got 1"),
        (b"text,text\na,1\n", "two columns have one name"),
        (b'text,n\n"a ""b"", c",1\n"d\ne",2\n"f,3\ng,4\n', "x.csv: a quote that opens in line 5 is never closed"),
        (b'text,n\n"a b,1\nc,2\n"d e,3\nf,4\n', "x.csv: a cell that begins with a quote in line 2 goes on after the next"),
        (
            b"x.csv,a cat\ny.png,a dog\n",
            r"taken for the names of columns, and 'x.csv' is a file's: begin it with a line like image",
        ),
        (b"http://a/b.png;a cat\ny.png;a dog\n", "begin it with a line like image,text"),
    ],
)
def test_what_is_no_table_is_said_in_a_line(tmp_path, monkeypatch, data, message):
    monkeypatch.setattr("mmcontrast.data.arrow_copies.CSV_BLOCK", 2**12)
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        ShardDataset(str(tmp_path / "x.csv"), {"text": Bytes()}, {})


def test_no_samples_are_refused_in_every_kind_of_shard(tmp_path):
    write_shard(tmp_path / "x.tar", [])
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    for name in ("x.tar", "folder", "x.parquet"):
        with pytest.raises(UserError, match="no sample in 1 shards"):
            ShardDataset(str(tmp_path / name), {"text": Bytes()}, {})


def audio_shard(path):
    """As LAION's audio shards: captions are entries of the json, one or several; other things beside them."""
    about = [
        {"text": ["a dog barks", "barking\nof a dog"], "tag": ["dog"], "original_data": {"title": "t"}},
        {"text": "rain", "tag": []},
        {"text": [], "tag": []},
        {"tag": ["none"]},
    ]
    soundfile.write(sound := io.BytesIO(), np.linspace(-1, 1, 400), 8000, format="FLAC")
    write_shard(path, [{"__key__": str(k), "flac": sound.getvalue(), "json": entry} for k, entry in enumerate(about)])
    return path


def test_captions_may_be_entries_of_the_json(tmp_path):
    path = audio_shard(tmp_path / "x.tar")
    assert texts(path, ["json:text"])[0] == ["a dog barks\nbarking of a dog", "rain", None, None]
    assert texts(path, ["json:text.1", "json:original_data.title"])[0] == ["barking\nof a dog", None, None, None]
    assert texts(path, ["txt", "json:tag", "json:text"])[0] == ["dog", "rain", None, "none"]
    with pytest.raises(UserError, match=r"has a member \.json:captoin; they have .*\.json:text"):
        texts(path, ["json:captoin"])
    dataset = ShardDataset(str(path), {"text": Bytes()}, {"text": ["json:original_data"]})
    assert "sample '0', member .json:original_data: a structure of title, not a text" in dataset[0, 0].error
    stream = StreamDataset(str(path), {"text": Bytes()}, {"text": ["json:text"]}, 0)
    seen = {sample.metadata["key"]: bool(sample.values) for sample, _ in zip(stream, range(40), strict=False)}
    assert seen == {"0": True, "1": True, "2": False, "3": False}
    assert dataset.members(0, ["json:tag"])["json:tag"] == b"dog"
    assert dataset.lengths("text", np.arange(4)).min() > 0
    faults = verify_shards(str(path), 1, progress=False, reading=Reading({"text": Bytes()}, {"text": ["json:original_data"]}))
    assert [(fault["sample"], fault["member"]) for fault in faults["faults"]] == [("0", "json")]


def test_one_of_several_captions_is_drawn_with_its_weight(tmp_path):
    rows = [{"__key__": f"{k:03d}", "txt": "old", "json": {"new": "new", **({} if k else {"rare": "x"})}} for k in range(400)]
    del rows[7]["txt"]
    write_shard(tmp_path / "x.tar", rows)
    keys = [{"json:new": 0.7, "txt": 0.3}]
    assert set(texts(tmp_path / "x.tar", keys)[0]) == {"new"}, "the first in evaluation"
    drawn = texts(tmp_path / "x.tar", keys, training=True)[0]
    assert drawn == texts(tmp_path / "x.tar", keys, training=True)[0] and drawn[7] == "new"
    assert 230 < Counter(drawn)["new"] < 330 and texts(tmp_path / "x.tar", keys, training=True, seed=1)[0] != drawn
    tables = pa.table({"old": ["old"] * 400, "new": ["new"] * 400})
    pq.write_table(tables, tmp_path / "x.parquet")
    assert 230 < Counter(texts(tmp_path / "x.parquet", [{"new": 7, "old": 3}], training=True)[0])["new"] < 330


def test_a_config_takes_entries_and_weights(tmp_path):
    path = audio_shard(tmp_path / "x.tar")
    config = load_config(CLAP, ['fields.text.keys=[{"json:text": 0.7, txt: 0.3}, caption]', f"data.train={path}"])
    assert config.fields["text"].keys == [{"json:text": 0.7, "txt": 0.3}, "caption"]
    for wrong in ("[{txt: 0}]", "[{}]", "[{txt: -1}]", "[{txt: often}]"):
        with pytest.raises(UserError, match=r"fields\.text\.keys"):
            load_config(CLAP, [f"fields.text.keys={wrong}"])


def test_the_config_of_clap_reads_the_shards_that_it_names(tmp_path):
    config = load_config(CLAP)
    found, _ = texts(audio_shard(tmp_path / "x.tar"), config.fields["text"].keys)
    assert found[:2] == ["a dog barks\nbarking of a dog", "rain"]
    modality = Bytes(captions=config.fields["text"].modality["captions"])
    dataset = ShardDataset(str(tmp_path / "x.tar"), {"text": modality}, {"text": config.fields["text"].keys}, training=True)
    drawn = {bytes(dataset[epoch, 0].values["text"].tolist()) for epoch in range(20)}
    assert drawn == {b"a dog barks", b"barking of a dog"}


def test_files_of_columns_with_names_of_their_own_are_decoded(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(png())
    (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
    (tmp_path / "x.csv").write_text("photo,text\n" + "".join(f"pictures/{k}.png,words {k}\n" for k in range(3)))
    plain = verify_shards(str(tmp_path / "x.csv"), 1, progress=False)
    assert [fault["error"] for fault in plain["faults"]] == [
        "column 'photo' names 3 files, 1 of which are missing: --keys FIELD=photo says which"
    ]
    assert "column 'photo' names 3 files, which were not read: add --keys FIELD=photo" in plain["notes"][0]
    for field in ("image", "photo"):
        report = verify_shards(str(tmp_path / "x.csv"), 1, progress=False, reading=_reading([f"{field}=photo"], None))
        assert [fault["sample"] for fault in report["faults"]] == ["x-1", "x-2"]
        assert "row 1, sample 'x-1', member .photo (pictures/1.png)" in report["faults"][0]["where"]
        assert "pictures/2.png cannot be read: No such file" in report["faults"][1]["error"]
