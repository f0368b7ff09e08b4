"""Counts the collectives and device waits of a piece of code, below torch.distributed's Python."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {  # torch's operators: our names of them
    "send": "move", "_allgather_base_": "all_gather", "alltoall_base_": "all_to_all", "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}  # fmt: skip
WAITS = {Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.cpu}


class Counted(TorchDispatchMode):
    """A context that counts calls, bytes and waits.

    Attributes:
        calls: by kind; of moves the messages. sent: bytes that leave this rank, of a collective as its ring sends them.
        waits: numbers fetched from tensors, for which the host would wait if they were on a device. Conditions on tensors are
            not counted: in a loss only what is on the host has them, group ids and a CPU's tiles.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.waits = 0
        self.looking = _CountWaits(self)

    def __enter__(self) -> "Counted":
        self.looking.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.looking.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("c10d::")
        kind = KINDS.get(name)
        if kind is not None:
            bytes_of = {k: a.numel() * a.element_size() for k, a in enumerate(args) if isinstance(a, Tensor)}
            listed = [t for a in args if isinstance(a, list | tuple) for t in a if isinstance(t, Tensor)]
            self.calls[kind] += 1
            if kind == "move":
                self.sent[kind] += sum(t.numel() * t.element_size() for t in listed)
            elif kind == "all_gather":  # (output, input)
                self.sent[kind] += bytes_of[0] - bytes_of[1]
            elif kind == "reduce_scatter":
                self.sent[kind] += bytes_of[1] - bytes_of[0]
            elif kind == "all_to_all":  # (output, input, group, its parts by rank, parts): as many of each rank's rows as own
                self.sent[kind] += bytes_of[1] * (sum(args[4]) - args[3][0]) // max(sum(args[4]), 1)
            else:
                self.sent[kind] += sum(t.numel() * t.element_size() for t in listed)
        return func(*args, **(kwargs or {}))


class _CountWaits(TorchFunctionMode):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted.waits += func in WAITS
        return func(*args, **(kwargs or {}))
