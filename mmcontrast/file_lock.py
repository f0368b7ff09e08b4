"""Locks open files, so that one process at a time does what a file stands for."""

import fcntl
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any

_log = logging.getLogger(__name__)


def lock_file(file: IO[Any], wait: bool, how: Callable[[IO[Any], int], object] = fcntl.flock) -> bool:
    """Lock a file until it is closed, and return whether no other process has it locked.

    Where the file system has no locks (Lustre as it is mounted by default, NFS without its lock daemon) nothing is locked, a
    warning says so, and the answer is True.

    Args:
        wait: until another process that has locked it closes it, or ends.
        how: `fcntl.flock`, which a forked process shares, or `fcntl.lockf`, which it does not.
    """
    try:
        how(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        _warn(Path(file.name).parent, error.strerror)
    return True


@cache
def _warn(folder: Path, reason: str) -> None:
    """Warn of a folder once in a process."""
    _log.warning("%s: its file system has no locks (%s), so nothing keeps two processes apart that write there", folder, reason)
