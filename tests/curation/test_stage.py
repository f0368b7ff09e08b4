"""A stage by any number of processes, killed or not: the same bytes."""

import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest

from mmcontrast import whole_files
from mmcontrast.curation.filter import Filter
from mmcontrast.curation.rules import parse_rules
from mmcontrast.curation.run_stage import run_stage, share_of_this_process
from mmcontrast.errors import UserError
from tests.command import mmcontrast, start
from tests.curation.pairs import bytes_of, pair, write_pairs

TWO_PASSES = [{"type": "words", "min": 3}, {"column": "json:similarity", "top": 0.4}]
ONE_PASS = [{"type": "pixels", "min": 20}, {"column": "json:similarity", "min": 0.4}]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))


def run(pattern, out, rules, workers=1):
    return run_stage(Filter(parse_rules({"rules": rules}, "rules")), str(pattern), out, workers=workers)


@pytest.mark.parametrize("rules", [ONE_PASS, TWO_PASSES])
def test_any_number_of_processes_writes_the_same(tmp_path, rules, monkeypatch):
    folder = write_pairs(tmp_path / "data", shards=5)
    assert run(folder / "*.tar", tmp_path / "one", rules).complete
    expected = bytes_of(tmp_path / "one")
    assert len([name for name in expected if name.startswith("parts/")]) == 5
    run(folder / "*.tar", tmp_path / "pool", rules, workers=3)
    assert bytes_of(tmp_path / "pool") == expected
    for world in (2, 4):
        out, completes = tmp_path / f"of-{world}", []
        for rank in reversed(range(world)):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            completes.append(run(folder / "*.tar", out, rules).complete)
        assert completes == [False] * (world - 1) + [True] and bytes_of(out) == expected
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    for task in ("8", "7"):  # of a Slurm array 7-8
        for name, value in {"ID": task, "COUNT": "2", "MIN": "7"}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
        outcome = run(folder / "*.tar", tmp_path / "array", rules)
    assert outcome.complete and bytes_of(tmp_path / "array") == expected
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "12")
    with pytest.raises(UserError, match="task 5 of an array of 2: number its tasks from 0 on"):
        share_of_this_process()


@pytest.mark.parametrize("rules", [ONE_PASS, TWO_PASSES])
def test_what_was_interrupted_anywhere_goes_on(tmp_path, rules, monkeypatch):
    """Ended at each write in turn, with what it had begun left there, and begun again."""
    folder = write_pairs(tmp_path / "data", shards=3)
    run(folder / "*.tar", tmp_path / "one", rules)
    expected, out, times = bytes_of(tmp_path / "one"), tmp_path / "killed", 0
    replace = os.replace

    class Killed(BaseException):
        pass

    for allowed in range(20):  # files that are written before the end, one more each time
        left = iter([True] * allowed)

        def put(source, target, left=left):
            if not next(left, False):
                (out / "parts" / ".left-by-a-kill.partial").write_bytes(b"torn")
                raise Killed
            replace(source, target)

        monkeypatch.setattr(whole_files.os, "replace", put)
        try:
            outcome = run(folder / "*.tar", out, rules)
            break
        except Killed:
            times += 1
    assert outcome.complete and times >= 3
    monkeypatch.setattr(whole_files.os, "replace", replace)
    assert bytes_of(out) == expected
    run(folder / "*.tar", out, rules)
    assert bytes_of(out) == expected


def test_a_tar_that_was_written_since_is_told_of(tmp_path, caplog):
    """Its names and sizes are those of before, which a selection knows shards by."""
    folder = write_pairs(tmp_path / "data", shards=2)
    run(folder / "*.tar", tmp_path / "out", ONE_PASS)
    run(folder / "*.tar", tmp_path / "out", ONE_PASS)
    assert "written after" not in caplog.text
    later = max(file.stat().st_mtime for file in (tmp_path / "out").rglob("*")) + 5
    os.utime(tmp_path / "out" / "stage.json", (0, 0))  # begun long before the parts were made
    run(folder / "*.tar", tmp_path / "out", ONE_PASS)
    assert "written after" not in caplog.text
    os.utime(folder / "00001.tar", (later, later))
    run(folder / "*.tar", tmp_path / "out", ONE_PASS)
    assert f"00001.tar was written after {tmp_path / 'out'} was made" in caplog.text


def test_a_killed_command_goes_on(tmp_path):
    folder = write_pairs(tmp_path / "data", shards=16, rows=20)
    (tmp_path / "rules.yaml").write_text(json.dumps({"rules": [*ONE_PASS, {"type": "readable", "of": "image"}]}))
    words = ["data", "filter", folder / "*.tar", tmp_path / "out", "--rules", tmp_path / "rules.yaml"]
    env = {"MMCONTRAST_CACHE": str(tmp_path / "cache")}
    process = start(*words, "--workers", "1", env=env)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("parts/*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("parts/*.parquet")}
    assert written
    done = mmcontrast(*words, ranks=2, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all((tmp_path / "out" / "parts" / name).stat().st_mtime_ns == when for name, when in written.items())
    clean = mmcontrast(*[tmp_path / "clean" if word == tmp_path / "out" else word for word in words], env=env)
    assert clean.returncode == 0 and bytes_of(tmp_path / "out") == bytes_of(tmp_path / "clean")


def test_shards_that_join_later_are_added(tmp_path):
    folder = write_pairs(tmp_path / "data", shards=2)
    run(folder / "*.tar", tmp_path / "out", ONE_PASS)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    write_pairs(folder, samples=[[pair(s, row) for row in range(8)] for s in range(4)])
    outcome = run(folder / "*.tar", tmp_path / "out", ONE_PASS)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    assert outcome.summary["samples"] == 32 and len(after) == 4 and before.items() <= after.items()
    run(folder / "*.tar", tmp_path / "again", ONE_PASS)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")


def test_what_is_in_the_way_is_named(tmp_path):
    folder = write_pairs(tmp_path / "data", shards=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        run(folder / "*.tar", tmp_path / "file", ONE_PASS)
    with pytest.raises(UserError, match="holds no selection that was begun"):
        run(folder / "*.tar", folder, ONE_PASS)
    (folder / "00001.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"00001.tar is not a whole tar"):
        run(folder / "*.tar", tmp_path / "out", ONE_PASS)
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 1  # what is well is done


def test_a_part_is_a_table_that_others_read(tmp_path):
    samples = [pair(0, row) for row in range(4)]
    samples[2]["__key__"] = "caf\udce9"  # a name in Latin-1
    folder = write_pairs(tmp_path / "data", samples=[samples])
    run(folder / "*.tar", tmp_path / "out", ONE_PASS)
    (part,) = (tmp_path / "out" / "parts").iterdir()
    table = pq.read_table(part)
    assert table.column_names == ["key", "row", "keep", "reason", "pixels", "json:similarity"]
    assert table["key"].to_pylist() == ["000000000", "000000001", "caf\\xe9", "000000003"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (entry,) = manifest["shards"]
    assert entry["part"] == part.name and part.name == f"00000-{entry['digest']}.parquet"
    assert (entry["samples"], entry["kept"]) == (4, sum(table["keep"].to_pylist()))


def test_a_shard_that_has_changed_is_not_what_was_judged(tmp_path):
    """A folder, whose digest has names and sizes alone: a caption of the same length."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("a b c")
    words = [{"type": "words", "min": 3}]
    assert run(folder, tmp_path / "out", words).summary["kept"] == 3
    assert run(folder, tmp_path / "out", words).summary["kept"] == 3
    (folder / "1.txt").write_text("abcde")
    with pytest.raises(UserError, match="is complete, and .*data has changed since"):
        run(folder, tmp_path / "out", words)
    assert run(folder, tmp_path / "other", words).summary["kept"] == 2
