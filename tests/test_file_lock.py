"""Two processes and one file; file systems that have no locks, or flush no folders."""

import errno
import fcntl
import os
import stat

import pytest
import torch

from mmcontrast import file_lock
from mmcontrast.config import load_config
from mmcontrast.curation.outputs import alone
from mmcontrast.data import open_shards
from mmcontrast.errors import UserError
from mmcontrast.file_lock import lock_file
from mmcontrast.run_folder import lock_folder
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from tests.command import run_script

ASK = """
import fcntl, sys
from mmcontrast.errors import UserError
from mmcontrast.file_lock import lock_file
with open(sys.argv[1], "a") as file:
    print(lock_file(file, wait=False, how=getattr(fcntl, sys.argv[2])))
"""


@pytest.mark.parametrize("how", ["flock", "lockf"])
def test_one_process_has_it(tmp_path, how):
    path = tmp_path / "lock"
    with path.open("a") as file:
        assert lock_file(file, wait=True, how=getattr(fcntl, how))
        assert run_script(ASK, path, how).stdout == "False\n"
    assert run_script(ASK, path, how).stdout == "True\n"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_and_used(vectors_file, tmp_path, monkeypatch, caplog, number):
    """As Lustre is mounted by default: ENOSYS of every lock."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    file_lock._warn.cache_clear()
    for how in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, how, refuse)
    monkeypatch.setattr(lock_file, "__defaults__", (refuse,))
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "cache"))
    config = load_config(vectors_file)
    for _ in range(2):
        with lock_folder(config), alone(tmp_path / "negatives.parquet"):
            assert len(open_shards(str(tmp_path / "train.tar"))[0]) == 24
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(set(told)) >= 2 and all("has no locks" in line and os.strerror(number) in line for line in told)


def test_a_file_system_that_flushes_no_folders(tmp_path, monkeypatch):
    flush, numbers = os.fsync, iter((errno.EINVAL, errno.EIO))

    def refuse(number):
        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            flush(descriptor)

        return fsync

    contents = Contents({"w": torch.ones(3)}, {}, {"step": 1}, "a: 1")
    monkeypatch.setattr(checkpoint.os, "fsync", refuse(next(numbers)))
    checkpoint.check(checkpoint.save(tmp_path, 1, contents))
    monkeypatch.setattr(checkpoint.os, "fsync", refuse(next(numbers)))
    with pytest.raises(UserError, match="Input/output error"):
        checkpoint.save(tmp_path, 2, contents)
