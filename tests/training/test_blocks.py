"""What is done to the blocks of any family of towers: found, recomputed, compiled; the training stays what it was."""

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mmcontrast.components import build
from mmcontrast.errors import UserError
from mmcontrast.modalities import VectorModality
from mmcontrast.models import TOWERS, ContrastiveModel, LinearTower, Tower
from mmcontrast.training.optim import freeze
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.parallel import check_placement, check_rows, distribute
from mmcontrast.types import Batch

BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
TEXT = {"width": 16, "layers": 3, "heads": 2, "vocab_size": 50, "context_length": 8}
FAMILIES = {
    "vit": ({"type": "timm", "model": "test_vit"}, "network.blocks.0"),
    "resnet": ({"type": "timm", "model": "resnet18", "channels": [8] * 4}, "network.layer1.0"),
    "convnext": ({"type": "timm", "model": "test_convnext"}, "network.stages.0.blocks.0"),
    "bert": ({"type": "transformers", "model": "bert", "config": BERT}, "network.encoder.layer.2"),
    "text": ({"type": "open_clip_text", **TEXT}, "network.transformer.resblocks.2"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_innermost_blocks_are_found(family):
    spec, one = FAMILIES[family]
    blocks = build(spec, TOWERS, "tower").blocks()
    assert one in blocks and len(blocks) > 1
    assert not any(name.startswith(f"{other}.") for name in blocks for other in blocks)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.norm(self.line(x)).relu())


class BlockTower(Tower):
    def __init__(self):
        super().__init__()
        self.width = 8
        self.network = nn.Module()
        self.network.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, batch):
        for block in self.network.blocks:
            batch = block(batch)
        return batch


def make_model():
    torch.manual_seed(0)
    return ContrastiveModel({f: VectorModality(8) for f in "ab"}, {"one": BlockTower()}, {"a": "one", "b": "one"}, 4)


def learn(model, called):
    here = torch.ones(6, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    rows = {f: torch.randn(6, 8, generator=generator) for f in "ab"}
    ids = torch.arange(6)
    torch.manual_seed(2)
    fields = called(Batch(rows, {"a": here, "b": here}, ids, ids, [{}] * 6)).fields
    (fields["a"] @ fields["b"].T).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())


@pytest.mark.parametrize("option", ["recompute", "compile", "both"])
def test_recomputed_and_compiled_blocks_learn_the_same(option):
    """Dropout draws the same numbers again, batch norms count once, and a copy computes with its own weights."""
    plain, changed = make_model(), make_model()
    options = {name: ["one"] for name in ("recompute", "compile") if option in (name, "both")}
    if option != "recompute":  # a compiled dropout draws other numbers
        for module in (*plain.modules(), *changed.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, Block) and option == "both":
                module.norm = nn.LayerNorm(8)
    aside = copy.deepcopy(changed)
    called = distribute(changed, [aside], TrainOptions(steps=1, batch_size=6, **options), Accelerator(cpu=True))
    expected, buffers = learn(plain, plain)
    found, seen = learn(changed, called)
    assert expected.keys() == found.keys() and len(found) > 8
    for name, gradient in expected.items():
        if option == "recompute":
            assert torch.equal(found[name], gradient), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    for name, buffer in buffers.items():
        torch.testing.assert_close(seen[name], buffer, rtol=1e-5, atol=1e-6)
    assert option == "both" or int(seen["towers.one.network.blocks.0.norm.num_batches_tracked"]) == 2  # two fields
    again = copy.deepcopy(changed) if option == "recompute" else aside
    with torch.no_grad():
        changed.towers["one"].network.blocks[0].line.weight.zero_()
    assert not torch.equal(again.encode("a", torch.ones(2, 8)), changed.encode("a", torch.ones(2, 8)))


def test_less_is_kept_for_the_backward():
    def saved_bytes(options):
        model, kept = make_model(), []
        called = distribute(model, [], TrainOptions(steps=1, batch_size=6, **options), Accelerator(cpu=True))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            ids = torch.arange(6)
            here = dict.fromkeys("ab", ids >= 0)
            called(Batch({f: torch.randn(6, 8) for f in "ab"}, here, ids, ids, [{}] * 6))
        return sum(kept)

    assert saved_bytes({"recompute": ["one"]}) < 0.7 * saved_bytes({})


@pytest.mark.parametrize("option", ["recompute", "compile"])
def test_blocks_learn_nothing_of_a_field_that_nobody_has(option, monkeypatch):
    """Recomputed as it was computed: dropout off, batch norms as they are; compiled, with its graph."""
    if option == "compile":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = make_model()
    called = distribute(model, [], TrainOptions(steps=1, batch_size=6, **{option: ["one"]}), Accelerator(cpu=True))
    ids = torch.arange(6)
    here = {"a": ids < 0, "b": ids >= 0}
    rows = {"a": torch.randn(1, 8), "b": torch.randn(6, 8)}
    nobodys = Batch(rows, here, ids, ids, [{}] * 6)
    alone = Batch(rows, {"a": ids == 2, "b": ids >= 0}, ids, ids, [{}] * 6)
    if option == "recompute":
        fields = called(alone).fields
        (fields["a"] @ fields["b"].T).square().sum().backward()
        model.zero_grad()
        model.towers["one"].network.blocks[0].norm.reset_running_stats()
    fields = called(nobodys).fields
    norm = model.towers["one"].network.blocks[0].norm
    assert norm.num_batches_tracked == 1 and not fields["a"].any()
    (fields["a"] @ fields["b"].T + fields["b"] @ torch.randn(4, 6)).square().sum().backward()
    assert norm.num_batches_tracked == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n.startswith("tow"))


def without_blocks(layers):
    tower = LinearTower(8, 8)
    if layers > 1:
        tower.network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    return ContrastiveModel({f: VectorModality(8) for f in "ab"}, {"one": tower}, {"a": "one", "b": "one"}, 4)


def test_an_option_that_finds_nothing_to_act_on_is_refused():
    def check(layers=2, **options):
        check_placement(without_blocks(layers), TrainOptions(steps=1, batch_size=6, **options))

    with pytest.raises(UserError, match=r"train\.recompute: towers\.one has no blocks that could be found: leave it out"):
        check(recompute=["one"])
    with pytest.raises(UserError, match=r"train\.layer_decay: towers\.one has no blocks .* set train\.tower_lr: {one: …}"):
        check(layer_decay={"one": 0.7})
    with pytest.raises(UserError, match=r"train\.parallel=fsdp: towers\.one has no blocks .* set train\.parallel: ddp"):
        check(parallel="fsdp")
    with pytest.raises(UserError, match=r"train\.layer_decay: no tower 'onne'; did you mean 'one'"):
        check(layer_decay={"onne": 0.7})
    with pytest.raises(UserError, match=r"train\.channels_last: no tower has a convolution"):
        check(channels_last=True)
    check(layers=1, parallel="fsdp")  # a single layer is a part
    check_placement(make_model(), TrainOptions(steps=1, batch_size=6, parallel="fsdp", layer_decay={"one": 0.5}))


@pytest.mark.parametrize(
    ("batch_size", "ranks", "options", "message"),
    [
        (8, 8, {}, "train.batch_size=8 on 8 processes and train.accumulation_steps=1 is 1 at a time$"),
        (8, 2, {"accumulation_steps": 4}, "is 1 at a time$"),
        (8, 2, {"micro_batch_size": 1}, r"is 4 at a time, in parts of at most 1 \(train.micro_batch_size\)"),
        (6, 2, {"micro_batch_size": 2}, "is 3 at a time, in parts of at most 2"),
        (9, 1, {"accumulation_steps": 2}, "cannot be cut into train.accumulation_steps=2 equal parts"),
        (17, 1, {"micro_batch_size": 4}, None),  # 4, 4, 3, 3, 3
        (5, 1, {"micro_batch_size": 4}, None),
    ],
)
def test_one_sample_alone_through_batch_norms_is_refused_at_the_start(batch_size, ranks, options, message):
    options = TrainOptions(steps=1, batch_size=batch_size, **options)
    if not message:
        check_rows(make_model(), options, ranks)
        assert min(len(part) for part in Batch({}, {}, *[torch.arange(batch_size)] * 2, [{}] * batch_size).split(4)) > 1
        return
    with pytest.raises(UserError, match=message):
        check_rows(make_model(), options, ranks)
    if "equal parts" not in message:
        check_rows(without_blocks(2), options, ranks)  # without batch norms
        locked = make_model()
        freeze(locked, {"towers.*": None})
        check_rows(locked, options, ranks)


def test_what_does_not_go_together_is_refused(monkeypatch):
    def placed(**options):
        return distribute(make_model(), [], TrainOptions(steps=1, batch_size=6, **options), Accelerator(cpu=True))

    with pytest.raises(UserError, match=r"train\.recompute: no tower 'onne'; did you mean 'one'"):
        placed(recompute=["onne"])
    with pytest.raises(UserError, match=r"train\.compile: no tower 'two'"):
        placed(compile=["two"])
    with pytest.raises(UserError, match="its batch norms allow one of the two"):
        placed(recompute=["one"], compile=["one"])
    with pytest.raises(UserError, match="take bf16"):
        placed(parallel="fsdp", precision="fp16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="set train.parallel=fsdp"):
        placed()
