"""Compiles the kernels to machine code for a card that need not be here, and prints what each takes, as JSON.

python tests/score/compile_kernels.py 80 90
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from mmcontrast.score.backends import triton_kernels
from mmcontrast.score.backends.triton_tiled import KINDS, LAUNCHES
from mmcontrast.score.reductions import LogSumExp, SoftplusSum, Sum

CASES = {  # (reductions, both directions, scales per anchor, bias)
    "infonce": ([LogSumExp()], True, False, False),
    "siglip": ([SoftplusSum()], False, False, True),
    "all kinds": ([LogSumExp(0.5), SoftplusSum(), Sum()], True, True, True),
}
PRODUCTS = [("half", "infonce"), ("half", "siglip"), ("half", "all kinds"), ("tf32", "infonce"), ("ieee", "infonce")]
INTEGERS = {"n", "m", "D"}


def compile_kernel(kernel, arch, launch, dtype, precision, reductions, both, per_anchor, bias):
    constants = {
        "KINDS": tuple(KINDS[type(r)] for r in reductions),
        "EXPONENTS": tuple(getattr(r, "exponent", 1.0) for r in reductions),
        "OVERS": (0,) * len(reductions),
        "BOTH": both, "PER_ANCHOR": per_anchor, "BIAS": bias,
        "BM": launch.BM, "BN": launch.BN, "BK": launch.BK, "GROUP": 8, "PRECISION": precision,
    }  # fmt: skip
    absent = [] if bias else ["bias", "bias_out"]
    absent += [] if per_anchor else ["row_scale_out", "column_scale_out", "column_scale"]
    absent += [] if both else ["column_values", "column_grads"]
    constants |= dict.fromkeys(absent)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    pointers = {"row_ids": "*i64", "column_ids": "*i64", "w_out": f"*{dtype}"}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("x", "y"):
            signature[name] = f"tensordesc<{dtype}[{launch.BM if name == 'x' else launch.BN}, {launch.BK}]>"
        else:
            signature[name] = "i32" if name in INTEGERS else pointers.get(name, "*fp32")
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(built.asm["ptx"])
        file.flush()
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", "--gpu-name", name, file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.search(p, report)[1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return {"registers": registers, "spilled_bytes": spilled, "shared_bytes": built.metadata.shared}


def main(architectures):
    found = {}
    for arch in architectures:
        for name, case in PRODUCTS:
            dtype, precision = ("bf16", "tf32") if name == "half" else ("fp32", name)
            for kernel in (triton_kernels.reduce_tiles, triton_kernels.weigh_tiles):
                key = f"sm_{arch} {case} {name} {kernel.__name__}"
                found[key] = compile_kernel(kernel, arch, LAUNCHES[name], dtype, precision, *CASES[case])
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]])
