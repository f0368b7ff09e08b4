"""Lists the parts of `benchmarks/gpu.py`, most valuable first: a module each, with `run(context)` and `table(records)`."""

from typing import NamedTuple


class Part(NamedTuple):
    seconds: float  # of its first turn; time that is left is shared in a second one
    what: str


PARTS = {
    "tests": Part(170, "tests/gpu"),
    "loss": Part(130, "the loss beside open_clip, Inf-CL and memeff: time, share of the product rate, memory, errors"),
    "launches": Part(100, "launches of the kernels, and the fastest ones as a patch of LAUNCHES"),
    "step": Part(60, "a training step of ViT-B/32 beside open_clip's own trainer"),
    "decode": Part(20, "samples that this machine's cores decode, beside those that the card trains on"),
    "evaluation": Part(20, "exact ranks on the card"),
    "search": Part(30, "faiss on the card: exact search, and learning an index's lists"),
}
RESERVE = 5  # seconds at the end of a call, for the summary
