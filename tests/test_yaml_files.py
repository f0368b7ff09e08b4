"""YAML from anybody: values as PyYAML reads them, or one line; no code, no bomb."""

import string
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mmcontrast.cli import app
from mmcontrast.config import load_config, load_suite
from mmcontrast.errors import UserError
from mmcontrast.yaml_files import dump_yaml, parse_yaml, read_yaml

LETTERS = Path(__file__).parents[1] / "configs" / "letters.yaml"
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 30))
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k} {{{', '.join(f'{n}: *a{k - 1}' for n in range(9))}}}\n" for k in range(1, 30)
)
BAD = {
    "brackets": "[" * 20_000,
    "closed brackets": "[" * 20_000 + "]" * 20_000,
    "braces": "{a: " * 20_000,
    "dashes": "- " * 20_000 + "a",
    "indented": "".join(f"{' ' * k}a:\n" for k in range(2_000)),
    "laughs": LAUGHS,
    "merged laughs": MERGED,
    "merge keys": "a0: &a0 {x: 1}\n"
    + "".join(f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 10)}]}}\n" for k in range(1, 30)),
    "itself": "a: &a [*a]",
    "itself in a mapping": "a: &a {b: {c: *a}}",
    "python object": "a: !!python/object/apply:os.system ['touch MARKER']",
    "python name": "a: !!python/name:os.system",
    "python module": "a: !!python/module:antigravity",
    "python tuple": "a: !!python/tuple [1]",
    "python new": "!!python/object/new:subprocess.Popen [['touch', 'MARKER']]",
    "own tag": "a: !own {b: 1}",
    "digits": f"a: {'9' * 5_000}",
    "date": "a: 2001-99-99",
    "timestamp": "a: !!timestamp nothing",
    "integer": "a: !!int nothing",
    "float": "a: !!float nothing",
    "boolean": "a: !!bool nothing",
    "binary": "a: !!binary é",
    "list as key": "? [a]\n: b",
    "twice": "a: 1\na: 2",
    "twice beside what is merged": "a: &a {b: 1}\nc: {<<: *a, b: 2, b: 3}",
    "two merges": "a: &a {b: 1}\nc: {<<: *a, <<: *a}",
    "equal keys": "1: a\ntrue: b",
    "no character": 'a: "\\U99999999"',
    "half a pair": 'a: "\\ud800"',
    "two documents": "a: 1\n---\nb: 2",
    "control characters": "a: \x01",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, text = tmp_path / "bad.yaml", BAD[name]
    file.write_text(text)
    for read in (read_yaml, load_config, load_suite) if name in ("laughs", "python object") else (read_yaml,):
        with pytest.raises(UserError, match="bad.yaml is not YAML") as caught:
            read(file)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (tmp_path / "MARKER").exists()


def test_the_command_says_it_in_one_line(tmp_path, config_file):
    (tmp_path / "bad.yaml").write_text(BAD["brackets"])
    for arguments in (["config", tmp_path / "bad.yaml"], ["config", config_file, f"run.name={'[' * 20_000}"]):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 2 and "error:" in done.stderr and "Traceback" not in done.output


def test_an_override_of_one_of_two_that_an_anchor_names_leaves_the_other():
    """As configs/letters.yaml has them, whose image and audio towers are one in the file."""
    config = load_config(LETTERS, ["towers.image.layers=[2, 2, 2, 2]"])
    assert config.towers["image"]["layers"] == [2, 2, 2, 2] and config.towers["audio"]["layers"] == [1, 1, 1, 1]


def test_what_is_meant_is_read_as_before(tmp_path):
    shared = "base: &b {a: 1, b: [2, 3]}\nmore: {<<: *b, c: 4}\nagain: [*b, *b]"
    merged = "base: &b {a: 1, b: 2}\nmore: {<<: *b, b: 3}\nthen: {b: 4, <<: *b}\n"
    merged += "both: &m {<<: [*b, {a: 5, c: 6}], c: 7}\nend: {<<: *m}"
    for text in (shared, merged, "", "# nothing", "1e-3", "a: 1_000", "a: 0x1f", "- yes\n- ~", "a: '007'", "a: &x 1\nb: *x"):
        assert parse_yaml(text) == (float(text) if text == "1e-3" else yaml.safe_load(text))
    deep = "[" * 60 + "]" * 60
    assert parse_yaml(deep) == yaml.safe_load(deep)
    wide = {f"class {k}": [f"a photo of {k}", "another"] for k in range(1000)}
    assert parse_yaml(dump_yaml(wide)) == wide


ODD = ["12e4567", "1e5", "1_000", "0x1f", "yes", "2024-01-01", "1:30", "007", "é"]


@pytest.mark.parametrize("text", [*ODD, "", "~", "null", "a\x85b\u2028c"])
def test_a_text_that_looks_like_something_else_stays_a_text(config_file, text):
    """As the short name of a commit may: a run's own config.yaml has it as it was, and an override means what it says."""
    tree = {text: [text], "in": {"a list": [1e5, 1, True, None, text]}}
    assert parse_yaml(dump_yaml(tree)) == tree
    if text in ODD:
        config = load_config(
            config_file, [f"run.name={text}", f"evaluation.zero_shot.script.classes={{{text!r}: [a], b: [b]}}"]
        )
        assert config.run.name == text
        config_file.write_text(config.to_yaml())
        assert load_config(config_file) == config and text in config.evaluation.zero_shot["script"].classes
    assert load_config(config_file, ["run.name=null"]).run.name == "small"


def test_a_number_where_a_file_has_a_text_is_said(tmp_path, config_file):
    config_file.write_text(config_file.read_text().replace("name: small", "name: 12e4567"))
    with pytest.raises(UserError, match=r"run.name: .* \(found 'inf'\): YAML reads a float there, so write the text in quotes"):
        load_config(config_file)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=" \n-:[]{}&*!<>|%@?,#'\"\\.~=0123456789abexuU\x85\u2028" + string.ascii_letters[:4], max_size=60))
def test_any_text_is_read_or_refused(text):
    began = time.process_time()
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError:
        return
    assert time.process_time() - began < 5
    assert repr(parse_yaml(dump_yaml(tree))) == repr(tree)
