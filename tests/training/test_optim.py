"""Schedules, groups by tower and layer, what is frozen, the averaged weights: in a model, and in whole runs."""

import itertools
import json

import pytest
import timm.optim
import torch
from safetensors.torch import load_file

from mmcontrast.components import build
from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from mmcontrast.evaluation import embed_dataset
from mmcontrast.models import TOWERS
from mmcontrast.runs import make_run_context, open_run
from mmcontrast.training import checkpoint
from mmcontrast.training.optim import freeze, layers_above, make_optimizer, not_decaying, schedule
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.state import weights_path
from tests.command import train


def shares(**options):
    of = TrainOptions(steps=100, batch_size=1, **options)
    return [schedule(step, of) for step in range(100)]


def test_schedules():
    for kind in ("cosine", "linear", "constant", "wsd"):
        found = shares(schedule=kind, warmup_steps=10)
        assert found[:10] == pytest.approx([(k + 1) / 10 for k in range(10)]) and found[10] == 1.0
        assert all(a >= b for a, b in zip(found[10:], found[11:], strict=False))
        last = shares(schedule=kind, final_lr_share=0.2)[-1]
        assert found[-1] < 0.12 and 0.2 < last < 0.3 if kind != "constant" else found[-1] == last == 1.0
    assert shares(schedule="linear")[50] == pytest.approx(0.5)
    assert shares()[50] == pytest.approx(0.5) and shares()[25] == pytest.approx(0.5 + 0.5**1.5)
    stable = shares(schedule="wsd", decay_share=0.25)
    assert stable[:76] == [1.0] * 76 and stable[88] == pytest.approx(12 / 25)


BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("spec", "first", "block", "last", "layers"),
    [
        ({"type": "timm", "model": "test_vit", "img_size": 32}, "patch_embed.proj", "blocks.1.mlp.fc1", "norm", 6),
        ({"type": "timm", "model": "resnet18"}, "conv1", "layer2.1.conv1", None, 8),
        ({"type": "timm", "model": "test_convnext"}, "stem.0", "stages.2.blocks.0.mlp.fc1", None, 12),
        (
            {"type": "transformers", "model": "bert", "config": BERT},
            "embeddings.word_embeddings", "encoder.layer.1.output.dense", None, 3,
        ),
        (
            {"type": "open_clip_text", "width": 16, "layers": 2, "heads": 2},
            "token_embedding", "transformer.resblocks.0.mlp.c_fc", "ln_final", 2,
        ),
    ],
)  # fmt: skip
def test_layers_are_counted_from_above(spec, first, block, last, layers):
    found = layers_above(build(spec, TOWERS, "tower"))
    heights = {name.removeprefix("network.").removesuffix(".weight"): height for name, height in found.items()}
    assert heights[first] == max(heights.values()) == layers + 1
    assert 0 < heights[block] < layers + 1
    assert heights[last] == 0 if last else min(heights.values()) <= 1
    assert set(range(1, layers + 2)) <= set(heights.values())


def test_groups_by_tower_and_layer(config_file):
    bert = "towers.text.config.num_hidden_layers=3"
    options = ["train.lr=1e-2", "train.tower_lr={text: 1e-3}", "train.layer_decay={text: 0.5}", bert]
    model = make_run_context(load_config(config_file, options)).model
    optimizer = make_optimizer(model, load_config(config_file, options).train)
    lr_of = {id(parameter): group["peak_lr"] for group in optimizer.param_groups for parameter in group["params"]}
    names = {name: lr_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert names["towers.text.network.embeddings.word_embeddings.weight"] == pytest.approx(1e-3 * 0.5**4)
    for layer in range(3):
        assert names[f"towers.text.network.encoder.layer.{layer}.output.dense.weight"] == pytest.approx(
            1e-3 * 0.5 ** (3 - layer)
        )
    assert names["projections.text.weight"] == 1e-3 and names["log_logit_scale"] == names["projections.image.weight"] == 1e-2
    for wrong, message in (
        ("train.layer_decay={txt: 0.5}", "no tower 'txt'"),
        ("train.optimizer=liom", "no 'liom'.*lion"),
        ("train.optimizer={type: lion, beta: 1}", "train.optimizer lion"),
        ("train.optimizer.weight_decay=0.3", "train.optimizer.weight_decay: set train.weight_decay"),
    ):
        with pytest.raises(UserError, match=message):
            make_optimizer(model, load_config(config_file, [wrong]).train)


DECAYING = {
    "test_vit": {"type": "timm", "model": "test_vit", "img_size": 32},
    "dinov2 with registers": {"type": "timm", "model": "vit_small_patch14_reg4_dinov2", "depth": 1, "img_size": 28},
    "beit": {"type": "timm", "model": "beit_base_patch16_224", "depth": 1, "embed_dim": 24, "num_heads": 2},
    "levit": {"type": "timm", "model": "levit_128s"},
    "botnet": {"type": "timm", "model": "botnet26t_256"},
    "resnet": {"type": "timm", "model": "test_resnet"},
    "open_clip": {"type": "open_clip_text", "width": 16, "layers": 1, "heads": 2, "embed_cls": True},
    "bert": {"type": "transformers", "model": "bert", "config": BERT | {"num_hidden_layers": 1}},
    "clip": {"type": "transformers", "model": "clip_vision_model", "config": BERT | {"image_size": 32, "num_hidden_layers": 1}},
    "gpt2": {"type": "transformers", "model": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2}},
    "deberta": {"type": "transformers", "model": "deberta-v2", "config": BERT | {"relative_attention": True}},
}  # fmt: skip
ALSO = {  # what no library names, or only here
    "botnet": "stages.2.1.self_attn.pos_embed.height_rel",
    "dinov2 with registers": "reg_token",
    "bert": "embeddings.position_embeddings.weight",
    "clip": "embeddings.position_embedding.weight",
    "gpt2": "wpe.weight",
    "deberta": "encoder.rel_embeddings.weight",
    "open_clip": "positional_embedding",
}


@pytest.mark.parametrize("kind", DECAYING)
def test_weight_decay_spares_what_the_library_names_and_what_is_a_position(kind):
    """timm's own groups (its vectors, biases and `no_weight_decay()`) on the network, then what nobody names; a weight of a
    linear layer, of a convolution and of a vocabulary decays."""
    tower = build(DECAYING[kind], TOWERS, "tower")
    network, parameters = tower.network, dict(tower.network.named_parameters())
    named = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    theirs = timm.optim.param_groups_weight_decay(network, 0.1, no_weight_decay_list=named)[0]["params"]
    kept = {id(parameters[name.removeprefix("network.")]) for name in not_decaying(tower)}
    assert {id(parameter) for parameter in theirs} <= kept
    assert kind not in ALSO or id(parameters[ALSO[kind]]) in kept
    matrices = [m.weight for m in network.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    matrices += [parameters[n] for n in ("token_embedding.weight", "embeddings.word_embeddings.weight") if n in parameters]
    decaying = [weight for weight in matrices if sum(size > 1 for size in weight.shape) > 1]
    assert (decaying or kind == "gpt2") and not {id(weight) for weight in decaying} & kept


def test_what_a_run_cannot_start_from_is_said_in_a_line(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("bad.safetensors", "is no .safetensors file, or damaged"),
        ("folder", "is neither a run's folder, nor one of its checkpoints, nor a .safetensors file"),
        ("none.safetensors", "no weights at"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.load_weights(weights_path(str(tmp_path / name)))


def test_adamw_with_options_takes_the_others_from_the_run(config_file):
    options = ["train.betas=[0.8, 0.77]", "train.eps=1e-3", "train.optimizer={type: adamw, amsgrad: true}"]
    config = load_config(config_file, options)
    groups = make_optimizer(make_run_context(config).model, config.train).param_groups
    assert {(*group["betas"], group["eps"], group["amsgrad"]) for group in groups} == {(0.8, 0.77, 1e-3, True)}


def test_what_is_spared_is_in_the_optimizers_groups(config_file):
    model = make_run_context(load_config(config_file)).model
    optimizer = make_optimizer(model, TrainOptions(steps=1, batch_size=1, weight_decay=0.2))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    kept = not_decaying(model)
    assert {"log_logit_scale", "towers.text.network.embeddings.position_embeddings.weight"} < kept
    assert all(decay[id(p)] == (0.0 if name in kept else 0.2) for name, p in model.named_parameters())
    assert decay[id(model.get_parameter("projections.text.weight"))] == 0.2


def test_what_is_locked_for_good_does_not_train(config_file):
    model = make_run_context(load_config(config_file)).model
    assert not freeze(model, {"towers.image.*": None})
    assert not model.towers["image"].training and model.towers["text"].training
    model.eval()
    model.train()
    assert not model.towers["image"].training and model.towers["text"].training
    assert all(p.requires_grad == (not n.startswith("towers.image.")) for n, p in model.named_parameters())
    with pytest.raises(UserError, match="no weights match 'tower.image"):
        freeze(model, {"tower.image.*": None})
    freeze(model, {"*": None})
    with pytest.raises(UserError, match="nothing to learn"):
        make_optimizer(model, TrainOptions(steps=1, batch_size=1))


def weights_of(run, step, name=checkpoint.WEIGHTS):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / name)


def test_a_run_with_locked_weights_an_average_and_another_optimizer(config_file, corpus, tmp_path):
    """Weights move when they may; the average is the recursion of the saved weights; both go through a resume, bitwise."""
    options = ["train.freeze={towers.audio.*: null, towers.text.*: 4}", "train.ema_decay=0.5", "train.optimizer=lion"]
    options += ["train.checkpoint_every=1", "train.keep_checkpoints=1", "train.keep_every=1", "train.schedule=constant"]
    options += ["train.evaluate_every=3", "train.micro_batch_size=8", "train.lr=1e-3"]
    done = train(config_file, *options)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    steps = [weights_of(run, step) for step in range(1, 7)]
    matrices = [name for name in steps[0] if name.startswith("towers.") and name.endswith("weight")]
    moved = [
        {name.split(".")[1] for name in matrices if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise(steps)
    ]
    assert moved == [{"image"}] * 3 + [{"image", "text"}] * 2
    assert all(torch.equal(tensor, steps[5][name]) for name, tensor in steps[0].items() if name.startswith("towers.audio"))
    average = weights_of(run, 1, checkpoint.AVERAGED)
    for step in range(1, 6):
        share = min(0.5, (1 + step) / (10 + step))
        expected = {name: average[name] * share + steps[step][name] * (1 - share) for name in average}
        average = weights_of(run, step + 1, checkpoint.AVERAGED)
        for name, tensor in average.items():
            if name.endswith("weight"):
                torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    opened = open_run(run)
    assert all(torch.equal(tensor, average[name]) for name, tensor in opened.model.state_dict().items())
    table = embed_dataset(opened.model, make_run_context(load_config(config_file)).eval_datasets["val"], batch_size=8)
    assert len(table) == 24
    evaluations = (run / "evaluations.jsonl").read_text()
    for step in (4, 5, 6):
        (run / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"kept-{step}")
    assert train(config_file, *options, "--resume").returncode == 0
    again = weights_of(run, 6), weights_of(run, 6, checkpoint.AVERAGED)
    assert all(torch.equal(tensor, again[0][name]) for name, tensor in steps[5].items())
    assert all(torch.equal(tensor, again[1][name]) for name, tensor in average.items())
    assert (run / "evaluations.jsonl").read_text() == evaluations and len(evaluations.splitlines()) == 2
    refused = train(config_file, *options, "--resume", "train.steps=8", "train.freeze={}")
    assert refused.returncode == 2 and "other weights learn" in " ".join(refused.stderr.split())
    assert json.loads((run / "results.json").read_text())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.betas=[0.9, 1.0]", "train.betas.1: input should be less than 1"),
        ("train.eps=-1", "train.eps: input should be greater than or equal to 0"),
        ("train.optimizer={type: lion, betas: [0.9, 1.5]}", "train.optimizer lion: Invalid beta"),
    ],
)
def test_what_an_optimizer_refuses_is_one_line(vectors_file, option, message):
    def make():
        job = make_run_context(load_config(vectors_file, [option]))
        return make_optimizer(job.model, job.options)

    with pytest.raises(UserError, match=message):
        make()
