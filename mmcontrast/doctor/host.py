"""Checks the machine around the devices: cores and their limits, open files, shared memory, disks."""

import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mmcontrast.data.loading import PREFETCHED, SHARED
from mmcontrast.data.range_cache import KEPT_FREE, cache_root
from mmcontrast.doctor.check import BAD, WARNING, Check, one_line, size

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
WRITTEN = 64 * 2**20  # bytes of a disk's probe
LITTLE_SHARED, LITTLE_DISK = 2**30, 10 * 2**30  # bytes below which a warning is given, without a config
FILES = 256  # that a process has open beside its batches, with some to spare


def host_checks() -> Iterator[Check]:
    """Yield the checks that need no config."""
    yield cores(0, None)
    yield open_files(0, 0)
    yield shared_memory(LITTLE_SHARED)
    yield disk("disk of runs/", Path("runs"), LITTLE_DISK, "make room, or set run.dir to another disk")
    yield cache_disk()


def processes() -> int:
    """Return the number of training processes on this machine: as launched, or one for each GPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or gpus or 1


def cores(workers: int, threads: int | None) -> Check:
    """Check the cores that this process may use against the threads and workers of a run.

    Args:
        workers: data.num_workers. threads: train.threads.
    """
    allowed, total, limit = len(os.sched_getaffinity(0)), os.cpu_count() or 1, cgroup_cores()
    usable, ranks = min(allowed, math.ceil(limit or allowed)), processes()
    threads, cores_of_rank = threads or torch.get_num_threads(), usable // ranks
    found = f"{allowed} of {total} cores{f', limited to {limit:g} by the cgroup' if limit else ''}; {threads} threads of torch"
    numbers = {"cores": usable, "threads": threads, "workers": workers, "processes": ranks}
    if threads * ranks > usable:
        found += f" in each of {ranks} processes"
        return Check("CPU", found, WARNING, f"set train.threads or OMP_NUM_THREADS to {max(1, cores_of_rank)}", numbers)
    if workers and (workers + 1) * ranks > usable:
        found += f"; {ranks} × ({workers} workers + 1)"
        remedy = f"set data.num_workers to {max(0, cores_of_rank - 1)}, or ask for more cores"
        return Check("CPU", found, WARNING, remedy, numbers)
    return Check("CPU", found, numbers=numbers)


def cgroup_cores(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """Return the least quota of this process's control groups, of version 1 or 2, in cores; None: no limit."""
    quotas = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / controllers, root / "cpu"] if controllers else [root, root / "unified"]
        inner = Path(path.lstrip("/"))
        quotas += [_quota(mount / part) for mount in mounts for part in (inner, *inner.parents)]
    return min((quota for quota in quotas if quota), default=None)


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def open_files(workers: int, fields: int) -> Check:
    """Check the limit of open files: a batch in shared memory is an open file for each of its tensors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES + workers * PREFETCHED * (2 * fields + 2)
    found, numbers = f"at most {soft}, {needed} needed", {"limit": soft, "needed": needed}
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Check("open files", found, numbers=numbers)
    remedy = f"ulimit -n {hard if hard != resource.RLIM_INFINITY else 65536}"
    return Check("open files", found, BAD, remedy if hard >= needed else f"raise the hard limit, now {hard}", numbers)


def shared_memory(needed: int, why: str = "") -> Check:
    """Check the space of /dev/shm, through which workers hand over batches; a container's is 64 MiB by default."""
    if not SHARED.is_dir():
        return Check("/dev/shm", "not there", BAD, "mount a tmpfs there, or set data.num_workers=0")
    free = shutil.disk_usage(SHARED).free
    found, numbers = f"{size(free)} free{why}", {"free_bytes": free, "needed_bytes": needed}
    if free >= needed:
        return Check("/dev/shm", found, numbers=numbers)
    option = f"--shm-size={math.ceil(needed / 2**30)}g, or --ipc=host"
    remedy = f"give the container more ({option}), or lower data.prefetch and data.num_workers"
    return Check("/dev/shm", found, BAD if why else WARNING, remedy, numbers)


def cache_disk() -> Check:
    return disk("disk of the cache", cache_root(), KEPT_FREE, "set MMCONTRAST_CACHE to a folder on another disk", WARNING)


def disk(name: str, folder: Path, needed: float, remedy: str, worst: str = BAD, why: str = "") -> Check:
    """Check the free space, and the speed of a file that is written and flushed, where a folder is or will be.

    Args:
        worst: the state if nothing can be written.
        why: what needs the space; with it too little space is bad, else a warning.
    """
    existing = folder.absolute()
    try:
        existing = next(path for path in (existing, *existing.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        block, number = os.urandom(2**20), max(1, min(WRITTEN, free // 4) // 2**20)
        with tempfile.TemporaryFile(dir=existing) as file:
            start = time.perf_counter()
            for _ in range(number):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = number * 2**20 / (time.perf_counter() - start)
    except OSError as error:
        return Check(name, f"{existing}: {one_line(error.strerror or error)}", worst, remedy)
    found = f"{existing}: {size(free)} free{why}; {rate / 1e6:.0f} MB/s"
    numbers = {"free_bytes": free, "bytes_per_second": rate}
    if free >= needed:
        return Check(name, found, numbers=numbers)
    return Check(name, found, BAD if why else WARNING, remedy, numbers)
