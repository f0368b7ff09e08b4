"""Configs: overrides, defaults, and one line for every mistake."""

import runpy
from pathlib import Path

import pytest
import timm
import torch
import typer
import yaml
from typer.testing import CliRunner

from mmcontrast.cli import app
from mmcontrast.config import config_of, load_config
from mmcontrast.errors import UserError
from mmcontrast.plan import without_downloads
from mmcontrast.run_checks import check_components, tell_of_normalisation
from mmcontrast.runs import completed, model_of
from mmcontrast.training.cost import fakes
from tests.command import mmcontrast

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid_and_open_with_their_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = without_downloads(load_config(path))  # tokenizers of the hub stay there
    with fakes():
        fields = completed(config, model_of(config, tokenizers=False, weights=False)) if config.model.starts else config
    check_components(fields)
    assert f"mmcontrast train configs/{path.name}" in path.read_text().splitlines()[0]


def test_a_config_whose_fields_are_its_starts_is_printed():
    """They are known once the model is open, which printing it does not take."""
    start = str(ROOT / "configs" / "clip-vit-b-32.yaml")
    for overrides in (["pairing={type: anchor, field: text}"], ["data.negatives={field: text, table: m.parquet}"]):
        done = CliRunner().invoke(app, ["config", start, *overrides])
        assert done.exit_code == 0 and yaml.safe_load(done.stdout)["model"]["start"], done.output
    refused = CliRunner().invoke(app, ["config", start, "pairing={type: anchored}"])
    assert refused.exit_code == 2 and "anchored" in refused.output


def test_pictures_for_pretrained_weights_that_had_another_mean_are_told_of(tmp_path, caplog):
    small = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    torch.save(timm.create_model("resnet18", **small).state_dict(), tmp_path / "weights.pth")
    tree = {"run": {"name": "x"}, "data": {"train": "x.tar"}, "train": {"steps": 1, "batch_size": 2}, "model": {"embed_dim": 8}}
    picture, vector = {"type": "image", "size": 32}, {"type": "vector", "width": 4}
    tree["fields"] = {"image": {"modality": picture, "tower": "image"}, "v": {"modality": vector, "tower": "v"}}
    tree["towers"] = {"v": {"type": "linear", "inputs": 4, "width": 8}}
    tree["towers"]["image"] = {"type": "timm", "model": "resnet18", "pretrained": str(tmp_path / "weights.pth"), **small}
    config = config_of(tree)
    tell_of_normalisation(config, model_of(config))
    assert "the weights of towers.image had mean [0.485, 0.456, 0.406]" in caplog.text
    caplog.clear()
    picture |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    config = config_of(tree)
    tell_of_normalisation(config, model_of(config))
    assert not caplog.text


def test_overrides_reach_every_level(config_file):
    config = load_config(
        config_file, ["train.steps=50", "train.lr=1e-3", "objective=siglip", "fields.image.modality.size=12", "run.name=x"]
    )
    assert (config.train.steps, config.train.lr, config.objective, config.run.name) == (50, 0.001, "siglip", "x")
    assert config.fields["image"].modality["size"] == 12


def test_the_folder_of_runs_is_where_the_environment_says(config_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    for given, folder in (("~/runs", "/home/someone/runs"), ("$SCRATCH/r", "/scratch/r"), ("${SCRATCH}/~", "/scratch/~")):
        assert load_config(config_file, [f"run.dir={given}"]).run.dir == folder
    with pytest.raises(UserError, match=r"run.dir: it names a variable that is not set .found '\$NOWHERE/runs'"):
        load_config(config_file, ["run.dir=$NOWHERE/runs"])


def test_the_resolved_config_reads_back_as_itself(config_file, tmp_path):
    config = load_config(config_file, ["train.betas=[0.9,0.95]"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


def test_the_runs_name_defaults_to_the_files(config_file):
    tree = yaml.safe_load(config_file.read_text())
    del tree["run"]["name"]
    config_file.write_text(yaml.safe_dump(tree))
    assert load_config(config_file).run.name == "small"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=5", "unknown key 'train.stps'; did you mean 'steps'"),
        ("trian.steps=5", "unknown key 'trian'; did you mean 'train'"),
        ("evaluation.zero_shot.script.lable=x", "did you mean 'label'"),
        ("fields.image.towre=x", "did you mean 'tower'"),
        ("train.steps=many", "train.steps: input should be a valid integer"),
        ("train.batch_size=-1", "train.batch_size: input should be greater than 0"),
        ("data.train={a: {shard: x}}", "unknown key 'data.train.a.shard'; did you mean 'shards'"),
        ("data.train={a: {shards: x, weight: -1}}", "data.train.a.weight: input should be greater than 0"),
        ("data.train=[a, 3]", "data.train.1: input should be a valid string"),
        ("train.steps", "not of the form key.key=value"),
        ("objective=infonse", "did you mean 'infonce'"),
        ("objective.beta=0.5", "'infonce' has no option 'beta'; there is"),
        ("pairing={type: anchor, field: picture}", "no field 'picture'"),
        ("pairing.weights={image-txt: 2.0}", "no term is named 'image-txt'; there is"),
        ("pairing.weights={image-text: -2.0}", "pairing 'all_pairs': the weight of 'image-text' is -2.0"),
        ("objective={type: hard_negative, beta: -1}", "objective 'hard_negative': beta is -1, it must be ≥ 0"),
        ("fields.image.modality.sise=3", "did you mean 'size'"),
        ("fields.image.modality={type: image}", "missing a required argument: 'size'"),
        ("objective=no_such_lab.losses:Mine", "cannot be imported: No module named 'no_such_lab'"),
        ("train.precision=fp8", "train.precision: input should be 'fp32', 'tf32', 'bf16' or 'fp16'"),
    ],
)
def test_mistakes_are_one_line_that_helps(config_file, override, message):
    with pytest.raises(UserError) as caught:
        check_components(load_config(config_file, [override]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_that_stands_twice_is_a_mistake(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  steps: 1\n  steps: 2\n")
    with pytest.raises(UserError, match="'steps' twice"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=nowhere/x-*.tar"], "no shard at 'nowhere/x-*.tar'"),
        (["train.stps=1"], "did you mean 'steps'"),
        (["fields.image.tower=imge"], "did you mean 'image'"),
        (["towers.image.model=resnet1b"], "timm has no model 'resnet1b'"),
        (["train.batch_size=1000"], "96 samples, fewer than train.batch_size=1000"),
        (["--resume"], "no run at"),
    ],
)
def test_the_command_says_it_in_one_line_and_exits_with_2(config_file, arguments, message):
    done = mmcontrast("train", config_file, *arguments)
    error = [line for line in done.stderr.splitlines() if not line.startswith("preparing")]
    assert done.returncode == 2
    assert len(error) == 1 and error[0].startswith("error:") and message in error[0]
    assert not (config_file.parent / "runs").exists()


def test_the_config_command_prints_what_would_run(config_file):
    done = mmcontrast("config", config_file, "train.steps=7")
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["train"]["steps"] == 7


def commands(group, path=()):
    """Yield every command with the words that call it."""
    for name, one in group.commands.items():
        yield (*path, name), one
        if hasattr(one, "commands"):
            yield from commands(one, (*path, name))


def test_help_says_what_each_command_does_and_each_option_means():
    found = dict(commands(typer.main.get_command(app)))
    assert {("train",), ("evaluate",), ("embed",), ("data", "verify"), ("data", "inspect")} <= found.keys()
    for path, one in found.items():
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0, path
        first = (one.help or "").strip().splitlines()[0]
        assert len(first.split()) >= 4 and first.split()[0] in shown.stdout, f"{path} does not say what it does"
        for option in one.params:
            words = max(option.opts, key=len)
            assert words == "--help" or option.help, f"{path} {words} says nothing"
            if option.param_type_name == "option":
                assert words in shown.stdout, f"{path} does not show {words}"


def test_null_restores_a_default_or_takes_an_entry_away(config_file):
    """null restores a default where it is no value itself."""
    plain = load_config(config_file)
    given = ["fields.image.keys=[jpg]", "evaluation.retrieval_at=[3]", "train.warmup_steps=7", "train.ema_decay=0.9"]
    nulls = [f"{override.partition('=')[0]}=null" for override in given]
    restored = load_config(config_file, [*given, *nulls])
    assert restored.evaluation.retrieval_at == [1, 5, 10] and restored.train.warmup_steps == 0
    assert restored.train.ema_decay is None and restored.fields["image"].keys == plain.fields["image"].keys
    less = load_config(config_file, ["fields.audio=null", "towers.audio=null", "evaluation=null"])
    assert list(less.fields) == [field for field in plain.fields if field != "audio"] and not less.evaluation.splits
    with pytest.raises(UserError, match="train.batch_size: field required"):
        load_config(config_file, ["train.batch_size=null"])


def test_the_reference_of_options_is_fresh_and_says_what_each_is():
    made = runpy.run_path(str(ROOT / "docs" / "make_options.py"))["page"]()
    assert (ROOT / "docs" / "options.md").read_text() == made, "run python docs/make_options.py"
    unsaid = [line for line in made.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not unsaid, unsaid


def test_files_of_tasks_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    assert set(config.evaluation.zero_shot) == {"script", "category"}
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config(ROOT / "configs" / "quickstart.yaml", ["evaluation.zero_shot.script=nowhere.yaml"])


def test_frozen_towers_by_name(config_file):
    def frozen(*overrides):
        return load_config(config_file, overrides).train.freeze

    assert frozen("train.freeze=[image, logit_bias, towers.text.network.*]") == {
        "towers.image.*": None, "logit_bias": None, "towers.text.network.*": None,
    }  # fmt: skip
    assert frozen("train.freeze=[image]", "train.unfreeze_at={text: 5, image: 9}") == {"towers.image.*": 9, "towers.text.*": 5}
    assert frozen("train.unfreeze_at={text: 5}") == {"towers.text.*": 5} == frozen("train.freeze={towers.text.*: 5}")
    with pytest.raises(UserError, match=r"train.freeze.0|train.freeze"):
        load_config(config_file, ["train.freeze=[3]"])


@pytest.mark.parametrize(
    ("words", "override"),
    [
        ("finetune a b --lr 1e-3", "train.lr=…"),
        ("train a.yaml --batch-size=8", "train.batch_size=…"),
        ("train a.yaml --data.num-workers 0", "data.num_workers=…"),
        ("evaluate a --resamples 0", "(an override has no dashes: resamples=…)"),
        ("evaluate a --lr 0", None),
        ("train a.yaml --wd 0", None),
    ],
)
def test_an_option_that_is_an_override_is_named(words, override):
    done = CliRunner().invoke(app, words.split(), env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "No such option" in done.stderr
    assert (override or "") in done.stderr and ("has no dashes" in done.stderr) is bool(override), done.stderr
