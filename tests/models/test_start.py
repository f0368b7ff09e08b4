"""`model.start`: a run begins with what its library computes, keeps its logit scale and bias, and opens again."""

import json

import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg
from timm.models import save_for_hf
from torch.nn import BatchNorm2d
from transformers import BertConfig, BertModel

import mmcontrast
from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from mmcontrast.models.open_clip import published_preprocessing, tell_of_preprocessing
from mmcontrast.runs import completed, make_run_context, modalities_of, model_of
from tests.command import train
from tests.models.open_clip_models import MODELS
from tests.models.samples import tokenizer
from tests.models.starts import start_of, write_pairs, write_run


def test_all_weights_learn_and_the_run_begins_another(tmp_path):
    """The halves of a dual encoder have weights of their own names, of which one half can be locked."""
    folder = start_of("hf clip", tmp_path / "start")
    write_pairs("hf clip", tmp_path)
    config = write_run(tmp_path, str(folder), train={"lr": 1e-3, "freeze": {"towers.image.*": None}, "warmup_steps": 0})
    assert train(config).returncode == 0
    run = tmp_path / "runs" / "tuned"
    before, after = mmcontrast.load(folder).model, mmcontrast.load(run).model
    changed = {name for name, weight in before.state_dict().items() if not torch.equal(weight, after.state_dict()[name])}
    assert changed and not any(name.startswith("towers.image") for name in changed)
    assert "log_logit_scale" in changed
    longer = load_config(write_run(tmp_path, str(run), run={"name": "again", "dir": str(tmp_path / "runs")}))
    model = make_run_context(longer).model
    assert all(torch.equal(weight, after.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["siglip", "hf clap"])
def test_options_of_a_field_leave_the_rest_to_the_start(name, tmp_path):
    """As several captions a text: its tokenizer is still that of the model, and so are the mean and std of its pictures."""
    folder = start_of(name, tmp_path / "start")
    fields = {"text": {"modality": {"type": "text", "captions": "lines"}}}
    if name == "siglip":
        fields["image"] = {"modality": {"type": "image", "size": 160, "augment": []}}
    changed = model_of(load_config(write_run(tmp_path, str(folder), fields=fields)))
    own, text = mmcontrast.load(folder).model, changed.modality("text")
    assert text.captions == "lines" and own.modality("text").captions == "whole"
    assert torch.equal(text.transform("a photo of a dog\nb", False), own.modality("text").transform("a photo of a dog", False))
    if name == "siglip":
        picture = changed.modality("image")
        assert (picture.mean, picture.std, picture.resize) == ([0.5] * 3, [0.5] * 3, "squash") and picture.augments
        assert picture.background == "open_clip"
    fields["text"]["modality"] |= {"context_length": 5}
    with pytest.raises(UserError, match="fields.text.modality.context_length=5: that of the start is"):
        model_of(load_config(write_run(tmp_path, str(folder), fields=fields)))
    fields["text"]["modality"] = {"type": "text", "captons": "lines"}
    with pytest.raises(UserError, match="did you mean 'captions'"):
        model_of(load_config(write_run(tmp_path, str(folder), fields=fields)))


def test_an_architectures_file_and_an_architecture_alone(architectures, tmp_path):
    """A local checkpoint of open_clip's; the same architecture with random weights, which depend on the seed."""
    name = "tiny-clip"
    whole = open_clip.create_model(name)
    torch.save(whole.state_dict(), tmp_path / "small.pt")
    write_pairs("clip", tmp_path)
    start = {"model": name, "pretrained": str(tmp_path / "small.pt")}
    model = make_run_context(load_config(write_run(tmp_path, start))).model
    assert torch.equal(model.towers["image"].network.conv1.weight, whole.visual.conv1.weight)
    assert model.log_logit_scale.item() == whole.logit_scale.item()
    config = load_config(write_run(tmp_path, {"model": name, "pretrained": False}))
    one, other = (model_of(config.model_copy(update={"train": config.train.model_copy(update={"seed": s})})) for s in (0, 1))
    assert not torch.equal(one.towers["image"].network.conv1.weight, other.towers["image"].network.conv1.weight)
    same = model_of(config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})}))
    assert torch.equal(same.towers["image"].network.conv1.weight, other.towers["image"].network.conv1.weight)


def test_an_architecture_alone_begins_as_its_library_has_it(tmp_path, monkeypatch):
    """Scale and bias of its first step; means of what is published, where that is one; its tokenizer when texts are read; batch
    norms that learn."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    tiny = {"tiny-siglip": MODELS["siglip"], "tiny-resnet": MODELS["clip"] | {"vision_cfg": resnet}}
    for name, config in tiny.items():
        config = json.loads(json.dumps(config).replace("HERE", str(tmp_path / "no-tokenizer")))
        (tmp_path / f"{name}.json").write_text(json.dumps({"embed_dim": 64, **config}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    write_pairs("clip", tmp_path)

    def opened(name, **options):
        start = {"model": name, "pretrained": False}
        return load_config(write_run(tmp_path, start, model={"start": start, **options}))

    biased = model_of(opened("tiny-siglip", logit_scale=10), tokenizers=False)
    assert biased.logit_bias.item() == -10 and biased.log_logit_scale.exp().item() == pytest.approx(10)
    for reads in (model_of, modalities_of):
        with pytest.raises(UserError, match=r"tiny-siglip: its tokenizer: .*no-tokenizer"):
            reads(opened("tiny-siglip"))
    plain = model_of(opened("tiny-resnet"))
    assert plain.log_logit_scale.exp().item() == pytest.approx(1 / 0.07) and plain.logit_bias is None
    assert plain.fixed == [] and any(isinstance(module, BatchNorm2d) for module in plain.modules())
    squash = published_preprocessing("ViT-B-16-SigLIP")
    assert squash == {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    assert published_preprocessing("ViT-L-14") == published_preprocessing("tiny-resnet") == {}


def test_a_checkpoints_file_of_an_architecture_with_its_own_preprocessing_is_told_of(recwarn):
    tell_of_preprocessing("ViT-B-16-SigLIP", "known.pt", PreprocessCfg(mean=(0.5,) * 3, std=[0.5] * 3, resize_mode="squash"))
    assert not recwarn.list
    with pytest.warns(match=r"tuned.pt: open_clip prepares pictures for a file by {'mean': \(0.48145466, "):
        tell_of_preprocessing("ViT-B-16-SigLIP", "tuned.pt", PreprocessCfg())


def test_two_halves_and_a_further_field(tmp_path):
    """timm's pictures beside a BERT of texts: projections of their own; a sound beside a pair: the pair's dimensions."""
    network = timm.create_model("test_vit", num_classes=5)
    save_for_hf(network, tmp_path / "vit", safe_serialization=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 90}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    tokenizer(model_max_length=16).save_pretrained(tmp_path / "bert")
    write_pairs("clip", tmp_path)
    config = write_run(
        tmp_path,
        [str(tmp_path / "vit"), str(tmp_path / "bert")],
        model={"start": [str(tmp_path / "vit"), str(tmp_path / "bert")], "embed_dim": 24},
    )
    done = train(config)
    assert done.returncode == 0, done.stderr
    model = mmcontrast.load(tmp_path / "runs" / "tuned").model
    assert {name: head.weight.shape[0] for name, head in model.projections.items()} == {"image": 24, "text": 24}
    folder = start_of("clip", tmp_path / "pair")
    audio = {"audio": {"modality": {"type": "audio", "seconds": 0.5, "mels": 16}, "tower": "audio"}}
    towers = {"audio": {"type": "timm", "model": "resnet18", "in_chans": 1, "channels": [8, 8, 16, 16]}}
    options = load_config(write_run(tmp_path, str(folder), fields=audio, towers=towers, model={"lora": {"rank": 2}}))
    model = model_of(options)
    assert list(model.modalities) == ["image", "text", "audio"] and model.embed_dim == 64
    learning = {name.split(".")[1] for name, weight in model.named_parameters() if weight.requires_grad and "." in name}
    assert learning == {"image", "text", "audio"} and model.log_logit_scale.requires_grad
    assert list(completed(options, model).fields) == ["image", "text", "audio"]


def test_init_from_takes_what_load_takes(tmp_path):
    """The weights of another model of the same architecture, in the place of the start's."""
    folder, other = start_of("clip", tmp_path / "start"), start_of("clip", tmp_path / "other")
    write_pairs("clip", tmp_path)
    config = load_config(write_run(tmp_path, str(folder), train={"init_from": str(other)}))
    wanted, found = mmcontrast.load(other).model.state_dict(), make_run_context(config).model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    siglip = start_of("siglip", tmp_path / "siglip")
    with pytest.raises(UserError, match=r"train.init_from: .*siglip: .* another architecture.*: .* name it in model.start"):
        make_run_context(load_config(write_run(tmp_path, str(folder), train={"init_from": str(siglip)})))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"start": "no-such-model"}}, "no model 'no-such-model'"),
        ({"model": {"embed_dim": 32}}, "model.embed_dim=32: that of model.start is 64"),
        ({"model": {"projection": "mlp"}}, "model.projection=mlp: tower 'image' keeps that of model.start"),
        ({"model": {"projection": {"text": "mlp"}}}, "model.projection=mlp: tower 'text' keeps that of model.start"),
        ({"model": {"logit_scale": 150}}, "logit_scale=150 is above max_logit_scale=100"),
        ({"model": {"lora": {"rank": 500}}}, "model.lora: towers.image: rank 500 is beyond"),
        ({"model": {"lora": {"rank": 2, "towers": ["imagee"]}}}, "did you mean 'image'"),
        ({"model": {"start": None, "lora": {"rank": 2}}}, "fields: there must be two or more, or a model to begin with"),
        ({"fields": {"sound": {}}}, "fields.sound: say its modality"),
        ({"fields": {"image": {"tower": "vit"}}}, "fields.image.tower: no tower 'vit'"),
        ({"towers": {"image": {"type": "linear"}}}, "towers.image: model.start has a tower of this name"),
    ],
)
def test_what_does_not_go_with_a_start_is_refused(sections, message, tmp_path):
    folder = start_of("clip", tmp_path / "start")
    write_pairs("clip", tmp_path)
    sections = {name: {"start": str(folder)} | of if name == "model" else of for name, of in sections.items()}
    with pytest.raises(UserError, match=message):
        make_run_context(load_config(write_run(tmp_path, str(folder), **sections)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["clip", "hf clip"])
def test_texts_of_another_tokenizer_are_looked_at(kind, tmp_path):
    """A longer context than the tower has; and ids that it has not, which transformers' tiny vocabulary shows."""
    folder = start_of(kind, tmp_path / "start")
    write_pairs(kind, tmp_path)
    words, message = ({"context_length": 16}, "vocab_size=90") if kind == "hf clip" else ({}, "context_length=77 for a tower")
    fields = {"text": {"modality": {"type": "text", "tokenizer": "open_clip"} | words}}
    with pytest.raises(UserError, match=f"fields.text: .*{message}"):
        make_run_context(load_config(write_run(tmp_path, str(folder), fields=fields)))


def test_reading_how_a_start_reads_takes_no_weights(tmp_path):
    folder = start_of("hf siglip", tmp_path / "start")
    write_pairs("hf siglip", tmp_path)
    (folder / "model.safetensors").unlink()
    config = load_config(write_run(tmp_path, str(folder)))
    assert list(modalities_of(config)) == ["image", "text"]
    with pytest.raises(UserError, match="model.safetensors"):
        model_of(config)
