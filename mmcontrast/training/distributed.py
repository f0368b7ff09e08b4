"""Joining the other processes of a launch (torchrun, accelerate launch, Slurm), through accelerate."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import PartialState

from mmcontrast.errors import PeerLost, UserError, leave_exit_code

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
COLLECTIVE_TIMEOUT = timedelta(hours=12)  # the others wait while one evaluates; the watchdog finds stalls sooner
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "Connection refused")
OTHER_HAS_ENDED = "another rank has ended; its own message says why"


def join_processes() -> PartialState:
    """Join the process group and return accelerate's state. Without a GPU, accelerate must be told to use gloo.

    Raises:
        RuntimeError: if fewer processes meet than were launched: each would train alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    end_with_torchrun()
    options: dict[str, Any] = {"timeout": COLLECTIVE_TIMEOUT} if launched > 1 else {}
    state = PartialState(cpu=launched > 1 and not torch.cuda.is_available(), **options)
    if state.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, {state.num_processes} met")
    return state


def all_ranks() -> dist.ProcessGroup | None:
    """Return the group of all ranks; None: this process is alone."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def end_with_torchrun() -> None:
    """Let the kernel kill this process when torchrun is killed: it starts its ranks in sessions of their own."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_now(code: int) -> NoReturn:
    """End this process and its data workers at once, without any clean-up."""
    leave_exit_code(code)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def rank_of_launcher() -> tuple[int, int]:
    """Return (rank, number of ranks), as torchrun says by the environment; (0, 1) without it.

    Raises:
        UserError: for a rank that is none of them: a variable that something else has set.
    """
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} where WORLD_SIZE={world_size}: unset both, or start with torchrun")
    return rank, world_size


@contextmanager
def reporting_lost_ranks() -> Iterator[None]:
    """Turn what collectives raise after another rank's end into one error that says so.

    Raises:
        PeerLost: if another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if dist.is_initialized() and any(sign in str(error) for sign in LOST):
            raise PeerLost(OTHER_HAS_ENDED) from error
        raise
