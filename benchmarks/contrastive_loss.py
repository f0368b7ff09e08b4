"""Ours beside open_clip's loss, in one process group, on the same inputs: time, peak memory, error against float64.

    python benchmarks/contrastive_loss.py                      # N = 16,384, D = 512, fp32: time and memory of both losses
    python benchmarks/contrastive_loss.py --memory-at 131072 --dim 256    # the tiled loss alone, at a batch no dense loss holds

Runs alternate, ours first; medians and the ratio pair by pair are printed. Memory is the process's peak above the inputs,
each measured in a process of its own.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from mmcontrast import contrastive_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
OURS: dict[str, Loss] = {
    objective: lambda x, y, scale, bias, objective=objective: contrastive_loss(
        {"image": x, "text": y}, objective=objective, logit_scale=scale,
        logit_bias=bias if objective == "siglip" else None, group=dist.group.WORLD,
    )
    for objective in ("infonce", "siglip")
}  # fmt: skip
PEERS: dict[str, Loss] = {
    "infonce": lambda x, y, scale, bias: ClipLoss()(x, y, scale),
    "siglip": lambda x, y, scale, bias: SigLipLoss()(x, y, scale, bias),
}


def inputs(n: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Unit rows and a scale and bias as in the middle of training."""
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(n, dim, generator=generator), dim=1).to(dtype) for _ in range(2)]
    return [tensor.requires_grad_() for tensor in (*rows, torch.tensor(50.0), torch.tensor(-10.0))]


def run(loss: Loss, leaves: list[Tensor]) -> float:
    """Seconds of one forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    start = time.perf_counter()
    loss(*leaves).backward()
    return time.perf_counter() - start


def errors(loss: Loss, objective: str, dim: int, dtype: torch.dtype) -> str:
    """Relative errors of the loss and of a gradient at N = 4,096 against the same inputs in float64."""
    leaves = inputs(4096, dim, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value, truth = loss(*leaves), OURS[objective](*exact)
    value.backward()
    truth.backward()
    grad, true_grad = leaves[0].grad, exact[0].grad
    assert grad is not None and true_grad is not None
    return f"{abs(value.item() / truth.item() - 1):.1e} and {((grad - true_grad).norm() / true_grad.norm()).item():.1e}"


def peak_above_inputs(side: str, objective: str, n: int, dim: int, dtype: torch.dtype, answer) -> None:
    """Puts the bytes that one forward and backward adds to the peak; run in a new process."""
    join_group()
    leaves = inputs(n, dim, dtype)
    run((OURS if side == "ours" else PEERS)[objective], inputs(64, dim, dtype))  # libraries load their buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident("VmRSS")
    run((OURS if side == "ours" else PEERS)[objective], leaves)
    answer.put(resident("VmHWM") - before)


def resident(entry: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak (Linux)."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[entry].removesuffix("kB")) * 1024


def measure_memory(*arguments) -> int:
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=peak_above_inputs, args=(*arguments, answer))
    process.start()
    process.join()
    return answer.get()


def join_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16_384)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--objectives", nargs="+", default=["infonce", "siglip"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory-at", type=int, help="only the memory of ours at this N")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.memory_at:
        for objective in options.objectives:
            peak = measure_memory("ours", objective, options.memory_at, options.dim, dtype)
            print(f"{objective}: {peak / 2**30:.2f} GiB above the inputs at N = {options.memory_at}, D = {options.dim}")
        return
    join_group()
    leaves = inputs(options.n, options.dim, dtype)
    product = min(run(lambda x, y, *_: (x.float() @ y.float().T).sum(), leaves) for _ in range(2))
    print(f"N = {options.n}, D = {options.dim}, {options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for objective in options.objectives:
        pairs = [(run(OURS[objective], leaves), run(PEERS[objective], leaves)) for _ in range(options.pairs + 1)][1:]
        ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        wrong = [errors(side[objective], objective, options.dim, dtype) for side in (OURS, PEERS)]
        memory = [measure_memory(side, objective, options.n, options.dim, dtype) for side in ("ours", "peer")]
        print(
            f"{objective}: ours {ours:.2f} s, open_clip {peer:.2f} s, ratio {ratio:.2f}; memory above the inputs"
            f" {memory[0] / 2**20:.0f} and {memory[1] / 2**20:.0f} MiB, ratio {memory[0] / memory[1]:.3f};"
            f" errors of loss and gradient at N = 4,096: {wrong[0]}, open_clip {wrong[1]}"
        )
    print(f"useful work 8·N²·D is {8 * options.n**2 * options.dim / 1e12:.1f} TFLOP (three products took {product:.2f} s)")


if __name__ == "__main__":
    main()
