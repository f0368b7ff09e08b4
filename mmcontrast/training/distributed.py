"""Joining the other processes of a launch (torchrun, accelerate launch, Slurm), through accelerate."""

import os

import torch
from accelerate import PartialState


def join_processes() -> PartialState:
    """This process's place among all. Without a GPU several processes talk over gloo; accelerate must be told so.

    Raises:
        RuntimeError: if fewer processes meet than were launched: each would train alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    state = PartialState(cpu=True) if launched > 1 and not torch.cuda.is_available() else PartialState()
    if state.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, {state.num_processes} met")
    return state
