"""Runs one rank of the doctor's all-reduce: python -m mmcontrast.doctor.collective BACKEND FILE WORLD_SIZE RANK"""

import statistics
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

NUMBERS = {"gloo": 4 * 2**20, "nccl": 64 * 2**20}  # that are reduced, fp32
TIMES = 5


def main(backend: str, rendezvous: str, world_size: int, rank: int) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", world_size=world_size, rank=rank, timeout=timedelta(seconds=60)
    )
    times = []
    for _ in range(1 + TIMES):
        numbers = torch.full((NUMBERS[backend],), rank + 1.0, device=device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        mean = float(numbers.sum(dtype=torch.float64)) / len(numbers)  # waits for it
        times.append(time.perf_counter() - start)
        if mean != world_size * (world_size + 1) / 2:
            sys.exit(f"rank {rank}: the sum is {mean}, not {world_size * (world_size + 1) / 2}")
    seconds = statistics.median(times[1:])
    if rank == 0:  # bytes that each rank sends, of a ring
        print(f"seconds={seconds} gb_per_second={2 * (world_size - 1) / world_size * 4 * NUMBERS[backend] / seconds / 1e9}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
