"""Ours beside its peers' losses, in one process group, on the same inputs: time, share of the product rate, memory, error.

    python benchmarks/contrastive_loss.py                          # N = 16,384, D = 512, fp32, beside open_clip
    python benchmarks/contrastive_loss.py --dtype bfloat16
    python benchmarks/contrastive_loss.py --device cuda --dtype bfloat16 --n 8192 32768 65536 --dim 512 768 1152 \
        --objectives infonce --peers "open_clip ClipLoss" "Inf-CL cal_flash_loss" --checkouts ../Inf-CLIP
    python benchmarks/contrastive_loss.py --device cuda --dtype bfloat16 --n 1048576 --peers

Runs alternate, ours first; medians, and the median of the ratios pair by pair. The product rate is measured in the same
run; useful work is 8·N²·D operations. Memory is the peak above the inputs (on a CPU each in a process of its own).
"""

import argparse
import multiprocessing
import statistics

import torch
from losses import (  # type: ignore[import-not-found]  # beside this file
    FORMS,
    OURS,
    PEERS,
    Loss,
    add_checkouts,
    inputs,
    join_group,
    load,
    peak_above_inputs,
    product_rate,
    run,
)


def errors(
    loss: Loss, objective: str, dim: int, dtype: torch.dtype, device: str, rows: int = 4096
) -> tuple[float, float]:  # fmt: skip
    """Return the relative errors of the loss and of a gradient at N = rows against the same inputs in float64."""
    leaves = inputs(rows, dim, dtype, device)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value, truth = loss(*leaves), FORMS[objective]()(*exact)
    value.backward()
    truth.backward()
    grad, true_grad = leaves[0].grad, exact[0].grad
    return abs(value.item() / truth.item() - 1), ((grad - true_grad).norm() / true_grad.norm()).item()


def format_errors(relative: tuple[float, float]) -> str:
    return f"{relative[0]:.0e} and {relative[1]:.0e}"


def memory(name: str, n: int, dim: int, dtype: torch.dtype, device: str) -> float:
    """Return the MiB that one forward and backward adds to the peak."""
    if device == "cuda":
        return measure_memory(name, n, dim, dtype, device, [])
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(measure_memory, (name, n, dim, dtype, device, None))


def measure_memory(name, n, dim, dtype, device, running) -> float:
    if running is None:
        join_group(device)
    loss = OURS[name] if name in OURS else load(name)
    return peak_above_inputs(loss, n, dim, dtype, device) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[16_384])
    parser.add_argument("--dim", type=int, nargs="+", default=[512])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--objectives", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--peers", nargs="*", default=["open_clip ClipLoss", "open_clip SigLipLoss"], choices=list(PEERS))
    parser.add_argument("--checkouts", nargs="*", default=[], help="folders that peers are imported from")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), options.device
    add_checkouts(options.checkouts)
    join_group(device)
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.dtype}, {hardware}, torch {torch.__version__}")
    for dim in options.dim:
        for n in options.n:
            rate = product_rate(dim, dtype, device)
            print(f"N = {n:,}, D = {dim}: a product makes {rate / 1e12:.2f} TFLOP/s")
            for objective in options.objectives:
                compare(objective, n, dim, dtype, options, rate)


def compare(objective: str, n: int, dim: int, dtype: torch.dtype, options: argparse.Namespace, rate: float) -> None:
    device, leaves = options.device, inputs(n, dim, dtype, options.device)
    our_loss = OURS[objective]
    run(our_loss, leaves)
    alone = statistics.median(run(our_loss, leaves) for _ in range(options.pairs))
    operations = 8 * n**2 * dim
    peak = memory(objective, n, dim, dtype, device)
    report = f"{alone:.4g} s, {operations / alone / rate:.0%} of the product rate, {peak:.0f} MiB"
    print(f"  {objective}: {report}, errors {format_errors(errors(our_loss, objective, dim, dtype, device))}", flush=True)
    for name in options.peers:
        if PEERS[name][0] != objective:
            continue
        loss = load(name)
        if isinstance(loss, str):
            print(f"    {name}: {loss}")
            continue
        try:
            run(loss, leaves)
            pairs = [(run(our_loss, leaves), run(loss, leaves)) for _ in range(options.pairs)]
            peak = memory(name, n, dim, dtype, device)
        except torch.OutOfMemoryError:
            print(f"    {name}: does not fit")
            continue
        ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        error_text = format_errors(errors(loss, objective, dim, dtype, device))
        print(
            f"    {name}: {peer:.4g} s beside {ours:.4g} s, ratio {ratio:.2f}; {peak:.0f} MiB, errors {error_text}", flush=True
        )


if __name__ == "__main__":
    main()
