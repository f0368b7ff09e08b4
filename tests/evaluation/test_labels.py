"""Labels: every column that pandas writes meets its classes or is refused; prompts that cannot be filled in are refused."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmcontrast.config import load_suite
from mmcontrast.data import write_shard
from mmcontrast.data.class_texts import check_template, filled
from mmcontrast.errors import UserError
from mmcontrast.evaluation.labels import ClassLabels, label_text
from mmcontrast.evaluation.results import results_table
from tests.evaluation.text_model import WORDS, text_model, zero_shot

TRUTH = [0, 1, 2, 0, 1, 2, 2, 2]
NAMES, MAPPING = WORDS[:3], {str(label): [word] for label, word in enumerate(WORDS[:3])}


@pytest.fixture(scope="module")
def embedder():
    return text_model()


def write(folder, labels, kind):
    """A table as pandas writes it."""
    frame = pd.DataFrame({"txt": [WORDS[k % 6] for k in range(len(labels))], "label": labels})
    path = folder / f"{len(list(folder.iterdir()))}.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    return path


def expected(embedder, truth):
    """top1 by a product of all with all."""
    rows = embedder.embed(texts=[WORDS[k % 6] for k in range(len(truth))], progress=False)
    found = (rows @ embedder.embed(texts=WORDS[:3], progress=False).T).argmax(1).tolist()
    pairs = [(a, b) for a, b in zip(found, truth, strict=True) if b is not None]
    return sum(a == b for a, b in pairs) / len(pairs), len(pairs)


LACKING = [None if k == 3 else label for k, label in enumerate(TRUTH)]
COLUMNS = {
    "int64": (np.array(TRUTH), TRUTH),
    "uint8": (np.array(TRUTH, dtype="uint8"), TRUTH),
    "float64": (np.array(TRUTH, dtype="float64"), TRUTH),
    "float32": (np.array(TRUTH, dtype="float32"), TRUTH),
    "ints that a gap made floats": (pd.Series(LACKING), LACKING),
    "Int64": (pd.array(LACKING, dtype="Int64"), LACKING),
    "Float32": (pd.array(LACKING, dtype="Float32"), LACKING),
    "text": ([str(label) for label in TRUTH], TRUTH),
    "string": (pd.array([None if label is None else str(label) for label in LACKING], dtype="string"), LACKING),
    "text of floats": ([f"{label}.0" for label in TRUTH], TRUTH),
    "text with spaces": ([f" {label}  " for label in TRUTH], TRUTH),
    "bool": (np.array(TRUTH) > 0, [int(label > 0) for label in TRUTH]),
    "boolean": (pd.array([None, True, False, True], dtype="boolean"), [None, 1, 0, 1]),
    "text of bool": (["True", "False", "true", "false"], [1, 0, 1, 0]),
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_of_pandas_meet_their_classes(embedder, tmp_path, kind):
    for k, (name, (column, truth)) in enumerate(COLUMNS.items()):
        top1, number = expected(embedder, truth)
        found = zero_shot(embedder, write(tmp_path, column, kind), MAPPING if k % 2 == (kind == "csv") else NAMES)
        assert found.values["val/zero_shot/task/num_samples"] == number, name
        assert found.values["val/zero_shot/task/top1"] == pytest.approx(top1), name
        lacking = truth.count(None)
        assert found.values.get("val/zero_shot/task/num_unlabelled", 0) == lacking, name
        assert any(f"without a label are left out: {lacking}" in note for note in found.notes) == (lacking > 0), name


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (["00", "01", "02"], MAPPING, "'00' (1), '01' (1), '02' (1); the 3 classes are '0', '1', '2'; '00' is not '0', '01'"),
        (["Red", "green", "green"], {word: [word] for word in NAMES}, "'Red' (1); the 3 classes are 'red', 'green', 'blue'"),
        (["small-cat", "dog", "dog"], {"small cat": ["cat"], "dog": ["dog"]}, "'small-cat' is not 'small cat'"),
        (["x", "y", "redd"], {word: [word] for word in NAMES}, "'x' (1), 'y' (1), 'redd' (1); the 3 classes are"),
        ([0, 1, 3], NAMES, "'3' (1); the list names 3 classes, which are the labels 0 to 2"),
        ([0, 1, -1], NAMES, "'-1' (1); the list names 3 classes"),
        ([0.5, 1.0, 2.0], NAMES, "'0.5' (1); the list names 3 classes"),
        ([None, None, None], NAMES, "no sample has the label 'label'"),
        ([1, 0, 1], {"true": ["red"], "false": ["blue"]}, "'1' (2), '0' (1); the 2 classes are 'true', 'false'"),
    ],
)  # fmt: skip
def test_labels_that_are_no_class_are_refused_before_anything_is_embedded(
    embedder, tmp_path, labels, classes, message, monkeypatch
):
    monkeypatch.setattr(embedder.model, "forward", None)
    folder = tmp_path / "shards"
    folder.mkdir()
    samples = [{"__key__": f"s{k}", "txt": WORDS[k], "json": {"label": label}} for k, label in enumerate(labels)]
    write_shard(folder / "0.tar", samples)
    with pytest.raises(UserError) as error:
        zero_shot(embedder, folder / "0.tar", classes)
    assert message in str(error.value) and "val/zero_shot/task" in str(error.value)


def test_what_is_left_out_is_told(embedder, tmp_path):
    labels = ["red", "green", "hebrew", "hebrew", None, "arabic", "red"]
    found = zero_shot(embedder, write(tmp_path, labels, "parquet"), {word: [word] for word in NAMES})
    assert found.values["val/zero_shot/task/num_samples"] == 3
    assert found.values["val/zero_shot/task/num_other_labels"] == 3 and found.values["val/zero_shot/task/num_unlabelled"] == 1
    (note,) = found.notes
    assert "are left out: 3, of 'hebrew' (2), 'arabic' (1); classes without samples: 1 of 3" in note
    assert str(results_table(found).caption) == note and found.to_json({})["notes"] == [note]


def test_a_label_in_a_member_of_its_own(embedder, tmp_path):
    samples = [{"__key__": f"s{k}", "txt": WORDS[k], "cls": text} for k, text in enumerate(["0", " 1\n", "02", "1.0"])]
    write_shard(tmp_path / "0.tar", samples)
    task = {"label": "cls", "field": "text", "prompt_field": "text", "classes": NAMES}
    found = zero_shot(embedder, tmp_path / "0.tar", NAMES, zero_shot={"task": task})
    assert found.reports["val/zero_shot/task"][0].support.tolist() == [1, 2, 1]


def test_probes_match_the_labels_of_two_tables(embedder, tmp_path):
    train = write(tmp_path, np.array([0, 1] * 8), "parquet")
    test = write(tmp_path, pd.Series([0, 1, None, 1]), "csv")
    other = write(tmp_path, ["a", "b", "a", "b"], "csv")
    probe = {"train": str(train), "label": "label", "field": "text", "kinds": ["knn"]}
    found = zero_shot(embedder, test, NAMES, zero_shot={}, probes={"p": probe})
    assert found.values["val/probe/p/knn/num_samples"] == 3 and found.values["val/probe/p/num_unlabelled"] == 1
    with pytest.raises(UserError, match=r"val/probe/p: labels that are no class: 'a' \(2\), 'b' \(2\)"):
        zero_shot(embedder, other, NAMES, zero_shot={}, probes={"p": probe})


def templates(given):
    return {"splits": {"v": "x"}, "zero_shot": {"z": {"label": "l", "classes": ["a", "b"], "templates": given}}}


def classes(given):
    return {"splits": {"v": "x"}, "zero_shot": {"z": {"label": "l", "classes": given}}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (templates(["a photo of {}", "a photo"]), "'a photo' has no placeholder"),
        (templates([""]), "'' has no placeholder"),
        (templates(["a {{c}}"]), "'a {{c}}' has no placeholder"),
        (templates(["a photo of a {classname}."]), "the placeholder {classname}: write {} or {c}"),
        (templates(["{c} in {d}"]), "the placeholder {d}"),
        (templates(["{c.name}"]), "the placeholder {c.name}"),
        (templates(["{1}"]), "the placeholder {1}"),
        (templates(["{} and {}"]), "'{} and {}' cannot be filled in"),
        (templates(["a {"]), "'a {' cannot be filled in"),
        (templates(["{0} or {}"]), "'{0} or {}' cannot be filled in"),
        (templates(["{c:.10}"]), "the placeholder {c:.10}"),
        (templates(["{c!a}"]), "the placeholder {c!a}"),
        (templates(["{:{c}}"]), "the placeholder {:{c}}"),
        (templates("openai"), "no templates of the name 'openai'"),
        (classes("imagnet"), "no classes of the name 'imagnet'; did you mean 'imagenet'?"),
        (classes(["a", " "]), "the class '1' has an empty name"),
        (classes(["a"]), "two classes at least"),
        (classes({"a": ["x"], "b": [""]}), "the class 'b' has an empty name"),
        (classes({"1": ["x"], 1: ["y"]}), "2 classes have the label '1'"),
        (classes({"a": ["x"], "a ": ["y"]}), "the label 'a' is that of 2 classes"),
    ],
)
def test_prompts_and_classes_are_refused_when_options_are_read(tree, message, tmp_path):
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as error:
        load_suite(tmp_path / "suite.yaml")
    assert message in str(error.value) and "zero_shot.z." in str(error.value)


def test_labels_that_yaml_reads_as_numbers(tmp_path):
    (tmp_path / "suite.yaml").write_text(
        "zero_shot: {z: {label: l, classes: {2: [a], 3.0: [b], yes: [c]}, templates: ['{0}!']}}"
    )
    assert list(load_suite(tmp_path / "suite.yaml").zero_shot["z"].classes) == ["2", "3", "True"]
    (tmp_path / "suite.yaml").write_text("zero_shot: {z: {label: l, classes: {1: [a], yes: [c]}}}")
    with pytest.raises(UserError, match="two keys are equal, like 1 and true"):
        load_suite(tmp_path / "suite.yaml")


ints, floats = st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False)
labels = st.one_of(ints, floats, st.booleans(), st.text(min_size=1).filter(str.strip))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(label=labels, others=st.lists(labels, max_size=5))
def test_a_label_is_its_own_class_however_it_is_written(label, others):
    """As JSON, as the text of itself, as numpy's, and as the float that pandas makes of an int."""
    names = list(dict.fromkeys(text for value in [label, *others] if (text := label_text(value))))
    same = ClassLabels(names)
    number = names.index(label_text(label))
    forms = [label, json.loads(json.dumps(label)), f" {label_text(label)}\n"]
    forms += [np.array([label])[0]] if isinstance(label, float | bool) else []
    forms += [float(label), np.int64(label), str(label)] if type(label) is int else []
    for form in forms:
        assert same.match([form], "x").numbers.tolist() == [number], form


@settings(max_examples=100, deadline=None)
@given(
    template=st.lists(st.sampled_from(["{}", "{c}", "{0}", "{{", "}}", "{", "}", "{c!r}", "{x}", "a ", "é"])).map("".join),
    phrase=st.text(),
)
def test_a_template_is_refused_or_holds_the_phrase(template, phrase):
    try:
        check_template(template)
    except ValueError:
        return
    assert phrase in filled(template, phrase) and filled(template, "x") != filled(template, "y")


@settings(max_examples=30, deadline=None)
@given(value=st.one_of(st.none(), st.just(math.nan), st.text(alphabet=" \t\n\u00a0"), st.just(pd.NA), st.just(pd.NaT)))
def test_nothing_is_no_label(value):
    assert label_text(value) is None


@pytest.mark.parametrize("value", [["a", "b"], (1, 2), {"a": 1}])
def test_several_values_are_no_label(value):
    with pytest.raises(UserError, match="is several values: a label is one"):
        label_text(value)
