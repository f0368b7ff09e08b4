"""Defines the exceptions that a command prints as one line instead of a traceback, and their exit codes."""

import os
from collections.abc import Sequence
from pathlib import Path


class UserError(ValueError):
    """A mistake in the user's input. The message names it, says what was found, and what to do."""

    exit_code = 2


class EveryRankError(UserError):
    """An error that is raised on all ranks at once, with the same message: one of them prints it."""


class TrainingStopped(EveryRankError):
    """The loss or the gradients are not finite. Raised before the weights change.

    Attributes:
        sample_ids: of the step, in their order.
    """

    exit_code = 3
    sample_ids: Sequence[int] = ()


class Preempted(EveryRankError):
    """The run was asked to end, and has saved a checkpoint from which it can be resumed."""

    exit_code = 75  # of sysexits.h: temporary, try again; what a scheduler requeues on


class PeerLost(EveryRankError):
    """Another rank has ended without notice; its own message says why."""

    exit_code = 5


def leave_exit_code(code: int) -> None:
    """Write the first rank's exit code to the file that a job's script names: torchrun makes every code 1."""
    if (file := os.environ.get("MMCONTRAST_EXIT_CODE_FILE")) and os.environ.get("RANK", "0") == "0":
        Path(file).write_text(str(code))
