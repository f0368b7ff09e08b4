"""The commands that data_pipelines/recipes open with, as they stand there, and what they say a training's config has."""

import json
import re
import shlex

import open_clip
import pytest
import torch
import torch.nn.functional as F
import typer
import yaml

from mmcontrast.cli import app
from mmcontrast.config import config_of
from mmcontrast.curation.rules import presets
from mmcontrast.runs import make_run_context
from tests.command import ROOT
from tests.curation.pairs import pair, write_pairs
from tests.curation.tables import write_table

RECIPES = {path.stem: path for path in (ROOT / "data_pipelines" / "recipes").glob("*.yaml")}
SHARDS, FEW = "data/{00000..00099}.tar", "data/{00000..00001}.tar"
ROWS = 12  # of each of two shards


def commands(name: str) -> list[list[str]]:
    """Return the words of the commands that a recipe opens with."""
    opening = RECIPES[name].read_text(encoding="utf-8").partition("\n#\n")[0]
    lines = [line.removeprefix("# mmcontrast ") for line in opening.splitlines()]
    assert lines and all(f"# mmcontrast {line}" in opening for line in lines)
    return [shlex.split(line) for line in lines]


def run(name: str) -> None:
    """Run a recipe's commands on two shards; of embed, which needs a model's weights, only ask whether its words are right."""
    for words in commands(name):
        assert words.count(SHARDS) == (words[:2] not in (["data", "dedup-near"], ["data", "mine"]))
        words = [FEW if word == SHARDS else word for word in words]
        if words[0] == "embed":
            typer.main.get_command(app).commands["embed"].make_context("embed", words[1:])
            model, _, weights = words[1].partition("/")
            assert model == "runs" or (model, weights) in open_clip.list_pretrained()
        else:
            app(words, standalone_mode=False)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two shards in data/, and the table of a model that finds samples 0, 1 and 12 alike, as their pictures are."""
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    about = {"relations": 1, "actions": 1, "spotted_characters": 4}
    samples = [[pair(shard, row, **about) for row in range(ROWS)] for shard in range(2)]
    samples[0][3] = pair(0, 3, **about | {"relations": 0})
    samples[0][4] = pair(0, 4, **about | {"actions": 0})
    samples[0][5] = pair(0, 5, **about | {"spotted_characters": 5})
    samples[0][6] = pair(0, 6, **about | {"relations": None})
    write_pairs(tmp_path / "data", samples=samples)
    ids = torch.tensor([shard * 100 + row for shard in range(2) for row in range(ROWS)])
    torch.manual_seed(0)
    image = F.normalize(torch.randn(len(ids), 16))
    image[[1, 12]] = F.normalize(image[0] + 0.01 * torch.randn(2, 16))
    text = F.normalize(image + 0.3 * torch.randn(len(ids), 16))
    write_table(tmp_path / "table", {"image": image, "text": text}, ids // 2, ids)
    return ids.tolist()


def job_of(name: str, config_file):
    """Return the job of a small config with what a recipe adds to it."""
    tree = yaml.safe_load(config_file.read_text())
    del tree["fields"]["audio"], tree["towers"]["audio"]
    tree |= {"evaluation": {}, "data": {"train": FEW, "num_workers": 0, "block": 8, "window": 16}}
    added = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
    assert added.keys() == {"data"}
    tree["data"] |= added["data"]
    tree["train"] |= {"steps": 1, "batch_size": 8}
    return make_run_context(config_of(tree))


def test_every_recipe_opens_with_its_commands():
    assert RECIPES.keys() == {"datacomp-basic", "laion", "cat", "metaclip", "semdedup", "hard-negatives"}
    for name in RECIPES:
        for words in commands(name):
            command = typer.main.get_command(app)
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            command.make_context("mmcontrast", words)  # refuses options that it does not have
        assert re.search(r"arXiv:\d{4}\.\d{5}", RECIPES[name].read_text()), "its source"
    for name in presets():
        (words,) = commands(name)
        assert words[-2:] == ["--rules", name] and words[:2] == ["data", "filter"]


def test_cat_reads_what_others_have_measured(data, tmp_path):
    run("cat")
    summary = json.loads((tmp_path / "selections" / "cat" / "summary.json").read_text())
    assert summary["kept"] == 2 * ROWS - 4
    assert summary["reasons"] == {
        "json:actions < 1": 1, "json:relations < 1": 1, "json:spotted_characters > 4": 1, "no json:relations": 1,
    }  # fmt: skip


def test_metaclip(data, tmp_path, config_file):
    (tmp_path / "entries.txt").write_text("fox\nowl\na photo of a teapot\n")
    run("metaclip")
    summary = json.loads((tmp_path / "selections" / "balanced" / "summary.json").read_text())
    matching = [number for number in data if number % 8 in (0, 1, 5)]  # pairs.NAMES
    assert summary["kept"] == len(matching) and summary["reasons"] == {"matches no entry": len(data) - len(matching)}
    dataset = job_of("metaclip", config_file).dataset
    assert sorted(dataset.sample_id(position) for position in range(len(dataset))) == matching


def test_semdedup(data, tmp_path, config_file):
    run("semdedup")
    summary = json.loads((tmp_path / "unique.summary.json").read_text())
    assert (
        summary["dropped"] == 2
        and summary["dropped_at_epsilon"].keys() >= {"0.05"}
        and len(summary["dropped_at_epsilon"]) == 10
    )
    dataset = job_of("semdedup", config_file).dataset
    kept = {dataset.sample_id(position) for position in range(len(dataset))}
    assert len(kept) == len(data) - 2 and len(kept & {0, 1, data[12]}) == 1


def test_hard_negatives(data, tmp_path, config_file):
    run("hard-negatives")
    summary = json.loads((tmp_path / "mined.summary.json").read_text())
    assert summary["queries"] == len(data) and summary["options"]["count"] == 10 and summary["negatives"] > len(data)
    job = job_of("hard-negatives", config_file)
    batch = job.dataset.collate([job.dataset[place] for place in range(4)])
    assert {name for name in batch.values if "negative" in name} == {"text.negative.0", "text.negative.1"}
