"""Compiles the kernels to machine code for a card that need not be here, and prints what each takes, as JSON.

    python tests/score/compile_kernels.py 80                     # all cases
    python tests/score/compile_kernels.py 90 'infonce bf16'

The backend itself runs, on the CPU, but what it launches is only bound and compiled: arguments, constants and descriptors
are those that a card would get.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from mmcontrast.score.backends import triton_kernels
from mmcontrast.score.backends.base import Block, SameGroup, Statistics
from mmcontrast.score.backends.triton_tiled import TritonTiled
from mmcontrast.score.reductions import LogSumExp, Maximum, SoftplusSum, Sum

INFONCE, SIGLIP = (LogSumExp(),), (SoftplusSum(),)
EVERY = (LogSumExp(exponent=0.5), SoftplusSum(over="all"), Sum(over="positives"), Maximum())
CASES = {  # (n, m, D, dtype, reductions, both directions, scales per anchor, bias, precision of fp32 products)
    "infonce bf16": (300, 300, 64, torch.bfloat16, INFONCE, True, False, False, "highest"),
    "infonce tf32": (300, 300, 64, torch.float32, INFONCE, True, False, False, "high"),
    "infonce ieee": (300, 300, 64, torch.float32, INFONCE, True, False, False, "highest"),
    "siglip bf16, rows alone": (300, 17, 33, torch.bfloat16, SIGLIP, False, False, True, "highest"),
    "one row, every reduction, scales per anchor": (1, 1, 8, torch.float16, EVERY, True, True, True, "highest"),
}


class Card:
    """A driver that is asked only which card there is."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """In a kernel's place: binds the arguments of a launch and compiles for them."""

    def __init__(self, kernel, found: list) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def launch(*arguments, **constants) -> None:
            built = self.kernel.warmup(*arguments, grid=grid, **constants)
            self.found.append((self.kernel.__name__, built))

        return launch


def resources(built, arch: int) -> dict[str, int]:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(built.asm["ptx"])
        file.flush()
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        ptxas = get_ptxas(arch) if inspect.signature(get_ptxas).parameters else get_ptxas()  # Triton 3.4: one for all cards
        command = [ptxas.path, "-v", "--gpu-name", name, file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.search(p, report)[1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return {"registers": registers, "spilled_bytes": spilled, "shared_bytes": built.metadata.shared}


def compile_case(n, m, width, dtype, reductions, both, per_anchor, bias, precision) -> list:
    torch.set_float32_matmul_precision(precision)
    block = Block(
        torch.zeros(n, width, dtype=dtype), torch.zeros(m, width, dtype=dtype),
        torch.ones(n) if per_anchor else torch.ones(()), torch.ones(m) if per_anchor and both else None,
        torch.zeros(()) if bias else None, SameGroup(torch.arange(n), torch.arange(m)), reductions, both, None,
    )  # fmt: skip
    found: list = []
    kernels = triton_kernels.reduce_tiles, triton_kernels.weigh_tiles
    triton_kernels.reduce_tiles, triton_kernels.weigh_tiles = (Compiled(kernel, found) for kernel in kernels)
    try:
        TritonTiled().forward(block)
        values = Statistics([torch.zeros(n) for _ in reductions], [torch.zeros(m) for _ in reductions if both])
        TritonTiled().backward(block, values, values, torch.zeros(n, width))
    finally:
        triton_kernels.reduce_tiles, triton_kernels.weigh_tiles = kernels
    return found


def main(arch: int, *cases: str) -> None:
    triton.runtime.driver.set_active(Card(arch))
    report = {
        f"sm_{arch}, {case}: {kernel}": resources(built, arch)
        for case in cases or CASES
        for kernel, built in compile_case(*CASES[case])
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
