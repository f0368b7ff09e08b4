"""The time of a step by parts: by hand, at the sizes that `plan` is asked for, and beside what is published."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.errors import UserError
from mmcontrast.plan import plan_run
from mmcontrast.plan.memory import flops_of
from mmcontrast.plan.run import BatchShares, build_model, step_work
from mmcontrast.scaling import Cluster, Work, link_of, sharded_calls, step_time
from mmcontrast.score.traffic import MACHINES, Link, Machine, loss_calls, passes, with_links
from mmcontrast.training.cost import fakes
from tests.training.teaching import write_config

CONFIGS = Path(__file__).parent.parent / "configs"
WORK = Work(samples=1000, at_a_time=250, forward=1e9, backward=2e9, width=100, gradients=4 * 10**8)
MACHINE = with_links(MACHINES["cuda"], within=Link(1e-6, 100e9), between=Link(1e-6, 100e9))


def test_parts_by_hand():
    alone = step_time(WORK, 1, 1, MACHINE, towers_rate=1e12)
    assert alone.parts["towers"] == pytest.approx(3.0) and alone.dominant == "towers"
    assert alone.parts["the loss's products"] == pytest.approx(8 * 1000 * 1000 * 100 / MACHINE.products)
    assert alone.reduction == alone.parts["communication of the loss"] == 0.0
    assert alone.total == sum(alone.parts.values())
    cached = step_time(replace(WORK, again=1, recomputed=0.5e9), 1, 1, MACHINE, 1e12)
    assert cached.parts["towers"] == pytest.approx(4.5)
    two = step_time(WORK, 1, 2, MACHINE, towers_rate=1e12)
    assert two.parts["the loss's products"] == pytest.approx(2 * alone.parts["the loss's products"])
    assert two.reduction == pytest.approx(4e8 / 100e9, rel=0.05)  # 2 (W − 1) / W of them
    assert two.parts["reduction of the gradients"] == 0.0  # behind the last micro-batch's backward, 0.5 s
    slow = step_time(WORK, 1, 2, with_links(MACHINE, within=Link(1e-6, 1e8)), towers_rate=1e12)
    assert slow.parts["reduction of the gradients"] == pytest.approx(4.0 - 0.5, rel=0.05)
    never_hidden = step_time(WORK, 1, 2, replace(MACHINE, overlaps=False), towers_rate=1e12)
    assert never_hidden.parts["reduction of the gradients"] == never_hidden.reduction > 0


def test_terms_cuts_and_shards():
    one = step_time(WORK, 4, 2, MACHINE, 1e12, "ring")
    three = step_time(replace(WORK, terms=3), 4, 2, MACHINE, 1e12, "ring")
    assert three.parts["the loss's products"] == pytest.approx(3 * one.parts["the loss's products"])
    assert three.schemes["ring"].calls - 1 == 3 * (one.schemes["ring"].calls - 1)  # one exchange of sizes a loss
    cut = step_time(replace(WORK, cuts=2), 4, 2, MACHINE, 1e12, "ring")
    assert cut.parts["the loss's products"] == pytest.approx(one.parts["the loss's products"] / 2)
    assert cut.schemes["ring"].calls == 2 * one.schemes["ring"].calls
    sharded = step_time(replace(WORK, weights=4 * 10**8), 4, 2, MACHINE, 1e12)
    assert sharded.reduction > 2 * one.reduction  # of each of four micro-batches the weights twice


def test_copies_of_shards_and_one_reduction_a_step_by_hand():
    """Four micro-batches on four nodes of two: whole and as copies on each node (HSDP), reduced each time and once."""
    size = 4 * 10**8
    work = replace(WORK, weights=size)
    gather, scatter = sharded_calls(work, 4, 2)
    assert (gather.ranks, gather.nodes, gather.count, gather.sent) == (8, 4, 8, 8 * size * 7 // 8)
    assert (scatter.kind, scatter.count, scatter.sent) == ("reduce_scatter", 4, 4 * size * 7 // 8)
    assert sharded_calls(replace(work, reduced_once=True), 4, 2)[1].sent == size * 7 // 8
    gather, scatter, among = sharded_calls(replace(work, shard_ranks=2), 4, 2)
    assert (gather.ranks, gather.nodes, gather.sent) == (2, 1, 8 * size // 2) and scatter.sent == 4 * size // 2
    assert (among.kind, among.ranks, among.nodes, among.count) == ("all_reduce", 4, 4, 4)
    assert among.sent == 4 * 2 * (size // 2) * 3 // 4
    slow = with_links(MACHINE, between=Link(1e-6, 1e9))
    assert step_time(replace(work, shard_ranks=2), 4, 2, slow, 1e12).reduction < step_time(work, 4, 2, slow, 1e12).reduction
    assert [call.kind for call in sharded_calls(replace(work, shard_ranks=1), 4, 2)] == ["all_reduce"]


def test_a_locked_tower_is_not_run_again():
    cached = step_time(replace(WORK, again=1, locked=0.4e9), 1, 1, MACHINE, 1e12)
    assert cached.parts["towers"] == pytest.approx(3.0 + 0.6)
    plain, cached = (
        plan_run(load_config(CONFIGS / "lit.yaml", ["train.batch_size=64", f"train.micro_batch_size={micro}"]))
        for micro in ("null", 32)
    )
    assert plain.towers["image"].learning == 0 < plain.towers["text"].learning
    again = cached.time.parts["towers"] / plain.time.parts["towers"] - 1
    assert again == pytest.approx(plain.towers["text"].flops / plain.flops_per_sample, rel=1e-6)


def test_schemes_count_what_the_formulas_count():
    time = step_time(WORK, 4, 2, MACHINE, 1e12)
    assert set(time.schemes) == {"ring", "hierarchical", "gather"}
    assert set(step_time(WORK, 1, 8, MACHINE, 1e12).schemes) == {"ring", "gather"}
    for scheme, one in time.schemes.items():
        calls = loss_calls(scheme, 4, 2, 1000, passes(100))
        assert one.calls == 1 + sum(call.count for call in calls) and one.sent == sum(call.sent for call in calls)
    assert time.schemes[time.fastest].waits == min(one.waits for one in time.schemes.values())


def test_links_are_parsed():
    assert link_of("25", "--link") == Link(5e-6, 25e9) and link_of("300,1.5", "--within") == Link(1.5e-6, 300e9)
    for text in ("", "fast", "0", "-1", "50,", "50,0", "1,2,3", "nan", "inf", "50;5"):
        with pytest.raises(UserError, match="--link .* is not GB/s"):
            link_of(text, "--link")


def test_mistakes_are_named(tmp_path):
    path = write_config(tmp_path, "none.tar")
    with pytest.raises(UserError, match="8 devices cannot be spread evenly over 3 nodes"):
        plan_run(load_config(path), 8, cluster=Cluster(nodes=3))
    with pytest.raises(UserError, match="--gpu 'abacus'"):
        plan_run(load_config(path), cluster=Cluster(gpu="abacus"))
    refused = CliRunner().invoke(app, ["plan", str(path), "--mfu", "1.5"])
    assert refused.exit_code == 2


def test_4096_devices_and_a_batch_of_32_million(tmp_path):
    """512 nodes of 8: nothing here grows with the ranks but what the table says."""
    config = write_config(tmp_path, "none.tar", train={"batch_size": 2**25, "micro_batch_size": 64, "steps": 1})
    done = CliRunner().invoke(app, ["plan", str(config), "--devices", "4096", "--nodes", "512", "--link", "25,5", "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["per_device"] == 8192
    schemes = found["time"]["schemes"]
    assert schemes["ring"]["calls"] == 4 * 4096 - 1
    assert schemes["gather"]["memory"] == 4096 * 3 * schemes["ring"]["memory"] // 5
    assert found["time"]["scheme"] in ("ring", "hierarchical") and found["largest_batch"] % 4096 == 0
    assert found["time"]["total"] == pytest.approx(sum(found["time"]["parts"].values()))
    told = CliRunner().invoke(app, ["plan", str(config), "--devices", "4096", "--nodes", "512"]).stdout
    assert "hierarchical" in told and "assumed: between nodes 50 GB/s a device and direction, 5 µs" in told
    eight_a_node = json.loads(CliRunner().invoke(app, ["plan", str(config), "--nodes", "4", "--json"]).stdout)
    assert eight_a_node["devices"] == 32


@pytest.mark.slow
def test_the_published_rows_of_inf_cl():
    """ViT-L/14, gradient caching of 128, 8 A800 (arXiv:2410.17243, figure 4): 25.0, 49.4, 98.3, 200.3 s a step."""
    cluster = Cluster(gpu="A800", within=Link(2e-6, 200e9))
    config = load_config(CONFIGS / "clip-vit-l-14.yaml", ["train.micro_batch_size=128"])
    with fakes():
        model, config, objective, _ = build_model(config)
        flops = flops_of(model)
    for batch, seconds in ((2**15, 25.0), (2**16, 49.4), (2**17, 98.3), (2**18, 200.3)):
        shares = BatchShares.of(config.train.model_copy(update={"batch_size": batch}), 8, 1)
        work = step_work(model, config.train, shares, flops, objective, 1)
        time = step_time(work, 1, 8, cluster.machine("bf16"), cluster.towers_rate("bf16"))
        assert time.total == pytest.approx(seconds, rel=0.15) and time.dominant == "towers"


def test_a_machine_that_does_not_overlap_pays_for_all():
    machine = Machine(Link(1e-4, 1e9), Link(1e-4, 1e9), 0.0, 1e-3, 1e10, overlaps=False)
    time = step_time(WORK, 1, 4, machine, 1e9, "ring")
    assert time.schemes["ring"].waits == pytest.approx(time.schemes["ring"].alone + 3 * 1e-3)
