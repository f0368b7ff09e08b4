"""Compares the two drivers over real processes on this machine: the ring, and one gather of all columns.

    python benchmarks/communication.py                     # 2 and 4 gloo ranks of one thread each, D = 512, fp32

Forward and backward of infonce, alternating; medians over all steps of the slowest rank, and their ratio.
"""

import argparse
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from mmcontrast import contrastive_loss


def worker(rank: int, ranks: int, port: int, sizes: list[int], dim: int, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    for n in sizes:
        generator = torch.Generator().manual_seed(rank)
        x, y = (F.normalize(torch.randn(n, dim, generator=generator), dim=1).requires_grad_() for _ in range(2))
        times: dict[str, list[float]] = {"ring": [], "gather": []}
        for _ in range(repeats + 1):
            for driver, seconds in times.items():
                dist.barrier()
                start = time.perf_counter()
                loss = contrastive_loss(
                    {"a": x, "b": y}, logit_scale=50.0, group=dist.group.WORLD, communication=driver
                )  # fmt: skip
                loss.backward()
                slowest = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                seconds.append(slowest.item())
        if rank == 0:
            ring, gather = (statistics.median(seconds[1:]) for seconds in times.values())
            size = ranks * n * dim * 8 / 2**20
            print(
                f"{ranks} ranks of {n:,}: ring {ring * 1e3:.1f} ms, gather {gather * 1e3:.1f} ms,"
                f" ring / gather {ring / gather:.2f} ({size:.0f} MiB on every rank when gathered)",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--n", type=int, nargs="+", default=[32, 128, 512, 2048, 4096], help="rows of a rank")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for ranks in options.ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(worker, (ranks, port, options.n, options.dim, options.repeats), nprocs=ranks)


if __name__ == "__main__":
    main()
