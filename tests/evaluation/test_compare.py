"""`mmcontrast compare` on files of results, old and new."""

import json
import math

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmcontrast.cli import app
from mmcontrast.errors import UserError
from mmcontrast.evaluation.compare import FORMAT, compare, lower_is_better, unique_names


def write(folder, results, digest="d0", **about):
    """A run's folder whose results.json is of today's format; values are numbers or (value, low, high)."""
    folder.mkdir(parents=True)
    entries = {
        name: {"value": of} if not isinstance(of, tuple) else dict(zip(("value", "low", "high"), of, strict=True))
        for name, of in results.items()
    }
    splits = {name.partition("/")[0]: {"digest": digest, "samples": 9} for name in results}
    content = {"format": FORMAT, "data": splits, "results": entries} | about
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def runs(tmp_path):
    recall, rank = "val/retrieval/image_to_text/recall_at_1", "val/retrieval/image_to_text/median_rank"
    a = write(tmp_path / "x/base", {recall: (0.50, 0.48, 0.52), rank: (4.0, 3.0, 5.0), "val/retrieval/num_queries": 100})
    b = write(tmp_path / "x/better", {recall: (0.56, 0.54, 0.58), rank: (9.0, 8.0, 9.5), "val/zero_shot/script/top1": 0.9})
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "results.json").write_text(json.dumps({recall: 0.51, rank: math.nan, "test/retrieval/[odd]/recall_at_1": 0.25}))
    return [a, b, flat]


def command(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_a_table_of_runs(runs):
    done = command(*runs)
    assert done.exit_code == 0, done.output
    rows = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in done.stdout.splitlines()
        if "│" in line
    }
    assert rows["retrieval/image_to_text/recall_at_1"] == ["0.500 [0.480, 0.520]", "0.560 [0.540, 0.580] ▲", "0.510"]
    assert rows["retrieval/image_to_text/median_rank"] == ["4.0 [3.0, 5.0]", "9.0 [8.0, 9.5] ▼", "nan"]
    assert rows["zero_shot/script/top1"] == ["", "0.900", ""] and rows["retrieval/[odd]/recall_at_1"] == ["", "", "0.250"]
    assert "val" in rows and "test" in rows and not any("num_queries" in row for row in rows)
    assert "▲ ▼ better, worse than base" in done.stdout and "warning" not in done.output


def test_the_best_and_what_lies_outside_both_intervals(tmp_path):
    a = write(tmp_path / "a", {"v/r/recall": (0.5, 0.4, 0.6), "v/r/median_rank": (5, 4, 6)})
    b = write(tmp_path / "b", {"v/r/recall": (0.65, 0.45, 0.85), "v/r/median_rank": (2, 1, 3)})
    found = compare([a, b])
    assert [found.best(name) for name in found.names] == [0.65, 2]
    assert [found.mark(name, found.runs[1]) for name in found.names] == ["", "▲"]  # 0.5 is within b's interval of recall
    assert found.mark("v/r/median_rank", found.runs[0]) == "" and compare([a]).best("v/r/recall") is None
    lower = ["v/geometry/text/uniformity", "github/x/mean_rank", "v/geometry/a_b/modality_gap", "v/geometry/a_to_b/hubness"]
    assert all(map(lower_is_better, lower)) and not lower_is_better("v/geometry/text/effective_rank")
    assert not any(map(lower_is_better, ("rank/zero_shot/gap/top1", "v/zero_shot/rank/top1", "v/retrieval/loss/recall_at_1")))


def test_other_data_are_warned_of(tmp_path):
    a, b, c = (
        write(tmp_path / name, {"val/x/top1": 0.5}, digest) for name, digest in (("a", "1234"), ("b", "1234"), ("c", "99"))
    )
    assert not compare([a, b]).warnings()
    done = command(a, b, c)
    assert done.exit_code == 0
    assert "warning: val: not the same data: a 1234, b 1234, c 99; do not compare" in done.stderr
    for name, number in (("d", 100), ("e", 90)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"val/x/num_samples": number, "val/x/top1": 0.5}))
    (warning,) = compare([tmp_path / "d.json", tmp_path / "e.json"]).warnings()
    assert warning == "val: not the same data or options: x/num_samples is d 100, e 90"


def test_probes_that_were_trained_on_other_data_are_warned_of(tmp_path):
    a, b = (write(tmp_path / name, {"val/probe/p/linear/top1": 0.5, "val/x/top1": 0.1}) for name in "ab")
    for folder, digest in ((a, "one"), (b, "all")):
        content = json.loads((folder / "results.json").read_text())
        content["data"] |= {"probe p": {"digest": digest, "samples": 9}, "probe other": {"digest": digest, "samples": 9}}
        (folder / "results.json").write_text(json.dumps(content))
    assert compare([a, b]).warnings() == ["probe p: not the same data: a one, b all"]


def test_other_settings_are_warned_of(tmp_path):
    options = {"scoring": None, "whiten": False, "resamples": 10}
    a = write(tmp_path / "a", {"val/x/top1": 0.5}, options=options, model={"precision": "fp32"})
    b = write(tmp_path / "b", {"val/x/top1": 0.5}, options=options | {"resamples": 0}, model={"precision": "fp32"})
    assert not compare([a, b]).warnings()
    c = write(tmp_path / "c", {"val/x/top1": 0.5}, options=options | {"scoring": "csls"}, model={"precision": "bf16"})
    assert compare([a, c]).warnings() == [
        'not evaluated alike: precision is a "fp32", c "bf16"', 'not evaluated alike: scoring is a null, c "csls"'
    ]  # fmt: skip
    tasks = {"zero_shot": {"k": {"label": "a" * 99, "templates": ["{}"], "splits": []}}, "captions": {"val": []}}
    d = write(tmp_path / "d", {"val/x/top1": 0.5}, options=tasks, data={"val": {"keys": {"text": ["title"]}}})
    other = {"zero_shot": {"k": {"label": "a" * 99, "templates": "openai_imagenet"}, "more": {}}, "captions": {"val": ["text"]}}
    e = write(tmp_path / "e", {"val/x/top1": 0.5}, options=other, data={"val": {"keys": {"text": ["caption"]}}})
    assert [warning.removeprefix("not evaluated alike: ") for warning in compare([d, e]).warnings()] == [
        'captions.val is d [], e ["text"]',
        'keys of val is d {"text": ["title"]}, e {"text": ["caption"]}',
        'zero_shot.k is d {"templates": ["{}"]}, e {"templates": "openai_imagenet"}',
    ]


def test_as_json_and_by_name(runs):
    done = command(*runs, "--json", "--match", "val/*recall_at_1")
    found = json.loads(done.stdout)
    assert [run["name"] for run in found["runs"]] == ["base", "better", "flat"]
    (name,) = found["results"]
    assert name == "val/retrieval/image_to_text/recall_at_1"
    assert found["results"][name]["better"] == {"value": 0.56, "low": 0.54, "high": 0.58, "n": None, "mark": "▲"}
    assert compare(runs, "num_*").names == ["val/retrieval/num_queries"]
    assert compare(runs, "val/retrieval").names == [
        "val/retrieval/image_to_text/recall_at_1",
        "val/retrieval/image_to_text/median_rank",
    ]
    assert compare(runs, "recall*").names == compare(runs, "recall_at_1").names != []


def test_pictures_and_pages(runs, tmp_path):
    done = command(*runs, "--png", tmp_path / "c.png", "--html", tmp_path / "c.html")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(2**24)) > 50
    page = (tmp_path / "c.html").read_text()
    assert page.count("<svg") == 1 and "<b>0.560 [0.540, 0.580]</b> ▲" in page
    assert command(*runs, "--png", tmp_path / "c.svg").exit_code == 0 and "<svg" in (tmp_path / "c.svg").read_text()


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / name for name in ("a/run", "b/run", "b/v1.5", "a/run/results.json", "c/other.json")]
    assert unique_names(paths) == ["a/run", "b/run", "b/v1.5", "a/run (2)", "c/other"]
    assert unique_names(paths[1:3]) == ["run", "v1.5"]


def test_mistakes(runs, tmp_path):
    other = tmp_path / "other.json"
    for content, message in [
        ("[1]", "is no results.json"),
        ("{", "is no results.json"),
        ('{"a": {"b": 1}}', "is no results.json: KeyError 'value'"),
        (
            '{"format": "mmcontrast results 7"}',
            "its format is 'mmcontrast results 7', this version reads 'mmcontrast results 1'",
        ),
    ]:
        other.write_text(content)
        with pytest.raises(UserError, match=message.replace("[", "\\[")):
            compare([other])
    for arguments, message in [
        ([tmp_path / "nowhere"], "no results (No such file or directory): give the folder of a run that was evaluated"),
        ([*runs, "--match", "recal_at_1"], "--match 'recal_at_1' fits no result's name; did you mean 'recall_at_1'?"),
        ([*runs, "--png", "c.gif"], "--png c.gif: give a file that ends in .png, .svg or .pdf"),
        ([*runs, "--html", tmp_path / "no" / "c.html"], "no such folder"),
    ]:
        done = command(*arguments)
        assert done.exit_code == 2 and message in done.stderr, done.output


def test_long_lists_begin_with_what_is_looked_at_first(tmp_path):
    names = [
        f"{split}/retrieval/a_to_b/{metric}" for split in "xyz" for metric in ("recall_at_1", "recall_at_5", "median_rank")
    ]
    few = [f"x/zero_shot/t/{metric}" for metric in ("top1", "top5")]
    for number, chosen in enumerate((names + few, names * 1 + [f"x/geometry/{k}" for k in range(20)])):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(dict.fromkeys(chosen, 0.5)))
        found = compare([file])
        shown = found.headline().names
        assert shown == found.names if number == 0 else shown == [n for n in names if n.endswith("recall_at_1")]
