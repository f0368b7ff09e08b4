"""Checks GPUs as torch sees them: the build against the driver, memory, a real all-reduce, the speed of a product."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from mmcontrast.doctor.check import BAD, WARNING, Check, one_line, size
from mmcontrast.training.cost import peak_flops

IN_USE = 0.1  # share of a GPU's memory that another process holds, from which a warning is given
MEETING_SECONDS = 300  # in which all processes have started and reduced; a step of it that hangs ends after a minute
PRODUCT = {"cpu": 2048, "cuda": 8192}  # side of the matrices
COPIED = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # bytes
TIMES = 5
SLOW = 0.5  # of the data sheet's rate: healthy ones reach two thirds and more


def device_checks() -> Iterator[Check]:
    """Yield the checks of torch and of each device."""
    yield torch_build()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(gpus):
        yield gpu(number)
    yield collective(gpus)
    for number in range(gpus):
        yield speed(torch.device("cuda", number))
    if not gpus:
        yield speed(torch.device("cpu"))


def torch_build() -> Check:
    """Check torch's build against the driver: a GPU that torch does not see is worse than none."""
    build = f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}"
    driver, problem = nvidia_driver()
    if torch.cuda.is_available():
        return Check("torch", f"{build}; {driver or 'driver unknown'}, {torch.cuda.device_count()} GPUs")
    if not driver and not problem:
        return Check("torch", f"{build}; no NVIDIA driver: runs on the CPU")
    if problem:
        return Check("torch", f"{build}; {problem}", BAD, "repair or reload the NVIDIA driver until nvidia-smi lists the GPUs")
    if not torch.version.cuda:
        return Check("torch", f"{build}; {driver}", BAD, "install a build of torch for CUDA, no newer than the driver's")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return Check(
            "torch", f"{build}; {driver}; hidden by CUDA_VISIBLE_DEVICES={visible!r}", BAD, "unset CUDA_VISIBLE_DEVICES"
        )
    try:
        torch.cuda.init()
        reason = "torch says no more"
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)
    return Check("torch", f"{build}; {driver}; not seen: {reason}", BAD, "a newer driver, or a build of torch for this one")


def nvidia_driver() -> tuple[str, str]:
    """Return (driver and GPUs, what is wrong with them) in nvidia-smi's words; empty where there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        loaded = Path("/proc/driver/nvidia/version").exists()
        return ("an NVIDIA driver without nvidia-smi", "") if loaded else ("", "")
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi fails: {one_line(error)}"
    if done.returncode or not done.stdout.strip():
        return "", f"nvidia-smi finds no GPU: {one_line(done.stdout + done.stderr)}"
    version, _, name = done.stdout.strip().splitlines()[0].partition(", ")
    return f"driver {version}, {name}", ""


def gpu(number: int) -> Check:
    """Check a GPU: its memory, and whether it has bf16."""
    properties = torch.cuda.get_device_properties(number)
    name, capability = f"GPU {number}", f"compute capability {properties.major}.{properties.minor}"
    try:
        free, total = torch.cuda.mem_get_info(number)
    except RuntimeError as error:
        remedy = "look at it with nvidia-smi; reset it, or leave it out"
        return Check(name, f"{properties.name}: {one_line(error)}", BAD, remedy)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    found = f"{properties.name}, {size(total)}, {size(total - free)} in use, {capability}, {'bf16' if bf16 else 'no bf16'}"
    numbers = {"memory_bytes": total, "in_use_bytes": total - free}
    if (total - free) / total > IN_USE:
        return Check(name, found, WARNING, "another process holds memory of it (nvidia-smi names it): end it", numbers)
    if not bf16:
        return Check(name, found, WARNING, "set train.precision to fp16 or fp32", numbers)
    return Check(name, found, numbers=numbers)


def collective(gpus: int) -> Check:
    """Run a real all-reduce over all GPUs of this machine; without one, over two processes."""
    world, backend = (gpus, "nccl") if gpus else (2, "gloo")
    name, members = f"all-reduce, {backend}", f"{world} {'GPUs' if gpus else 'processes'}"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "mmcontrast.doctor.collective", backend, f"{folder}/meeting", str(world)]
        ranks = [subprocess.Popen([*command, str(rank)], stdout=output, stderr=output) for rank in range(world)]
        deadline = time.monotonic() + MEETING_SECONDS
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        codes = [rank.poll() for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.wait()
        output.seek(0)
        text = output.read().strip()
    if any(codes) or None in codes:
        reason = (text.splitlines() or ["it said nothing"])[-1] if any(codes) else f"not done after {MEETING_SECONDS} s"
        if gpus:
            remedy = "NCCL_DEBUG=INFO and NCCL_P2P_DISABLE=1 tell more"
        else:
            remedy = "GLOO_SOCKET_IFNAME=lo, and a name for this host"
        return Check(name, f"fails over {members}: {one_line(reason)}", BAD, remedy)
    numbers = {key: float(value) for key, _, value in (part.partition("=") for part in text.splitlines()[-1].split())}
    rate = f", {numbers['gb_per_second']:.2f} GB/s" if world > 1 else ""
    version = ".".join(map(str, torch.cuda.nccl.version())) if gpus else ""
    return Check(name, f"{version + ': ' if version else ''}{members}{rate}", numbers=numbers)


def speed(device: torch.device) -> Check:
    """Measure the TFLOP/s of one product of square matrices, and the GB/s that a copy reads and writes; medians."""
    kind = device.type
    name = f"speed of GPU {device.index}" if kind == "cuda" else f"speed of the CPU, {torch.get_num_threads()} threads"
    numbers = {}
    try:
        dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if kind == "cuda" else {})
        for dtype_name, dtype in dtypes.items():
            a, b = torch.randn(2, PRODUCT[kind], PRODUCT[kind], device=device).to(dtype)
            numbers[f"{dtype_name}_tflops"] = 2 * PRODUCT[kind] ** 3 / _seconds(partial(torch.matmul, a, b), device) / 1e12
        source = torch.zeros(COPIED[kind] // 4, device=device)
        target = torch.ones_like(source)
        numbers["gb_per_second"] = 2 * COPIED[kind] / _seconds(partial(target.copy_, source), device) / 1e9
    except RuntimeError as error:  # out of memory too
        return Check(name, one_line(error), BAD, "free its memory, or leave it out" if kind == "cuda" else "free memory")
    peak = peak_flops(torch.cuda.get_device_name(device)) if kind == "cuda" else None
    if peak:
        numbers["share_of_peak"] = numbers["bf16_tflops"] * 1e12 / peak
    rates = ", ".join(f"{key.removesuffix('_tflops')} {v:.3g} TFLOP/s" for key, v in numbers.items() if "tflops" in key)
    found = f"{rates}; memory {numbers['gb_per_second']:.3g} GB/s"
    if peak:
        found += f"; bf16 is {numbers['share_of_peak']:.0%} of the data sheet's"
        if numbers["share_of_peak"] < SLOW:
            remedy = "look for another process, a power cap or heat: nvidia-smi -q -d PERFORMANCE"
            return Check(name, found, WARNING, remedy, numbers)
    return Check(name, found, numbers=numbers)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median of several times, after a first one."""
    times = []
    for _ in range(1 + TIMES):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
