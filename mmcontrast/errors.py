"""The exceptions that a command prints as one line instead of a traceback, and the exit codes they end with."""

import os
from collections.abc import Sequence
from pathlib import Path


class UserError(ValueError):
    """Something the user gave is wrong. The message names it, says what was found, and what to do."""

    exit_code = 2


class EveryRankError(UserError):
    """Raised on all ranks at once, with the same message: one of them prints it."""


class TrainingStopped(EveryRankError):
    """Training cannot go on: the loss or the gradients are not finite. Raised before the weights change.

    Attributes:
        sample_ids: of the step, in their order.
    """

    exit_code = 3
    sample_ids: Sequence[int] = ()


class Preempted(EveryRankError):
    """The run was asked to end, has saved a checkpoint, and waits to be continued."""

    exit_code = 75  # of sysexits.h: temporary, try again; what a scheduler requeues on


class PeerLost(EveryRankError):
    """Another rank has ended without a word to this one; its own message says why."""

    exit_code = 5


def leave_exit_code(code: int) -> None:
    """The first rank leaves its exit code where a job's script asks for it: torchrun makes 1 of any."""
    if (file := os.environ.get("MMCONTRAST_EXIT_CODE_FILE")) and os.environ.get("RANK", "0") == "0":
        Path(file).write_text(str(code))
