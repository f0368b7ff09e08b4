"""A pool and a Ray cluster: the same bytes, the same errors; a worker that dies is tried again, or is one line."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from mmcontrast.curation.balance import balance_of
from mmcontrast.curation.exact_duplicates import ExactDuplicates
from mmcontrast.curation.filter import Filter
from mmcontrast.curation.rules import parse_rules
from mmcontrast.curation.run_stage import run_stage
from mmcontrast.data import engines
from mmcontrast.data.engines import run_jobs
from mmcontrast.data.rewriting import write_selected
from mmcontrast.errors import UserError
from tests.command import ROOT, free_port, mmcontrast
from tests.curation.pairs import bytes_of, write_pairs

ONE_PASS = [{"type": "pixels", "min": 20}, {"column": "json:similarity", "min": 0.4}]
TWO_PASSES = [{"type": "words", "min": 3}, {"column": "json:similarity", "top": 0.4}]


def dies(job: tuple[str, int]) -> int:
    """Die as many times as asked, which a file counts, then answer; a negative number is a mistake."""
    path, times = job
    if times < 0:
        raise KeyError(f"no such sample in {path}")
    with open(path, "a") as file:
        file.write("x")
    if len(Path(path).read_text()) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def filtering(rules):
    return Filter(parse_rules({"rules": rules}, "rules"))


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def test_without_ray_it_is_refused(tmp_path, monkeypatch):
    folder = write_pairs(tmp_path / "data", shards=1)
    run_stage(filtering(ONE_PASS), str(folder), tmp_path / "there", workers=1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine ray needs Ray: pip install 'mmcontrast\[ray\]'"):
        run_stage(filtering(ONE_PASS), str(folder), tmp_path / "out", engine="ray")
    with pytest.raises(UserError, match=r"pip install 'mmcontrast\[ray\]'"):
        write_selected(str(folder), tmp_path / "out", str(tmp_path / "there"), engine="ray")
    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))  # a folder of that name is a module too
    with pytest.raises(UserError, match=r"pip install 'mmcontrast\[ray\]'"):
        run_stage(filtering(ONE_PASS), str(folder), tmp_path / "out", engine="ray")
    with pytest.raises(UserError, match="--engine 'spark': pool, or ray"):
        run_stage(filtering(ONE_PASS), str(folder), tmp_path / "out", engine="spark")
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there_is_named(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    for address, message in (
        (f"127.0.0.1:{free_port()}", "no cluster at RAY_ADDRESS=127.0.0.1:.* refused"),
        ("ray://head:10001", "not of the form HOST:PORT"),
        ("127.0.0.1:6379000", "no cluster at RAY_ADDRESS"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=message):
            list(run_jobs(dies, [(str(tmp_path / "0"), 0)], "jobs", engine="ray"))
    with pytest.raises(UserError, match=r"nowhere is not there on .* must share the folders"):  # as a machine of a cluster says
        engines._on_worker(str, 1, str(tmp_path / "nowhere"), {})


def test_a_cluster_that_starts_too_slowly_is_started_again(monkeypatch, caplog):
    """As on a busy machine: Ray's own start gives up after half a minute."""
    ray = pytest.importorskip("ray")
    starts = []

    def init(**_):
        starts.append(1)
        if len(starts) < 3:
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", init)
    engines.join_cluster(1)
    assert len(starts) == 3 and caplog.text.count("Ray did not start") == 2
    monkeypatch.setattr(engines, "TRIES", 1)
    starts.clear()
    with pytest.raises(UserError, match="--engine ray: no cluster starts here: The current node timed out"):
        engines.join_cluster(1)


def test_a_pool_says_which_worker_died(tmp_path):
    jobs = [(str(tmp_path / str(number)), 0) for number in range(3)]
    assert len(list(run_jobs(dies, jobs, "jobs", workers=2))) == 3
    with pytest.raises(UserError, match=r"[12]', [09]\) or one of the next: its process was killed"):
        list(run_jobs(dies, [*jobs[:2], (str(tmp_path / "2"), 9)], "jobs", workers=2))
    with pytest.raises(KeyError, match="no such sample in b"):
        list(run_jobs(dies, [jobs[0], ("b", -1)], "jobs", workers=2))


def made_by(engine: str) -> tuple[dict[str, bytes], list[str]]:
    """Return the files that every stage writes of data/, and what is said of a torn shard and of a function's own mistake."""
    stages = {
        "one": filtering(ONE_PASS),
        "two": filtering(TWO_PASSES),
        "unique": ExactDuplicates(("image",), decoded=True),
        "balanced": balance_of(Path("entries.txt"), 2, None, 0, ["txt"], None),
    }
    for name, stage in stages.items():
        assert run_stage(stage, "data/*.tar", Path(engine, name), engine=engine, workers=2).complete
    write_selected("data/*.tar", Path(engine, "new"), "selection", samples_per_shard=3, engine=engine, workers=2)
    with pytest.raises(UserError) as refused:
        run_stage(filtering(ONE_PASS), "torn/*.tar", Path("torn", engine), engine=engine, workers=2)
    with pytest.raises(KeyError) as mistake:
        list(run_jobs(dies, [("a", 0), ("b", -1)], "jobs", engine=engine, workers=2))
    return bytes_of(Path(engine)), [str(refused.value), repr(mistake.value)]


@pytest.mark.slow(minutes=4)  # a cluster takes 15 seconds to start, and each of its workers as long to import torch
def test_ray_writes_what_the_pool_writes(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ADDRESS", "local")  # whatever runs on this machine is not ours
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)  # relative names are of the folder that the command runs in
    write_pairs(tmp_path / "data", shards=5)
    (write_pairs(tmp_path / "torn", shards=3) / "00001.tar").write_bytes(b"no tar")
    (tmp_path / "entries.txt").write_text("fox\nowl\nteapot\n")
    (tmp_path / "rules.yaml").write_text(str({"rules": TWO_PASSES}))
    run_stage(filtering(ONE_PASS), "data/*.tar", Path("selection"), workers=1)
    expected, said = made_by("pool")  # before Ray has threads here, which a fork would not have
    assert len(expected) > 40 and "00001.tar is not a whole tar" in said[0] and said[1] == repr(KeyError("no such sample in b"))
    of_two = {name.removeprefix("two/"): data for name, data in expected.items() if name.startswith("two/")}
    words = ["data", "filter", "data/*.tar", "--rules", "rules.yaml", "--engine", "ray", "--workers", "1"]
    engines.join_cluster(2)
    try:
        assert made_by("ray") == (expected, said)
        jobs = [(str(tmp_path / f"dies-{times}"), times) for times in (0, 1)]
        assert os.getpid() not in list(run_jobs(dies, jobs, "jobs", engine="ray"))
        assert [len(Path(path).read_text()) for path, _ in jobs] == [1, 2]
        monkeypatch.setattr(engines, "TRIES", 2)
        with pytest.raises(UserError, match=r"--engine ray: .*dies-99.*\(tried 2 times\). Run the same command"):
            list(run_jobs(dies, [(str(tmp_path / "dies-99"), 99)], "jobs", engine="ray"))
        assert len((tmp_path / "dies-99").read_text()) == 2

        address = ray.get_runtime_context().gcs_address
        done = mmcontrast(*words, "joined", cwd=tmp_path, env={"RAY_ADDRESS": address})  # a cluster that runs
        assert done.returncode == 0, done.stderr[-2000:]
        assert ray.is_initialized() and len(ray.nodes()) == 1
        assert bytes_of(Path("joined")) == of_two
    finally:
        ray.shutdown()
    done = mmcontrast(*words, "local", cwd=tmp_path)  # a cluster of its own
    assert done.returncode == 0, done.stderr[-2000:]
    assert bytes_of(Path("local")) == of_two
    deadline = time.monotonic() + 120
    while left := [path.name for path in Path("/proc").glob("[0-9]*") if _of_ray(path, tmp_path)]:
        assert time.monotonic() < deadline, f"processes of Ray are left: {left}"
        time.sleep(0.05)


def _of_ray(process: Path, folder: Path) -> bool:
    """Return whether a process is one of Ray's, begun by this test: its variables name the test's folder."""
    try:
        names = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
    except OSError:
        return False
    return str(folder).encode() in names[0] and b"ray" in names[1]
