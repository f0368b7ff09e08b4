"""The doctor looks at this machine for real; what it must find is provoked for real where one can."""

import io
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image

from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.data import write_shard
from mmcontrast.doctor import BAD, OK, WARNING, Check, devices, host, packages, run
from tests.command import Process, mmcontrast, run_script, train
from tests.models.open_clip_models import save

ROOT = Path(__file__).parent.parent


def doctor(tmp_path, *arguments, **options):
    """Return the exit code and the checks by name, of the command."""
    out = tmp_path / "found.json"
    done = mmcontrast("doctor", *arguments, "--json", out, **options)
    assert out.exists(), done.stderr
    return done.returncode, {row["name"]: row for row in json.loads(out.read_text())}


def run_with_few_files(*arguments):
    """Run the command where 200 files may be open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    app(arguments)


def of_config(config_file, *overrides, rate=None) -> dict[str, Check]:
    return {check.name: check for check in run.run_checks(config_file, overrides, rate)}


def test_this_machine_and_a_config_that_fits(config_file, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    code, found = doctor(tmp_path, str(config_file), env={"OMP_NUM_THREADS": "1"}, cwd=folder)
    assert code == 0, {name: row for name, row in found.items() if row["state"] == BAD}
    assert found["python"]["found"].startswith("3.")
    assert f"torch {torch.__version__.split('+')[0]}" in found["packages"]["found"]
    if not torch.cuda.is_available():
        assert found["all-reduce, gloo"]["numbers"]["gb_per_second"] > 0.01
        assert 1e-3 < found["speed of the CPU, 1 threads"]["numbers"]["fp32_tflops"] < 100
    assert found["samples of data.train"]["numbers"]["per_second_and_worker"] > 10
    assert found["shards of data.train"]["found"].startswith("3;")
    assert not (tmp_path / "runs").exists() and not list(folder.iterdir()), "nothing is left behind"


def test_what_is_bad_is_the_exit_code(config_file, tmp_path):
    out = tmp_path / "found.json"
    arguments = ["doctor", str(config_file), "data.train=nowhere-*.tar", "--json", str(out)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "no_such_interface"}
    doctor_with_few_files = Process(f"{__name__}:run_with_few_files", arguments, ROOT, environment)
    code = doctor_with_few_files.wait(900)
    found = {row["name"]: row for row in json.loads(out.read_text())}
    assert code == 1
    files, shards = found["open files"], found["shards of data.train"]
    assert files["state"] == BAD and "at most 200" in files["found"] and files["remedy"]
    assert shards["state"] == BAD and "no shard at 'nowhere-*.tar'" in shards["found"]
    assert found["shards of evaluation.splits.val"]["state"] == OK
    if not torch.cuda.is_available():  # else NCCL's is measured
        meeting = found["all-reduce, gloo"]
        assert meeting["state"] == BAD and "fails over 2 processes" in meeting["found"]
        assert "no_such_interface" in meeting["found"]


def test_a_package_that_cannot_be_imported_is_named_and_the_rest_still_said():
    script = """import sys
for name in list(sys.modules):  # of the fork server
    if name.split(".")[0] in ("mmcontrast", "pyarrow"):
        del sys.modules[name]
sys.modules["pyarrow"] = None
from mmcontrast.doctor import examine
for check in examine(None):
    print(check.state, check.name, check.found, check.remedy)"""
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert "bad packages pyarrow" in done.stdout and "pip install 'pyarrow>=" in done.stdout
    assert "bad the rest not looked at" in done.stdout
    assert "ok speed of" in done.stdout


def test_packages_that_are_missing_or_too_old():
    check = packages._required([Requirement("torch>=99"), Requirement("no-such-package-here>=1"), Requirement("rich>=1")])
    assert check.state == BAD and check.remedy == "pip install 'torch>=99' 'no-such-package-here>=1'"
    assert f"torch is {torch.__version__.split('+')[0]}, not >=99; no-such-package-here is not installed" in check.found
    extra = packages._extras([Requirement('no-such-package-here>=1; extra == "sound"')], ["sound"])
    assert extra.state == OK and "pip install 'mmcontrast[sound]'" in extra.found


def test_importing_the_doctor_imports_no_package_that_it_looks_for():
    script = "import sys, torch; before = set(sys.modules); import mmcontrast.doctor; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"timm", "transformers", "pyarrow", "accelerate", "open_clip"} & set(done.stdout.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
@pytest.mark.parametrize(
    ("prints", "code", "hidden", "found"),
    [
        ("580.10, NVIDIA Card", 0, None, "driver 580.10, NVIDIA Card; not seen: "),
        ("580.10, NVIDIA Card", 0, "", "hidden by CUDA_VISIBLE_DEVICES=''"),
        ("it could not communicate with the driver", 9, None, "nvidia-smi finds no GPU: it could not communicate"),
    ],
)
def test_a_gpu_that_torch_does_not_see(prints, code, hidden, found, tmp_path, monkeypatch):
    """The command is a script, there being no GPU; torch is what it is."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{prints}'\nexit {code}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    check = devices.torch_build()
    assert check.state == BAD and (found in check.found or not torch.version.cuda)


def test_a_disk_that_is_too_small(config_file, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(small)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.strip()}")
    try:
        check = of_config(config_file, f"run.dir={small}/runs", "train.keep_checkpoints=9")["disk of the run"]
        assert check.state == BAD and f"{small}: 3 MiB free; 11 checkpoints" in check.found
        assert host.disk("disk", small, 0, "make room").state == OK
        (small / "much").write_bytes(b"x" * (3 * 2**20))
        assert host.disk("disk", small, 0, "make room").state == BAD
        assert not list(small.glob("tmp*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@contextmanager
def nobody():
    """Without root's rights, if they are ours."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_written(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with nobody():
        check = host.disk("disk of the run", closed / "runs" / "name", 0, "set run.dir")
    assert check.state == BAD and "Permission denied" in check.found and check.remedy == "set run.dir"


def test_the_size_of_a_checkpoint_is_that_of_a_real_one(config_file, tmp_path):
    options = ["train.steps=1", "train.ema_decay=0.9", "train.queue_size=64", "train.freeze={towers.text.*: null}"]
    estimated = run.checkpoint_bytes(load_config(config_file, options))
    train(config_file, *options)
    saved = sum(file.stat().st_size for file in (tmp_path / "runs/small/checkpoints/step-00000001").iterdir())
    assert saved == pytest.approx(estimated, rel=0.1)


def test_a_tower_that_computes_while_it_is_made_is_measured_too(config_file, tmp_path, monkeypatch):
    (tmp_path / "my_towers.py").write_text("""
import torch
from mmcontrast.models import Tower

class Stiff(Tower):
    def __init__(self):
        super().__init__()
        self.network, self.width = torch.nn.Linear(1000, int(torch.tensor(24.0).item())), 24
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = run.checkpoint_bytes(load_config(config_file))
    assert run.checkpoint_bytes(load_config(config_file, ["towers.audio={type: my_towers:Stiff}"])) != plain


def test_a_damaged_shard_and_bad_samples(config_file, corpus, tmp_path):
    half = tmp_path / "half.tar"
    half.write_bytes((corpus / "train-00000.tar").read_bytes()[:20_000])
    found = of_config(config_file, f"data.train=[{corpus}/train-00001.tar, {half}]")
    assert found["shards of data.train"].state == BAD and "half.tar" in found["shards of data.train"].found

    shard = run.index_shard(corpus / "train-00000.tar")
    samples = [{"__key__": shard.keys[row], **shard.read(row, ["png", "txt", "flac", "json"])} for row in range(len(shard))]
    samples[3] = {**samples[3], "png": b"no picture"}
    write_shard(tmp_path / "bad.tar", samples)
    found = of_config(config_file, f"data.train={tmp_path}/bad.tar")["samples of data.train"]
    assert found.state == BAD and "member .png" in found.found
    mild = of_config(config_file, f"data.train={tmp_path}/bad.tar", "data.max_bad_share=0.5")["samples of data.train"]
    assert mild.state == WARNING


def test_the_fields_of_a_start_are_decoded(tmp_path):
    samples = [{"__key__": f"{k}", "jpg": b"no picture", "txt": "a"} for k in range(8)]
    write_shard(tmp_path / "bad.tar", samples)
    start = save(tmp_path / "start", "clip")
    tree = {"run": {"name": "x", "dir": str(tmp_path / "runs")}, "model": {"start": str(start)}, "objective": "infonce"}
    tree |= {"data": {"train": str(tmp_path / "bad.tar")}, "train": {"steps": 2, "batch_size": 4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    found = of_config(tmp_path / "config.yaml")
    assert "2 fields, 2 towers" in found["config"].found and found["samples of data.train"].state == BAD
    picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, "JPEG")
    write_shard(tmp_path / "bad.tar", [sample | {"jpg": picture.getvalue()} for sample in samples])
    found = of_config(tmp_path / "config.yaml", "pairing={type: anchor, field: text}")["samples of data.train"]
    assert found.state == OK and found.numbers["bytes_each"] >= 3 * 32 * 32
    assert of_config(tmp_path / "config.yaml", "pairing={type: anchor, field: audio}")["config"].state == BAD


def test_several_sources_and_a_stream(config_file, corpus, monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 600.0)  # a busy machine decodes fewer samples in the time of a user
    two = f"data.train={{a: {{shards: {corpus}/train-00000.tar}}, b: {{shards: {corpus}/train-00001.tar}}}}"
    found = of_config(config_file, two)
    assert found["samples of data.a"].state == found["samples of data.b"].state == OK
    streamed = of_config(config_file, "data.sequential=true")["samples of data.train"]
    assert streamed.state == OK and streamed.numbers["samples"] == run.SAMPLES


def test_workers_for_a_rate_of_training(config_file):
    plenty = of_config(config_file, "data.num_workers=1", rate=1.0)["samples of data.train"]
    assert plenty.state == OK and "take 1 workers each" in plenty.found
    few = of_config(config_file, "data.num_workers=1", rate=1e5)["samples of data.train"]
    assert few.state == WARNING
    wanted = int(few.remedy.removeprefix("set data.num_workers to "))
    assert wanted * few.numbers["per_second_and_worker"] >= 1e5 > (wanted - 1) * few.numbers["per_second_and_worker"]


def test_more_workers_and_batches_than_the_machine_has(config_file, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    found = of_config(config_file, "data.num_workers=9999")
    assert found["CPU"].state == WARNING and "data.num_workers" in found["CPU"].remedy
    assert found["open files"].state == BAD
    huge = of_config(config_file, "data.num_workers=99", "train.batch_size=1048576", "fields.image.modality.size=224")
    assert huge["/dev/shm"].state == BAD and "--shm-size" in huge["/dev/shm"].remedy


def test_a_config_that_is_wrong(config_file):
    found = of_config(config_file, "train.stps=3")
    assert list(found) == ["config"] and "did you mean 'steps'" in found["config"].found and found["config"].state == BAD
    tower = of_config(config_file, "towers.image.model=resnet81")["disk of the run"]
    assert tower.state == BAD and "resnet81" in tower.found


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("3:cpu,cpuacct:/job\n0::/\n", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, 0.5),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_limits_of_control_groups(lines, files, cores, tmp_path):
    """Trees of both versions, as the kernel writes them: to make groups takes rights over the machine."""
    (tmp_path / "own").write_text(lines)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert host.cgroup_cores(tmp_path, tmp_path / "own") == cores
