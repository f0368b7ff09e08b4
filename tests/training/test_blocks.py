"""What is done to the blocks of any family of towers: found, recomputed, compiled; the training stays what it was."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mmcontrast.components import build
from mmcontrast.errors import UserError
from mmcontrast.modalities import VectorModality
from mmcontrast.model import ContrastiveModel
from mmcontrast.towers import TOWERS, Tower, blocks_of
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.parallel import place
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
    blocks = blocks_of(build(spec, TOWERS, "tower"))
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
    called = place(changed, [aside], TrainOptions(steps=1, batch_size=6, **options), Accelerator(cpu=True))
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
        called = place(model, [], TrainOptions(steps=1, batch_size=6, **options), Accelerator(cpu=True))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            ids = torch.arange(6)
            here = dict.fromkeys("ab", ids >= 0)
            called(Batch({f: torch.randn(6, 8) for f in "ab"}, here, ids, ids, [{}] * 6))
        return sum(kept)

    assert saved_bytes({"recompute": ["one"]}) < 0.7 * saved_bytes({})


def test_what_does_not_go_together_is_refused(monkeypatch):
    def placed(**options):
        return place(make_model(), [], TrainOptions(steps=1, batch_size=6, **options), Accelerator(cpu=True))

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
