"""`mmcontrast plan` computes what a real forward keeps, and what it advises fits; of published models: test_real_configs."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from typer.testing import CliRunner

from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from mmcontrast.modalities import VectorModality
from mmcontrast.models import ContrastiveModel, LinearTower, make_model
from mmcontrast.models.options import FieldOptions, ModelOptions
from mmcontrast.plan import GIB, plan_run
from mmcontrast.run_folder import prepare_folder
from mmcontrast.training.cost import count_bytes, fakes, flops_per_sample, make_values, peak_flops
from mmcontrast.training.optim import freeze
from tests.training.teaching import write_config

CONFIGS = Path(__file__).parent.parent / "configs"
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 49408}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FIELDS = {
    "image": FieldOptions(modality={"type": "image", "size": 32}, tower="image"),
    "text": FieldOptions(modality={"type": "text", "context_length": 12}, tower="text"),
    "audio": FieldOptions(modality={"type": "audio", "seconds": 0.8, "mels": 16, "hop": 640}, tower="audio"),
}
TOWERS = {
    "image": {"type": "timm", "model": "test_vit", "img_size": 32},
    "text": {"type": "transformers", "model": "bert", "config": BERT},
    "audio": {"type": "timm", "model": "resnet18", "in_chans": 1, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
}


def tiny(fields=tuple(FIELDS), **freeze_patterns) -> ContrastiveModel:
    chosen = [{name: of[name] for name in fields} for of in (FIELDS, TOWERS)]
    model = make_model(*chosen, ModelOptions(embed_dim=8), 0)
    freeze(model, freeze_patterns)
    return model.train()


@pytest.mark.parametrize("frozen", [{}, {"towers.image.*": None}], ids=["all learn", "one is locked"])
def test_activations_are_those_of_a_real_forward(frozen):
    model = tiny(**frozen)
    values = make_values(model, 6)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *values.values())}
    kept, real = {}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    for field, batch in values.items():
        seen = dict(kept)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model.encode(field, batch)
        real[field] = sum(storage.nbytes() for key, storage in kept.items() if key not in seen)
    with fakes():
        fake = tiny(**frozen)
        found = count_bytes(fake, make_values(fake, 6))
        assert all(type(parameter.data).__name__ == "FakeTensor" for parameter in fake.parameters())
    assert found.saved == real
    assert found == count_bytes(model, values)  # and its peak is that of real tensors
    assert (real["image"] < real["audio"] / 10) == bool(frozen)  # what is locked keeps nothing; its projection does


def test_memory_grows_linearly_and_has_the_gradients():
    with fakes():
        model = tiny(["image", "audio"])
        learning = sum(4 * parameter.numel() for parameter in model.parameters())
        count_bytes(model, make_values(model, 2), "bf16")
        costs = [count_bytes(model, make_values(model, n), "bf16") for n in (64, 128, 192)]
    first, second, third = (cost.peak for cost in costs)
    assert first > learning and third - second == pytest.approx(second - first, rel=0.02)
    first, second, third = (sum(cost.saved.values()) for cost in costs)
    assert third - second == second - first > 0


def test_flops_of_a_sample_are_counted_without_touching_the_model():
    towers = {name: LinearTower(30, 20) for name in ("a", "b")}
    model = ContrastiveModel({name: VectorModality(30) for name in towers}, towers, {"a": "a", "b": "b"}, 10).eval()
    tower, projection = 2 * 30 * 20, 2 * 20 * 10
    both_learn = 2 * (2 * tower + 3 * projection)  # a first layer has no gradient of its input
    assert flops_per_sample(model) == both_learn
    for parameter in (*model.towers["a"].parameters(), *model.projections["a"].parameters()):
        parameter.requires_grad_(False)
    assert flops_per_sample(model) == both_learn - tower - 2 * projection
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert isinstance(model.towers["a"].network.weight.detach().sum().item(), float)


@pytest.fixture
def of_blocks(tmp_path) -> Path:
    """The config of two transformers of three blocks, at a batch of 8,192."""
    text = {"type": "transformers", "model": "bert", "config": BERT | {"num_hidden_layers": 3}}
    towers = {"image": {"type": "timm", "model": "test_vit", "img_size": 64, "patch_size": 8, "depth": 3}, "text": text}
    fields = {"image": {"modality": {"type": "image", "size": 64}, "tower": "image"}}
    fields["text"] = {"modality": {"type": "text", "context_length": 64}, "tower": "text"}
    train = {"batch_size": 8192, "precision": "bf16"}
    return write_config(tmp_path, "none.tar", fields=fields, towers=towers, train=train)


@pytest.mark.slow
def test_recomputed_blocks_keep_their_inputs_alone(of_blocks):
    def planned(*overrides: str):
        return plan_run(load_config(of_blocks, overrides), 8)

    plain, again, sharded = planned(), planned("train.recompute=[image, text]"), planned("train.parallel=fsdp")
    assert again.flops_per_sample == plain.flops_per_sample
    assert all(again.towers[name].saved < plain.towers[name].saved / 4 for name in plain.towers)
    step = "gradients and activations, at their peak"
    assert again.memory[step] < plain.memory[step] / 2
    assert sharded.memory["weights"] == math.ceil(plain.memory["weights"] / 8)
    assert sharded.memory["weights that are fetched"] < plain.memory["weights"] and sharded.notes
    assert "buckets for the gradients' reduction" not in sharded.memory
    with pytest.raises(UserError, match="train.recompute: no tower 'picture'"):
        planned("train.recompute=[picture]")


def test_peaks_are_found_by_the_devices_name():
    names = {
        "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA B200": 2.25e15, "NVIDIA H200": 989.4e12, "NVIDIA L40S": 362.05e12, "NVIDIA GeForce RTX 4090": 165.2e12,
        "Tesla V100-SXM2-32GB": 125e12, "NVIDIA A10G": 70e12, "NVIDIA A10": 125e12, "AMD Radeon": None,
        "NVIDIA RTX A1000": None, "NVIDIA RTX A4000": None, "NVIDIA H200 NVL": 835.5e12, "Tesla V100-PCIE-16GB": 112e12,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA A10M": None,
    }  # fmt: skip
    assert {name: peak_flops(name) for name in names} == names


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.mark.slow
def test_the_advice_fits_and_twice_of_it_does_not(of_blocks):
    small = [str(of_blocks), "--memory", "2", "--devices", "2", "--json"]
    done = run(*small)
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and not found["fits"]
    assert f"train.micro_batch_size={found['largest']} fits" in found["verdict"]
    advised = run(*small, f"train.micro_batch_size={found['largest']}")
    assert advised.exit_code == 0 and json.loads(advised.stdout)["total"] <= 2 * GIB
    assert run(*small, f"train.micro_batch_size={2 * found['largest']}").exit_code == 1
    hopeless = run(str(of_blocks), "--memory", "1")
    assert hopeless.exit_code == 1 and "with any train.micro_batch_size: set train.recompute=[image, text]" in hopeless.stdout


def test_every_copy_of_the_weights_is_counted(tmp_path):
    path = write_config(tmp_path, "none.tar", model={"embed_dim": 16})

    def memory(*overrides: str, devices: int = 1) -> dict[str, int]:
        return plan_run(load_config(path, overrides), devices).memory

    plain = memory()
    weights = plain["weights"]
    assert "averaged weights" not in plain and plain["optimizer state"] == pytest.approx(2 * weights, rel=0.02)
    assert memory("train.ema_decay=0.99")["averaged weights"] == weights
    assert memory("train.queue_size=1024")["queue and its encoder"] == weights + 1024 * 2 * (16 * 4 + 8)
    assert memory("train.optimizer=lion")["optimizer state"] == pytest.approx(weights, rel=0.02)
    assert memory(devices=2)["buckets for the gradients' reduction"] == pytest.approx(weights, rel=0.02)
    assert memory("train.batch_size=16")["inputs"] == 2 * plain["inputs"]


def test_a_micro_batch_that_is_the_whole_batch_is_no_part_of_it(tmp_path, monkeypatch):
    """One pass over the towers, in the plan and in training."""
    path = write_config(tmp_path, "none.tar", model={"embed_dim": 16})
    plain, whole, cached = (plan_run(load_config(path, [f"train.micro_batch_size={size}"])) for size in ("null", 8, 4))
    assert cached.cached and not whole.cached and whole.memory == plain.memory
    assert whole.time.parts["towers"] == plain.time.parts["towers"] < cached.time.parts["towers"]


def test_inputs_that_a_tower_refuses_are_said_in_a_line(of_blocks):
    with pytest.raises(
        UserError, match=r"cannot be planned: Input .* in tower 'image', given field 'image' as \[2, 3, 60, 60\]"
    ):
        plan_run(load_config(of_blocks, ["fields.image.modality.size=60"]))


def test_a_table_and_mistakes(tmp_path):
    done = run(str(CONFIGS / "quickstart.yaml"))
    assert done.exit_code == 0 and "fits with" in done.stdout and "computed, not measured" in done.stdout
    refused = run(str(CONFIGS / "quickstart.yaml"), "--devices", "3")
    assert refused.exit_code == 2
    with pytest.raises(UserError, match="train.batch_size=256 cannot be cut into equal parts for 3 devices"):
        plan_run(load_config(CONFIGS / "quickstart.yaml"), 3)
    assert logging.root.manager.disable == logging.NOTSET, "what is logged later is not lost"


def test_towers_without_a_projection():
    kind = dict.fromkeys(("a", "b"), "none") | {"a": "linear"}
    fields = {name: FieldOptions(modality={"type": "vector", "width": 5}, tower=name) for name in ("a", "b")}
    towers = {name: {"type": "linear", "inputs": 5, "width": 7} for name in fields}
    model = make_model(fields, towers, ModelOptions(embed_dim=7, projection=kind), 0)
    assert isinstance(model.projections["b"], torch.nn.Identity) and not isinstance(model.projections["a"], torch.nn.Identity)
    with pytest.raises(UserError, match="tower 'b' has 7 features, not embed_dim=8"):
        make_model(fields, towers, ModelOptions(embed_dim=8, projection=kind), 0)
    with pytest.raises(UserError, match="model.projection: no tower 'c'"):
        make_model(fields, towers, ModelOptions(embed_dim=7, projection={"c": "none"}), 0)


def test_teachers_are_counted(tmp_path):
    """The weights and the forward of one that `load` opens; nothing of stored embeddings."""
    towers = {f: {"type": "linear", "inputs": 6, "width": 40} for f in "ab"}
    config = load_config(write_config(tmp_path, "none.tar", "teacher", towers=towers))
    prepare_folder(config, overwrite=False)
    path = write_config(tmp_path, "none.tar")
    plain = plan_run(load_config(path))
    stored, taught = (
        plan_run(load_config(path, ["objective=distillation", f"train.teacher={teacher}"]))
        for teacher in ("{stored: {a: a.npy, b: b.npy}}", config.folder)
    )
    assert stored.memory == plain.memory and stored.flops_per_sample == plain.flops_per_sample
    assert taught.memory["teachers' weights"] == 4 * (2 * (7 * 40 + 40 * 8) + 1)
    assert taught.flops_per_sample - plain.flops_per_sample == 2 * 2 * (6 * 40 + 40 * 8)
    assert any("teachers' forward" in note for note in taught.notes)
