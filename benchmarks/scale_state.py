"""Measures, on this machine, the memory and time of each rank besides the loss: the index of many samples, opening files, …

    python benchmarks/scale_state.py --only index --samples 10000000 --ranks 4

No data of that size are written: shards are sparse files, whose index is made up. Run it with another checkout's package on
PYTHONPATH for what was before.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

MIB = 2**20
IN_A_SHARD = 10_000  # samples
EXTENSIONS = ("jpg", "json", "txt")


def memory() -> dict[str, float]:
    """Return the MiB of this process: its own, and of files that it has mapped, which all processes of a node share."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines if words[0].startswith("Rss")}
    return {"own": (kib["RssAnon"] + kib["RssShmem"]) / 1024, "mapped": kib["RssFile"] / 1024}


def in_processes(work: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Return what `work` returns in each of several processes, started together, of (its number, arguments)."""
    with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return [task.result() for task in [pool.submit(work, rank, *arguments) for rank in range(ranks)]]


def make_index(folder: Path, samples: int) -> None:
    """Write sparse shards into `folder`, and an index of members that they do not hold into the cache."""
    from mmcontrast.data import tar
    from mmcontrast.data.files import open_file
    from mmcontrast.data.shard import Members

    folder.mkdir(parents=True)
    sizes = np.tile(np.array([100_000, 300, 60]), (IN_A_SHARD, 1))  # of a picture, a json, a text
    blocks = 512 + (sizes + 511) // 512 * 512  # with their headers
    places = np.cumsum(blocks).reshape(blocks.shape) - blocks + 512
    for number in range(samples // IN_A_SHARD):
        path = folder / f"{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(int(blocks.sum()) + 1024)
        keys = np.frombuffer(b"".join(b"%09d" % (number * IN_A_SHARD + k) for k in range(IN_A_SHARD)), dtype=np.uint8)
        ends = np.arange(1, IN_A_SHARD + 1) * 9
        members = Members.of(keys, ends, EXTENSIONS, places, sizes)
        tar._keep(tar.index_file(str(path)), open_file(str(path)).fingerprint, members)


def open_index(rank: int, shards: str, steps: int) -> dict[str, float]:
    """Return the seconds and MiB of a rank until its data are open, and after the order of some steps and their places."""
    from mmcontrast.data import SampleOrder, ShardDataset
    from mmcontrast.modalities import ImageModality, TextModality

    os.environ["RANK"] = str(rank)
    modalities: Any = {"image": ImageModality(224), "text": TextModality()}
    ShardDataset(shards.replace("*", "000000"), modalities, {}, training=True)  # what it imports
    before, start, cpu_seconds = memory(), time.perf_counter(), time.process_time()
    dataset = ShardDataset(shards, modalities, {}, training=True)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_seconds
    opened = memory()
    order = SampleOrder(tuple(map(len, dataset.shards)), 4096, 0, 64, 256, 8192, dataset.digest)
    step_start, checksum = time.perf_counter(), 0
    order.batch(0)
    first = time.perf_counter() - step_start
    step_start = time.perf_counter()
    for step in range(steps):
        for position in order.batch(step, rank, 4)[1].tolist():
            shard, row = dataset.locate(position)
            checksum += sum(place for place, _, _ in shard.wanted(row, EXTENSIONS))  # type: ignore[attr-defined]
    seconds_per_step = (time.perf_counter() - step_start) / steps
    after = memory()
    return {
        "open_s": seconds, "cpu_s": cpu_seconds,
        "own": opened["own"] - before["own"], "mapped": opened["mapped"] - before["mapped"],
        "own_later": after["own"] - before["own"], "mapped_later": after["mapped"] - before["mapped"],
        "first_order_s": first, "step_ms": 1000 * seconds_per_step, "checksum": checksum,
    }  # fmt: skip


def index(options: argparse.Namespace, folder: Path) -> None:
    shards = folder / f"shards-{options.samples}"
    if not shards.exists():
        make_index(shards, options.samples)
    for attempt in ("first start", "again"):
        results = in_processes(open_index, options.ranks, str(shards / "*.tar"), options.steps)
        middle = {name: statistics.median(result[name] for result in results) for name in results[0]}
        slowest = max(result["open_s"] for result in results)
        print(
            f"index, {options.samples:,} samples, {attempt}: open {middle['open_s']:.2f} s (slowest rank {slowest:.2f},"
            f" CPU {middle['cpu_s']:.2f});"
            f" a rank's own memory {middle['own']:.0f} MiB, mapped {middle['mapped']:.0f};"
            f" after {options.steps} steps {middle['own_later']:.0f}, {middle['mapped_later']:.0f};"
            f" order {middle['first_order_s']:.2f} s, a step's places {middle['step_ms']:.0f} ms;"
            f" checksum {middle['checksum']:.0f}",
            flush=True,
        )


def joined(rank: int, ranks: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)


def learner_in_shards(ranks: int, width: int, blocks: int) -> Any:
    """Return a model of `blocks` square weights of `width` in shards, with an optimizer that has taken a step."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(blocks)))
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def peak_reset() -> float:
    """Reset the peak of memory; return the MiB in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) / 1024 for words in lines if words[0] == "VmHWM:")


def save_shards(rank: int, ranks: int, folder: str, width: int, blocks: int, beside: bool) -> dict[str, float]:
    """Return a save's peak memory above the training's, in parameters, and the share of the checkpoint that a resume reads."""
    import gc

    import torch
    import torch.distributed as dist

    from mmcontrast.training import checkpoint
    from mmcontrast.training.checkpoint import Contents
    from mmcontrast.training.saver import Saver

    joined(rank, ranks, f"{folder}/store-{beside}")
    model, optimizer = learner_in_shards(ranks, width, blocks)
    saver = Saver(Path(folder) / f"run-{beside}", 9, 0, beside, rank, dist.new_group(backend="gloo"))
    parameter = width * width * 4 / MIB
    peaks = {}
    for step in (1, 2):  # the first one imports
        state = model.state_dict()
        shards = {f"exp_avg/{name}": optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
        gc.collect()
        before = peak_reset()
        if hasattr(Contents, "whole"):
            contents = Contents(state, {}, {"step": 1}, "", shards)
        else:
            contents = Contents({name: tensor.full_tensor() for name, tensor in state.items()}, {}, {"step": 1}, "", shards)
        saver.save(step, contents)
        peaks = {"save": (peak() - before) / parameter}
        saver.wait()
        del contents, state, shards
        dist.barrier()
    last = Path(folder) / f"run-{beside}" / "step-00000002"
    total = sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
    before_read = int(Path("/proc/self/io").read_text().split()[1])
    if hasattr(Contents, "whole"):
        from mmcontrast.training.tensors import read_parts

        checkpoint.check(last, dist.group.WORLD)
        parts = read_parts(last / checkpoint.WEIGHTS, model.state_dict(), dist.group.WORLD, torch.device("cpu"))
        mapped = sum(part.to_local().nbytes for part in parts.values())  # type: ignore[attr-defined]
    else:
        checkpoint.check(last)
        mapped = sum(tensor.nbytes for tensor in checkpoint.load_weights(last).values())
    read = int(Path("/proc/self/io").read_text().split()[1]) - before_read
    dist.barrier()
    dist.destroy_process_group()
    return peaks | {"read": (read + mapped) / total, "checkpoint_mib": total / MIB, "parameter_mib": parameter}


def save(options: argparse.Namespace, folder: Path) -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # what is freed is the system's again, and is seen when it is taken anew
    for beside in (True, False):
        with tempfile.TemporaryDirectory(dir=folder) as run:
            results = in_processes(save_shards, options.ranks, options.ranks, run, options.width, options.blocks, beside)
        peaks = ", ".join(f"{result['save']:.2f}" for result in results)
        read = ", ".join(f"{result['read']:.2f}" for result in results)
        print(
            f"save of {options.blocks} parameters of {results[0]['parameter_mib']:.0f} MiB in shards of {options.ranks} ranks,"
            f" {'beside the training' if beside else 'in its way'}: most memory above the training's, in parameters, by rank:"
            f" {peaks}; a resume reads of the checkpoint's {results[0]['checkpoint_mib']:.0f} MiB, by rank: {read}",
            flush=True,
        )


PARTS: dict[str, Callable[[argparse.Namespace, Path], None]] = {"index": index, "save": save}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the index")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=2048, help="of a parameter of the model that is saved")
    parser.add_argument("--blocks", type=int, default=12, help="of that model")
    parser.add_argument("--folder", type=Path, help="kept for another run; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["MMCONTRAST_CACHE"] = str(folder / "cache")
        for name in options.only:
            PARTS[name](options, folder)


if __name__ == "__main__":
    main()
