"""LoRA is LoRA: what changes has rank r, in every weight that is meant, and the merged weight is W + s·B·A made by hand."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mmcontrast
from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from mmcontrast.models.lora import LowRank, adaptable, add_lora, merge_lora
from mmcontrast.runs import model_of
from mmcontrast.training import checkpoint
from tests.command import train
from tests.models.starts import KINDS, embedded, start_of, write_pairs, write_run

EXPECTED = {  # linear layers of the blocks and the attention pool: image or audio, text
    "clip": (2 * 4, 2 * 4),
    "siglip": (6 * 4, 2 * 4),
    "hf clip": (2 * 6, 2 * 6),
    "hf siglip": (2 * 6 + 4, 2 * 6),
    "hf clap": (3 * 6, 2 * 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_real_steps_change_what_is_meant_by_a_low_rank(kind, tmp_path):
    folder, files = start_of(kind, tmp_path / "start"), write_pairs(kind, tmp_path)
    config = write_run(
        tmp_path, str(folder), model={"start": str(folder), "lora": {"rank": 2, "alpha": 3.0}}, train={"lr": 0.02}
    )
    done = train(config, "train.steps=3")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tuned"
    before, after = mmcontrast.load(folder), mmcontrast.load(run)
    old, new = before.model.state_dict(), after.model.state_dict()
    assert old.keys() == new.keys()
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    image = [name for name in changed if not name.startswith("towers.text.")]
    assert (len(image), len(changed) - len(image)) == EXPECTED[kind]
    for name in changed:
        assert torch.linalg.matrix_rank((new[name] - old[name]).double(), atol=1e-6) == 2, name
    assert not torch.allclose(embedded(before, files), embedded(after, files), atol=1e-3)

    (last,) = (run / "checkpoints").glob("step-*3")
    adapter = load_file(last / checkpoint.ADAPTER)
    assert not (last / checkpoint.WEIGHTS).exists()
    for name in changed:
        place, _, weight = name.rpartition(".")
        up, down = (adapter[f"{place}.parametrizations.{weight}.0.{part}"] for part in ("up", "down"))
        torch.testing.assert_close(new[name], old[name] + 1.5 * (up.double() @ down.double()).float())
    assert len(adapter) == 2 * len(changed) + 1 + (before.model.logit_bias is not None)

    unmerged = model_of(load_config(config))
    unmerged.load_state_dict(adapter, strict=False)
    kind_of = {"audio": files} if kind == "hf clap" else {"images": files}
    field = next(iter(kind_of)).removesuffix("s")
    inputs = after.model.modality(field).collate([after._prepare(after.model.modality(field), "", file) for file in files])
    with torch.no_grad():
        torch.testing.assert_close(unmerged.eval().encode(field, inputs), after.embed(**kind_of), rtol=0, atol=1e-5)


def test_a_run_resumes_to_the_last_bit_and_refuses_another_start(tmp_path):
    """With averaged weights, caching, accumulation and dropout; a start whose weights were exchanged is not this one."""
    folder = start_of("clip", tmp_path / "start")
    write_pairs("clip", tmp_path)
    lora = {"start": str(folder), "lora": {"rank": 2, "dropout": 0.2}}
    change = {"lr": 0.01, "steps": 4, "ema_decay": 0.9, "micro_batch_size": 3, "accumulation_steps": 2, "checkpoint_every": 2}
    config = write_run(tmp_path, str(folder), model=lora, train=change)
    assert train(config).returncode == 0
    last = tmp_path / "runs" / "tuned" / "checkpoints" / "step-00000004"
    files = (checkpoint.ADAPTER, checkpoint.AVERAGED)
    whole = {name: load_file(last / name) for name in files}
    assert not any(torch.equal(whole[files[0]][name], whole[files[1]][name]) for name in whole[files[0]] if ".up" in name)
    shutil.rmtree(last)
    resumed = train(config, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in files:
        again = load_file(last / name)
        assert all(torch.equal(tensor, again[key]) for key, tensor in whole[name].items()) and len(again) == len(whole[name])
    refused = train(config, "--resume", "train.steps=6", "model.lora.alpha=64")
    assert refused.returncode == 2 and "cannot resume" in refused.stderr and "alpha" in refused.stderr, refused.stderr
    shutil.rmtree(folder)
    start_of("clip", folder)
    refused = train(config, "--resume", "train.steps=6")
    assert refused.returncode == 2 and "model.start is not what it was" in " ".join(refused.stderr.split())
    with pytest.raises(UserError, match="model.start is not what it was"):
        mmcontrast.load(tmp_path / "runs" / "tuned")


@pytest.mark.parametrize(
    "option",
    [
        pytest.param("train.compile=[image]", marks=pytest.mark.slow),
        "train.recompute=[image, text]",
        "train.precision=bf16",
    ],
)
def test_blocks_that_are_compiled_or_recomputed_learn_the_same(option, tmp_path):
    folder = start_of("clip", tmp_path / "start")
    write_pairs("clip", tmp_path)
    config = write_run(tmp_path, str(folder), model={"lora": {"rank": 2}}, train={"lr": 0.01, "optimizer": "sgd"})
    found = []
    for name, given in (("plain", []), ("other", [option])):
        done = train(config, *given, f"run.name={name}")
        assert done.returncode == 0, done.stderr
        found.append(load_file(tmp_path / "runs" / name / "checkpoints" / "step-00000002" / checkpoint.ADAPTER))
    rtol, atol = (0.05, 3e-4) if "bf16" in option else (1e-4, 1e-6)
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_are_one(parallel, tmp_path):
    folder = start_of("clip", tmp_path / "start")
    write_pairs("clip", tmp_path)
    config = write_run(tmp_path, str(folder), model={"lora": {"rank": 2}}, train={"lr": 0.01, "steps": 3, "optimizer": "sgd"})
    found = []
    for name, ranks in (("one", 1), ("two", 2)):
        done = train(config, f"run.name={name}", f"train.parallel={parallel}", "data.lanes=2", ranks=ranks)
        assert done.returncode == 0, done.stderr
        found.append(load_file(tmp_path / "runs" / name / "checkpoints" / "step-00000003" / checkpoint.ADAPTER))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-6)


def test_merging_is_exact_in_training_and_evaluation_and_gives_old_names_back():
    from mmcontrast.models import OpenClipTextTower

    tower = OpenClipTextTower(width=32, layers=2, heads=2, context_length=12)
    names = list(tower.state_dict())
    tokens = torch.randint(1, 49406, (5, 9))
    plain = tower.eval()(tokens)
    adapted = add_lora(tower, rank=3, alpha=6.0)
    torch.testing.assert_close(tower(tokens), plain, rtol=0, atol=0)
    for module in tower.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.up, std=0.1)
    assert {name for name, weight in tower.named_parameters() if weight.requires_grad} == {
        f"{place}.parametrizations.{weight}.0.{part}"
        for place, _, weight in (name.rpartition(".") for name in adapted)
        for part in ("up", "down")
    }
    trained, fast = tower.train()(tokens), tower.eval()(tokens)  # the latter by torch's fused attention
    torch.testing.assert_close(trained, fast, rtol=1e-5, atol=1e-5)
    merge_lora(tower)
    torch.testing.assert_close(tower(tokens), fast, rtol=1e-5, atol=1e-5)
    assert set(tower.state_dict()) == set(names) and not torch.allclose(plain, fast, atol=0.1)


def test_dropout_is_on_the_updates_input():
    """In training alone, of plain linear layers; a tower that has none of them is refused, one that has some says so."""
    from mmcontrast.models import OpenClipTextTower, TimmTower

    tower = TimmTower("vit_base_patch16_siglip_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    add_lora(tower, rank=2, alpha=3.0, dropout=0.4)
    layer = tower.network.blocks[0].mlp.fc1
    low_rank, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    nn.init.normal_(low_rank.up)
    batch = torch.randn(6, 32)
    torch.manual_seed(7)
    found = layer.train()(batch)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(batch, 0.4)
    wanted = batch @ original.T + layer.bias + 1.5 * dropped @ low_rank.down.T @ low_rank.up.T
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.eval()(batch), batch @ layer.weight.T + layer.bias, rtol=1e-5, atol=1e-5)
    text = OpenClipTextTower(width=32, layers=1, heads=2, context_length=12)
    with pytest.raises(UserError, match=r"dropout=0.1: 2 of 2 adapted weights of a TextTransformer .* leave it out"):
        add_lora(text, 2, targets="attention", dropout=0.1)
    names = [f"{name}.{weight}" for name, _, weight in adaptable(text, "attention")]
    block = "network.transformer.resblocks.0"
    assert names == [f"{block}.attn.in_proj_weight", f"{block}.attn.out_proj.weight"]  # of a ResidualAttentionBlock's four
    assert len(add_lora(text, 2, dropout=0.1)) == 4


def test_targets_are_by_type_and_place():
    """timm's patch embedding has a `proj` that is no linear layer of a block; attention alone is a part of all."""
    from mmcontrast.models import TimmTower

    tower = TimmTower("vit_base_patch16_siglip_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
    every, attention = ([f"{name}.{weight}" for name, _, weight in adaptable(tower, kind)] for kind in ("all", "attention"))
    assert "network.blocks.1.mlp.fc2.weight" in every and "network.attn_pool.kv.weight" in attention
    assert not any("patch_embed" in name for name in every)
    assert {name for name in every if "mlp" not in name} == set(attention) - {"network.attn_pool.mlp.fc1.weight"} or set(
        attention
    ) < set(every)
    with pytest.raises(UserError, match="has linear layers of all"):
        add_lora(TimmTower("resnet18", channels=[8, 8, 16, 16]), 2)
