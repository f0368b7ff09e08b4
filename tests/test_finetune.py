"""`mmcontrast finetune`: a model and a table in; a run that is evaluated before and after, and a config that repeats it."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pandas
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import BertConfig, BertModel

import mmcontrast
from mmcontrast.cli import app
from mmcontrast.config import config_of
from mmcontrast.errors import UserError
from mmcontrast.finetune import make_config
from mmcontrast.finetune_request import Request
from mmcontrast.runs import make_run_context, model_of
from mmcontrast.training.optim import freeze
from tests.command import NO_EVALUATION, ROOT, Process, train
from tests.command import mmcontrast as command
from tests.models.conftest import architecture, architectures  # noqa: F401 - fixtures
from tests.models.open_clip_models import save
from tests.models.samples import TEXTS, pictures, tokenizer

DRAFT = {"run": {"name": "x"}, "data": {"train": "none.csv"}, "train": {"steps": 1, "batch_size": 2}}


@pytest.fixture
def start(tmp_path) -> str:
    return str(save(tmp_path / "start", "clip"))


@pytest.fixture
def pairs(tmp_path) -> Path:
    """48 pairs, in the columns that open_clip's own training reads, and one that no field is."""
    return write_pairs(tmp_path, "filepath", "title")


def write_pairs(folder, image, text, more=()):
    """Write a table with pandas, as users do, beside the pictures that it names."""
    drawn = pictures(folder)
    files = [Path(shutil.copy(drawn[k % 6], folder / f"{k}{drawn[k % 6].suffix}")) for k in range(48)]
    columns = {image: [file.name for file in files], text: [f"{TEXTS[k % 4]} number {k}" for k in range(48)]}
    table = pandas.DataFrame(columns | {"price": range(0, 144, 3)} | {name: f"{name} of all" for name in more})
    table.to_csv(folder / "pairs.csv", index=False)
    return folder / "pairs.csv"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_table_a_model_and_nothing_else(start, pairs, tmp_path):
    """Columns are found by what they hold; a part is held out; results at step 0 are those of the model as it was."""
    done = command("finetune", start, pairs, "--epochs", 1, "--name", "shoes", f"run.dir={tmp_path}/runs", "train.threads=1")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    for words in ("fields.text.keys", "title", "train.lr", "1e-05", "data.held_out", "infonce", "the model has no logit bias"):
        assert words in said
    run = tmp_path / "runs" / "shoes"
    evaluations = lines_of(run / "evaluations.jsonl")
    steps = [line["step"] for line in lines_of(run / "metrics.jsonl")]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == steps[-1] and len(evaluations) == 2
    assert "before" in (run / "report.html").read_text().lower()

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["start"] == start and config["fields"]["text"]["keys"] == ["title"]
    complete = command("finetune", start, pairs, "--name", "shoes", "--resume", f"run.dir={tmp_path}/runs")
    assert complete.returncode == 0 and "chosen" not in complete.stderr, complete.stderr
    repeated = [start, pairs, "--epochs", 3, "--name", "shoes", "--resume", f"run.dir={tmp_path}/runs", "train.epochs=1"]
    assert command("finetune", *repeated).returncode == 0  # an override goes before the option, as it did at the start
    for words, message in (
        ([start, tmp_path / "other.csv"], r"DATA .*other.csv: .*shoes was started with .*pairs.csv"),
        ([start, pairs, "--epochs", 3], "--epochs 3.0: .*shoes was started with 1.0"),
        ([start, pairs, "--lora", 4], "--lora 4: .*shoes was started with none"),
        ([start, pairs, "--lock", "image"], "--lock: .*shoes was started with none, not .*image.*: leave it out"),
        ([start, pairs, "--classes", "title"], "--classes: .*shoes was started with none, not title"),
        (["ViT-B-32", pairs], "MODEL ViT-B-32: .*shoes was started with .*start"),
    ):
        other = command("finetune", *words, "--name", "shoes", "--resume", f"run.dir={tmp_path}/runs")
        assert other.returncode == 2 and re.search(message, " ".join(other.stderr.split())), other.stderr
    again = train(run / "config.yaml", "run.name=again")
    assert again.returncode == 0, again.stderr
    folders = [tmp_path / "runs" / name / "checkpoints" / f"step-{steps[-1]:08d}" for name in ("shoes", "again")]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def run_with_architectures(folder, *arguments):
    """Run the command where open_clip knows the architectures of a folder by their names."""
    open_clip.add_model_config(folder)
    app(arguments)


def test_low_rank_updates_of_a_file_of_weights(architecture, pairs, tmp_path):  # noqa: F811
    weights, out = tmp_path / "epoch_1.pt", [f"run.dir={tmp_path}/runs", "train.threads=1"]
    arguments = ["--architecture", "tiny-clip", "--lora", "4", "--val", str(pairs), "--epochs", "1", *out]
    arguments = [str(tmp_path / "architectures"), "finetune", str(weights), str(pairs), *arguments]
    process = Process(f"{__name__}:run_with_architectures", arguments, ROOT, os.environ)
    assert process.wait(900) == 0, process.output()[1]
    (run,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert run.name == "tiny-clip-pairs"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["lora"]["rank"] == 4 and config["train"]["lr"] == 2e-4 and config["data"]["held_out"] is None
    tuned = mmcontrast.load(run).model
    assert torch.equal(tuned.towers["image"].network.conv1.weight, architecture.visual.conv1.weight)
    assert torch.equal(tuned.log_logit_scale[0], architecture.logit_scale)
    blocks = tuned.towers["text"].network.transformer.resblocks, architecture.transformer.resblocks
    assert not torch.equal(*(layers[0].mlp.c_fc.weight for layers in blocks))


@pytest.mark.parametrize("classes", [None, "label"])
def test_only_what_a_selection_keeps_is_learnt_and_held_out(start, tmp_path, classes):
    """Samples that `data filter` dropped are neither counted nor held out, nor are their classes asked for; --val keeps all."""
    table = write_pairs(tmp_path, "filepath", "title")
    frame = pandas.read_csv(table)
    frame.assign(label=[f"class {min(k // 12, 2)}" for k in range(48)]).to_csv(table, index=False)
    (tmp_path / "rules.yaml").write_text('rules: [{column: "json:price", max: 69}]')  # of 48 prices 24
    selection = tmp_path / "selection"
    result = command("data", "filter", table, selection, "--rules", tmp_path / "rules.yaml")
    assert result.returncode == 0, result.stderr
    request = Request(start, str(table), classes=classes, keys={} if classes else {"text": ["title"]}, select=str(selection))
    config, chosen = make_config(request)
    assert ("train.batch_size", "4", "of 22 samples, at most a quarter, and 512") in chosen.rows
    job = make_run_context(config, resume=False)
    (held_out,) = job.eval_datasets.values()
    assert len(job.dataset) + len(held_out) == 24 and len(held_out) > 0
    if classes:
        assert set(config.evaluation.zero_shot["classes"].classes) == {"class 0", "class 1"}
    config, _ = make_config(replace(request, val=str(table)))
    assert len(make_run_context(config, resume=False).eval_datasets["val"]) == 48


def test_what_is_asked_for_goes_before_what_is_chosen(tmp_path):
    siglip, pairs = str(save(tmp_path / "siglip", "siglip")), str(write_pairs(tmp_path, "image", "caption"))
    config, chosen = make_config(Request(siglip, pairs, lock=["image"], epochs=4), ["train.lr=3e-5", "objective=infonce"])
    assert config.train.lr == 3e-5 and config.objective == "infonce" and config.train.freeze == {"towers.image.*": None}
    assert ("objective", "infonce", "as asked") in chosen.rows and ("train.lr", "3e-5", "as asked") in chosen.rows
    assert config.train.epochs == 4 and config.data.held_out == 0.1 and config.train.batch_size == 8


def test_two_halves_learn_their_projections_first(tmp_path):
    save_for_hf(timm.create_model("test_vit", num_classes=5), tmp_path / "vit", safe_serialization=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 90}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    tokenizer(model_max_length=16).save_pretrained(tmp_path / "bert")
    pairs = str(write_pairs(tmp_path, "image", "caption"))
    request = Request(str(tmp_path / "vit"), pairs, beside=str(tmp_path / "bert"), epochs=3, probe_epochs=1)
    config, _ = make_config(request)
    assert config.train.freeze == {"towers.*": 5} and len(config.model.start) == 2


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        ({"model": "small.pt"}, "is a file of weights: name their architecture"),
        ({"architecture": "ViT-B-32"}, "must be the file of its weights"),
        ({"lock": ["imagee"]}, "--lock imagee: the model has no such field; it has image, text"),
        ({"lock": ["image", "text"]}, "leaves nothing to learn"),
        ({"keys": {"sound": ["title"]}}, "--keys sound=…: the model has no such field"),
        ({"data": "nowhere.csv"}, "no shard at 'nowhere.csv'"),
        ({"probe_epochs": 1}, "--probe-epochs"),
    ],
)
def test_mistakes_are_one_line(request_of, message, start, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.pt").touch()
    with pytest.raises(UserError, match=message):
        make_config(Request(**{"model": start, "data": str(pairs)} | request_of))


def test_columns_that_cannot_be_told_apart_are_asked_for(start, tmp_path):
    pairs = str(write_pairs(tmp_path, "photo", "title", more=["a long note"]))
    with pytest.raises(UserError, match="'text' could be any of title, a long note: say which, as --keys text=COLUMN"):
        make_config(Request(start, pairs))
    config, _ = make_config(Request(start, pairs, keys={"text": ["title"]}))
    assert config.fields["image"].keys == ["photo"]


def test_columns_of_structures_are_no_texts(start, pairs, tmp_path):
    """As boxes of objects, or Karpathy's sentences, beside a picture and a caption."""
    rows = pandas.read_csv(pairs).rename(columns={"filepath": "image", "title": "text"})
    rows["objects"] = [{"box": [1.0, 2.0], "name": "a chair"}] * len(rows)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.rename(columns={"text": "words"}).to_parquet(tmp_path / "b.parquet")
    for table, keys, text in (("a", {}, []), ("a", {"text": ["text"]}, ["text"]), ("b", {}, ["words"])):
        config, _ = make_config(Request(start, str(tmp_path / f"{table}.parquet"), keys=keys))
        assert (config.fields["text"].keys if "text" in config.fields else []) == text


def test_a_folder_whose_texts_are_in_a_table_is_refused(start, pairs, tmp_path):
    """As Hugging Face's imagefolder, with a metadata.csv beside the pictures."""
    pairs.rename(tmp_path / "metadata.csv")
    done = command("finetune", start, tmp_path, "--name", "x", "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 2 and "no sample has two of the fields" in " ".join(done.stderr.split()), done.stderr


def test_a_field_that_the_data_lacks_is_not_taken(config_file, tmp_path):
    """A run of pictures, texts and sounds, on a table of pictures and texts; with a scale for each pair, and texts in chunks by
    their length, of which a plan knows nothing."""
    options = ["train.steps=2", "model.scale_per_pair=true", "towers.text.length_chunks=2"]
    assert train(config_file, *NO_EVALUATION, *options).returncode == 0
    start, pairs = tmp_path / "runs" / "small", write_pairs(tmp_path, "image", "caption")
    options = [f"run.dir={tmp_path}/runs", "train.lr=0.0"]
    done = command("finetune", start, pairs, "--name", "tuned", "--epochs", 1, *options)
    assert done.returncode == 0 and "the data has no audio" in " ".join(done.stderr.split()), done.stderr
    before, after = (mmcontrast.load(tmp_path / "runs" / name).model for name in ("small", "tuned"))
    assert list(after.modalities) == ["image", "text"] and list(after.towers) == ["image", "text"]
    weights = before.state_dict()
    assert torch.equal(after.log_logit_scale[0], before.log_logit_scale[before.pairs.index(("image", "text"))])
    same = {name: torch.equal(tensor, weights[name]) for name, tensor in after.state_dict().items() if "scale" not in name}
    assert all(same.values())
    with pytest.raises(UserError, match="model.start.fields: no field 'sound'"):
        model_of(config_of({**DRAFT, "model": {"start": {"model": str(start), "fields": ["image", "sound"]}}}))


def test_a_model_that_cannot_be_planned_is_fine_tuned_all_the_same(start, pairs, monkeypatch):
    """The choices say that what fits is not known."""

    def refuse(*_, **__):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr("mmcontrast.plan.memory.count_flops", refuse)
    config, chosen = make_config(Request(start, str(pairs)))
    assert config.train.micro_batch_size is None
    assert any("not known to fit: this model cannot be planned: data-dependent" in why for _, _, why in chosen.rows)


def test_what_lies_under_low_rank_updates_never_learns(tmp_path):
    """Neither when a pattern that locks it for a while has ended."""
    start, pairs = str(save(tmp_path / "start", "clip")), str(write_pairs(tmp_path, "image", "caption"))
    config, _ = make_config(Request(start, pairs, lora=2), ["train.freeze={towers.*: 2}"])
    model = model_of(config)
    until = freeze(model, config.train.freeze)
    assert until and all(".parametrizations." in name and "original" not in name for name in until)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == until.keys()


def test_a_folder_of_class_folders(start, tmp_path):
    """FLYP: prompts of the folders' names; zero-shot accuracy before and after, that of open_clip itself at step 0."""
    names = ["rook", "black queen", "knight"]
    for number, file in enumerate(pictures(tmp_path) * 8):
        folder = tmp_path / "chess" / names[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"{number}{file.suffix}")
    templates = ["a photo of a {}.", "a drawing of a {}."]
    arguments = ["--classes", "folder", *(word for template in templates for word in ("--templates", template)), "--epochs", 1]
    arguments += ["--val", tmp_path / "chess", "--name", "chess", "--image-size", 48]
    done = command("finetune", start, tmp_path / "chess", *arguments, f"run.dir={tmp_path}/runs", "train.threads=1")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "chess"
    first, *_, last = lines_of(run / "evaluations.jsonl")
    top1 = "val/zero_shot/classes/top1"
    assert top1 in last and "zero_shot/classes/top1" in (run / "report.html").read_text()

    whole, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{start}", force_image_size=48)
    tokenize = open_clip.get_tokenizer(f"local-dir:{start}")
    whole.eval()
    with torch.no_grad():
        prompts = [tokenize([template.format(name) for template in templates]) for name in sorted(names)]
        classes = torch.stack([whole.encode_text(words, normalize=True).mean(0) for words in prompts])
        files = [file for name in sorted(names) for file in sorted((tmp_path / "chess" / name).iterdir())]
        images = whole.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]), normalize=True)
    scores = images @ torch.nn.functional.normalize(classes, dim=1).T
    labels = torch.tensor([sorted(names).index(file.parent.name) for file in files])
    assert first[top1] == pytest.approx((scores.argmax(1) == labels).float().mean().item(), abs=1e-6)

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["train"]["data"]["templates"] == {"text": templates}
    assert config["model"]["start"]["image_size"] == 48 and config["evaluation"]["best"] == top1
    again = command("evaluate", run)
    assert again.returncode == 0, again.stderr


def test_classes_of_a_table(start, tmp_path):
    """Held out by pictures, whatever the class; a list of open_clip's templates; and what cannot be meant."""
    drawn = pictures(tmp_path)
    files = [Path(shutil.copy(drawn[k % 6], tmp_path / f"{k}{drawn[k % 6].suffix}")) for k in range(48)]
    columns = {"filepath": [file.name for file in files], "label": ["rook", "king", "pawn"] * 16, "number": [0, 1, 2] * 16}
    pandas.DataFrame(columns | {"one": "same of all"}).to_csv(tmp_path / "pairs.csv", index=False)
    request = {"model": start, "data": str(tmp_path / "pairs.csv")}
    config, chosen = make_config(Request(**request, classes="label", templates=["simple_imagenet"]))
    task = config.evaluation.zero_shot["classes"]
    assert task.classes == {name: [name] for name in ("king", "pawn", "rook")} and len(task.templates) == 7
    split = config.evaluation.splits["data"]
    assert split.templates == {"text": task.templates} and split.held_out == 0.1 and split.keys["text"] == ["label"]
    assert ("evaluation.zero_shot", "3 classes", "accuracy by prompts, before and after") in chosen.rows
    for given, message in (
        ({"classes": "number"}, "--classes number: .* has numbers there"),
        ({"classes": "one"}, "has one class, 'same of all'"),
        ({"classes": "labels"}, "labels"),
        ({"templates": ["a {}"]}, "--templates: name the column"),
        ({"classes": "label", "keys": {"text": ["one"]}}, "--classes label and --keys text=…: both say"),
        ({"classes": "label", "templates": ["a photo"]}, "--templates: the template 'a photo' has no placeholder"),
    ):
        with pytest.raises(UserError, match=message):
            make_config(Request(**request, **given))
