"""The term of a bridge against its dense form in float64; over ranks; in a run."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from mmcontrast.runs import make_run_context
from mmcontrast.training.bridging import bridge_loss
from tests.command import call_on_ranks, free_port, mmcontrast
from tests.conftest import write_config


def rows_of(n, seed, d=6):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def dense(first, second, banks, scale, bank_scale):
    """banks: of (rows of the first, rows of the second) so many each, the entries that they see."""
    expected = [[], []]
    for side, rows in enumerate((first, second)):
        start = 0
        for *numbers, bank in banks:
            part = rows[start : start + numbers[side]].detach()
            expected[side].append(F.normalize((bank_scale * part @ bank.T).softmax(1) @ bank, dim=1))
            start += numbers[side]
    e, f = (torch.cat(parts) for parts in expected)
    targets, logits = bank_scale * e @ f.T, scale * first @ second.T
    return (F.cross_entropy(logits, targets.softmax(1)) + F.cross_entropy(logits.T, targets.T.softmax(1))) / 2


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (100.0, 30.0)])
def test_it_is_the_dense_form(backend, scales):
    first, second, bank = rows_of(7, 0).requires_grad_(), rows_of(9, 1).requires_grad_(), rows_of(5, 2)
    scale = torch.tensor(scales[0], dtype=torch.float64, requires_grad=True)
    leaves = [first, second, scale]
    loss = bridge_loss(first, second, bank, logit_scale=scale, bank_scale=scales[1], backend=backend)
    want = dense(first, second, [(7, 9, bank)], scale, scales[1])
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def test_nobody_on_one_side():
    first, second = rows_of(3, 0).requires_grad_(), rows_of(0, 1).requires_grad_()
    loss = bridge_loss(first, second, rows_of(4, 2), logit_scale=10.0, bank_scale=10.0)
    loss.backward()
    assert loss.item() == 0.0 and first.grad.abs().sum() == 0


PARTS = [(4, 2, 3), (0, 5, 2), (3, 1, 0)]  # of each rank: rows of the fields, entries. The last has none: its rows count not


def test_ranks_of_unequal_parts_are_one_process():
    call_on_ranks(f"{__name__}:worker", 3, free_port())


def worker(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    n, m, b = PARTS[rank]
    before = [sum(part[k] for part in PARTS[:rank]) for k in range(3)]
    whole = [rows_of(sum(part[k] for part in PARTS), k) for k in range(3)]
    own = [whole[k][before[k] : before[k] + (n, m, b)[k]].clone().requires_grad_() for k in range(3)]
    loss = bridge_loss(*own, logit_scale=20.0, bank_scale=15.0, group=dist.group.WORLD)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    kept = [torch.cat([whole[k][start : start + PARTS[r][k]] for r, start in ((0, 0), (1, PARTS[0][k]))]) for k in (0, 1)]
    leaves = [rows.clone().requires_grad_() for rows in kept]
    bank = whole[2]
    want = dense(*leaves, [(4, 2, bank[:3]), (0, 5, bank[3:5])], 20.0, 15.0)
    torch.testing.assert_close(total / 3, want.detach(), rtol=1e-10, atol=1e-12)
    for k, grad in enumerate(torch.autograd.grad(want, leaves)):
        mine = grad[before[k] : before[k] + (n, m)[k]] if rank < 2 else torch.zeros(n if k == 0 else m, 6)
        got = own[k].grad if own[k].grad is not None else torch.zeros_like(own[k])
        torch.testing.assert_close(got / 3, mine.double(), rtol=1e-9, atol=1e-11)
    dist.destroy_process_group()


def test_a_run_learns_through_it(corpus, tmp_path):
    """From its start on."""
    config = write_config(corpus, tmp_path)
    options = [
        "pairing={type: anchor, field: text}",
        "train.signals=true",
        "train.log_every=1",
        "evaluation={}",
        "train.steps=4",
    ]
    bridge = "train.bridge={through: text, weight: 0.5, start: 2}"
    losses = {}
    for name, more in {"none": [], "bridge": [bridge]}.items():
        done = mmcontrast("train", config, *options, *more, f"run.name={name}")
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [line for line in map(json.loads, lines) if "loss" in line]
    plain, bridged = ([line["loss"] for line in losses[name]] for name in ("none", "bridge"))
    assert bridged[:2] == plain[:2] and bridged[2] > plain[2]
    (signal,) = (value for name, value in losses["bridge"][2].items() if name.endswith("/bridge"))
    assert bridged[2] - plain[2] == pytest.approx(0.5 * signal, rel=1e-4)


@pytest.mark.parametrize(
    ("bridge", "message"),
    [
        ("{through: txt}", "no field 'txt' that is contrasted; did you mean 'text'"),
        ("{through: text, pairs: [[image, text]]}", "image and text: two fields beside 'text' learn through it"),
        ("{through: text, pairs: [[image, sound]]}", "no field 'sound' that is contrasted"),
    ],
)
def test_refusals(corpus, tmp_path, bridge, message):
    config = write_config(corpus, tmp_path)
    with pytest.raises(UserError, match=message):
        make_run_context(load_config(config, [f"train.bridge={bridge}"]))
