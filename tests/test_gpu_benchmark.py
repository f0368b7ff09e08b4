"""benchmarks/gpu.py: its smallest sizes in Triton's interpreter, what ends a measurement and what does not, and its patch."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import faiss  # noqa: F401  # this and the others: the parts, forked from here, inherit them
import open_clip_train.train  # noqa: F401
import pytest
import torch
import torch.nn.functional as F

import mmcontrast.search.index
import mmcontrast.training.step  # noqa: F401
from tests.command import run_script

ROOT = Path(__file__).parents[1]
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA may have begun in this process: run the script itself")


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    return importlib.import_module("gpu")


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def states(out: Path, part: str) -> dict[str, str]:
    """The last of each key."""
    return {line["key"]: line["state"] for line in lines(out) if line["part"] == part}


@pytest.mark.slow
@on_a_cpu
def test_every_part_runs_its_smallest_sizes(gpu, tmp_path):
    """In a process of its own: one that has computed gradients may not fork."""
    out = tmp_path / "out"
    script = """
import sys
sys.path.insert(0, "benchmarks")
import gpu
for part, given in gpu.PARTS.items():
    gpu.PARTS[part] = given._replace(seconds=500)  # however busy this machine is
sys.exit(gpu.main(sys.argv[1:]))
"""

    def main(*arguments: object) -> str:
        done = run_script(script, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    told = main(out)
    assert "# GPU benchmarks without a GPU" in told and "No GPU was here" in told
    for part in gpu.PARTS:
        found = states(out, part)
        assert found.pop("(complete)") == "complete", part
        trouble = {key: state for key, state in found.items() if state not in ("done", "missing", "skipped")}
        assert not trouble, f"{part}: {trouble}\n{(out / 'log.txt').read_text()}"
        assert f"## {part}: " in told
    assert {key for key, state in states(out, "loss").items() if state == "done"} >= {
        "infonce D=16 N=48: ours", "infonce D=16 N=48: open_clip ClipLoss",
        "siglip D=16 N=48: ours", "siglip D=16 N=48: open_clip SigLipLoss", "lit D=16 N=48: ours", "matryoshka D=16 N=48: ours",
    }  # fmt: skip
    for record in lines(out):
        values = record.get("values", {})
        if "errors" in values:
            assert max(values["errors"]) < 1e-5
        if record["part"] == "evaluation" and "recalls" in values:
            assert 0 < values["recalls"]["there"][0] < 1
        if "same" in values:
            assert values["same"] > 0.99
    assert not (out / "launches.patch").exists()  # times of the interpreter choose nothing
    assert len(states(out, "tests")) > 200  # every test of tests/gpu was collected without tests/conftest.py

    begun = sum(line["state"] == "started" for line in lines(out))
    missing = sum(line["state"] == "missing" for line in lines(out))
    main(out)
    assert sum(line["state"] == "started" for line in lines(out)) == begun + missing  # what was missing is looked for again
    assert "launches" in main(out, "--list")


def run_broken(context):
    context.measure("good", lambda: {"pid": os.getpid()})
    context.measure("hang", lambda: time.sleep(600), limit=0.5)
    context.measure("crash", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    context.measure("memory", lambda: torch.empty(2**62))
    context.measure("wrong", lambda: {}["no such key"])
    context.measure("peer", lambda: {"answer": importlib.import_module("a_peer_in_a_wheel").ANSWER})
    context.measure("last", lambda: {"pid": os.getpid()})


@on_a_cpu
def test_what_goes_wrong_ends_one_measurement(gpu, tmp_path, monkeypatch):
    part = ModuleType("gpu_parts.broken")
    part.run, part.table = run_broken, lambda records, results: f"{len(records)} good ones"
    monkeypatch.setitem(sys.modules, "gpu_parts.broken", part)
    monkeypatch.setitem(gpu.PARTS, "broken", gpu.PARTS["tests"]._replace(what="nothing"))
    out, call = tmp_path / "out", [str(tmp_path / "out"), "--seconds", "60", "--only", "broken"]
    assert gpu.main(call) == 0
    found = states(out, "broken")
    assert found == {
        "good": "done", "hang": "timed out", "crash": "died", "memory": "failed", "wrong": "failed", "peer": "missing",
        "last": "done", "(complete)": "complete",
    }  # fmt: skip
    told = (out / "summary.md").read_text()
    assert "2 good ones" in told
    for reason in ("hang: timed out: longer than 0 s", "crash: died: SIGSEGV", "wrong: failed: KeyError: 'no such key'"):
        assert reason in told
    pids = {line["key"]: line["values"]["pid"] for line in lines(out) if "pid" in line.get("values", {})}
    assert pids["good"] != pids["last"] and os.getpid() not in pids.values()

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "a_peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_peer_in_a_wheel.py", "ANSWER = 42\n")
    with (out / "results.jsonl").open("a") as file:
        file.write('{"part": "broken", "key": "good", "sta')  # the machine went away while it was written
    before = len((out / "results.jsonl").read_text().splitlines())
    assert gpu.main([*call, "--wheels", str(wheels)]) == 0
    assert {"good": "done", "hang": "timed out", "peer": "done"}.items() <= states_of_whole_lines(out).items()
    added = (out / "results.jsonl").read_text().splitlines()[before:]
    assert {json.loads(line)["key"] for line in added} == {"peer", "(complete)"}

    began = time.monotonic()
    assert gpu.main([*call, "--retry", "--wheels", str(wheels)]) == 0
    assert time.monotonic() - began > 0.5  # it hung again
    added = (out / "results.jsonl").read_text().splitlines()[before:]
    assert {"hang", "crash", "memory", "wrong"} <= {json.loads(line)["key"] for line in added}


def states_of_whole_lines(out: Path) -> dict[str, str]:
    found = {}
    for line in (out / "results.jsonl").read_text().splitlines():
        if line.endswith("}"):
            record = json.loads(line)
            found[record["key"]] = record["state"]
    return found


@on_a_cpu
def test_the_time_of_a_call_is_kept(gpu, tmp_path, monkeypatch):
    part = ModuleType("gpu_parts.slow")
    part.run = lambda context: context.measure("slow", lambda: time.sleep(600), limit=500)
    part.table = lambda records, results: ""
    monkeypatch.setitem(sys.modules, "gpu_parts.slow", part)
    monkeypatch.setitem(gpu.PARTS, "slow", gpu.PARTS["tests"]._replace(what="nothing"))
    began = time.monotonic()
    assert gpu.main([str(tmp_path), "--seconds", str(gpu.RESERVE + 2), "--only", "slow"]) == 0
    assert time.monotonic() - began < 300
    assert states(tmp_path, "slow") in ({}, {"slow": "cut"})  # a busy machine may not have come to it


def test_what_was_cut_off_is_gone_on_with_once(gpu, tmp_path):
    results = importlib.import_module("gpu_parts.results").Results(tmp_path / "results.jsonl")
    for cuts, state in enumerate(("cut", "timed out")):  # the second time it is the measurement's own fault
        results.add("loss", "large", "started", since=time.time(), limit=60, cuts=cuts)
        results.add("loss", "small", "done", values={})
        results.forgive(["loss"], everything=False)  # as a call begins, after one that was killed
        assert states(tmp_path, "loss") == {"large": state, "small": "done"}


@on_a_cpu
def test_results_of_another_machine_are_not_mixed(gpu, tmp_path, capsys):
    values = {"device": "cuda", "card": "NVIDIA H100", "capability": "9.0", "memory": 2**36, "driver": "580", "cuda": "13.0"}
    values |= {"python": "3.12", "cpu": "some", "cores": 1, "date": "2026-11-25"}
    values["versions"] = {"torch": "2.11.0", "triton": "3.6.0"}
    record = {"part": "machine", "key": "machine", "state": "done", "values": values}
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    assert gpu.main([str(tmp_path), "--only", "loss"]) == 2
    said = capsys.readouterr().err
    assert "NVIDIA H100, torch 2.11.0, Triton 3.6.0" in said and "take another folder" in said
    assert lines(tmp_path) == [record]


def test_the_patch_of_launches_applies(gpu, tmp_path):
    launches = importlib.import_module("gpu_parts.launches")
    tiled = importlib.import_module("mmcontrast.score.backends.triton_tiled")
    assert launches.patch(dict(tiled.LAUNCHES), "any card") == ""
    best = {"half": tiled.Launch(64, 256, 32, 4, 5), "ieee": tiled.Launch(128, 64, 16, 4, 3), "tf32": tiled.LAUNCHES["tf32"]}
    file = tmp_path / launches.SOURCE
    file.parent.mkdir(parents=True)
    file.write_text((ROOT / launches.SOURCE).read_text())
    patch = launches.patch(best, "NVIDIA H100 80GB HBM3")
    done = subprocess.run(["git", "apply", "--verbose"], cwd=tmp_path, input=patch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed = file.read_text()
    assert max(map(len, changed.splitlines())) <= 128
    for product, launch in best.items():
        numbers = ", ".join(map(str, dataclasses.astuple(launch)))
        assert re.search(rf'^    "{product}": Launch\({numbers}\),', changed, re.MULTILINE)


def test_the_patch_takes_what_fits_every_card(gpu):
    launches = importlib.import_module("gpu_parts.launches")
    pinned = dataclasses.astuple(importlib.import_module("mmcontrast.score.backends.triton_tiled").LAUNCHES["half"])

    def record(launch, ms, shared=64 * 1024, spills=0, objective="infonce", state="done"):
        times = {kernel: {"512": ms, "768": ms} for kernel in launches.KERNELS}
        values = {"product": "half", "objective": objective, "launch": list(launch), "ms": times, "shared_bytes": shared}
        return {"part": "launches", "key": f"{launch} {objective}", "state": state, "values": values | {"spills": spills}}

    fast, large, failed = (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (64, 64, 64, 4, 3)
    records = [record(pinned, 2.0), record(fast, 1.5, spills=8), record(large, 1.0, 200 * 1024)]
    records.append({**record(failed, 0.1), "state": "failed"})
    ranked = launches.ranking("half", records)
    assert [tuple(v["launch"]) for v in ranked] == [large, fast, pinned]
    assert [v["score"] for v in ranked] == pytest.approx([0.5, 0.75, 1.0])
    assert dataclasses.astuple(launches.chosen(records)["half"]) == fast
    records += [record(pinned, 2.0, objective="siglip"), record(fast, 6.0, objective="siglip")]
    assert dataclasses.astuple(launches.chosen(records)["half"]) == pinned  # slower on the whole


def test_a_candidate_that_is_wrong_or_does_not_compile_does_not_count(gpu, monkeypatch):
    launches = importlib.import_module("gpu_parts.launches")
    tiled = importlib.import_module("mmcontrast.score.backends.triton_tiled")
    kernels = importlib.import_module("mmcontrast.score.backends.triton_kernels")
    pinned, kernel = dict(tiled.LAUNCHES), kernels.reduce_tiles
    if not torch.cuda.is_available():
        with pytest.raises(Exception, match="power of 2"):
            launches.figures("half", "infonce", tiled.Launch(48, 64, 16, 1, 1), "cpu")
    assert pinned == tiled.LAUNCHES and kernels.reduce_tiles is kernel
    monkeypatch.setattr(tiled, "merge_tiles", lambda reduction, parts: parts.logsumexp(0) + 0.05)
    with pytest.raises(ValueError, match="wrong: a relative error of"):
        launches.figures("ieee", "infonce", tiled.Launch(64, 64, 16, 4, 1), "cuda" if torch.cuda.is_available() else "cpu")


def test_a_forecast_is_by_the_square_until_it_is_known_better(gpu):
    loss = importlib.import_module("gpu_parts.loss")
    one, two = (1000, {"seconds": 1.0, "bytes": 100}), (2000, {"seconds": 4.0, "bytes": 200})
    assert loss.forecast([], 4000) == (0.0, 0.0)
    assert loss.forecast([one], 4000) == pytest.approx((16.0, 1600.0))
    assert loss.forecast([one, two], 8000) == pytest.approx((64.0, 800.0))


def test_forms_of_peers_are_what_their_papers_write(gpu):
    losses = importlib.import_module("losses")
    leaves = [leaf.detach().double().requires_grad_() for leaf in losses.inputs(40, 64, torch.float32)]
    x, y, scale, _ = leaves

    def clip(a, b):
        scores, here = scale * a @ b.T, torch.arange(len(a))
        return (F.cross_entropy(scores, here) + F.cross_entropy(scores.T, here)) / 2

    parts = [(F.normalize(x[:, :width]), F.normalize(y[:, :width])) for width in (16, 32, 64)]
    wanted = {"lit": F.cross_entropy(scale * x @ y.detach().T, torch.arange(40)), "matryoshka": sum(clip(*p) for p in parts)}
    assert losses.prefixes(64) == (16, 32, 64) and losses.prefixes(1152) == (256, 576, 1152)
    for form, want in wanted.items():
        got = losses.FORMS[form]()(*leaves)
        options = {"allow_unused": True, "materialize_grads": True}
        grads, true_grads = (torch.autograd.grad(value, [x, y, scale], **options) for value in (got, want))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads, true_grads)
