"""Runs jobs in a pool of processes here or on a Ray cluster, and yields their results in order.

A job is a call of a function of a module; it depends on nothing but its argument and files, so it may be tried again anywhere.
"""

import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from mmcontrast.data.loading import start_worker
from mmcontrast.errors import UserError

_log = logging.getLogger(__name__)
ENGINES = ("pool", "ray")
TRIES = 4  # of a job whose worker dies on Ray
AHEAD = 64  # jobs that are handed to Ray at least, so that a cluster that can grow does
J = TypeVar("J")
R = TypeVar("R")


def check_engine(engine: str) -> None:
    """Check the name of an engine.

    Raises:
        UserError: for one that does not exist, or whose library is not installed.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine!r}: pool, or ray")
    if engine == "ray":
        try:
            import ray

            ray.init  # noqa: B018  a folder of that name in the working directory can be imported too
        except (ImportError, AttributeError) as error:
            raise UserError(f"--engine ray needs Ray: pip install 'mmcontrast[ray]' ({error})") from error


def run_jobs(
    function: Callable[[J], R], jobs: Sequence[J], label: str, *, engine: str = "pool", workers: int | None = None
) -> Iterator[R]:
    """Yield what a function returns for each job, in their order, with a progress bar.

    Args:
        jobs: whose `str` names them in errors.
        engine: "pool": processes of this machine; "ray": the Ray cluster that this process is in, else the one that RAY_ADDRESS
            names or `ray start` has started here, else one of this machine alone that ends with the jobs. Machines of a cluster
            must share the files' folders.
        workers: jobs at once; default: the cores that this process may use, or the cluster's.

    Raises:
        UserError: if a worker dies (on Ray: at each of four tries), or there is no cluster where RAY_ADDRESS says.
        BaseException: what the function raised of the first job that failed.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    number = min(workers or cores, len(jobs))
    results: Generator[R, None, None]
    if engine == "ray" and jobs:
        results = _by_ray(function, jobs, workers, number)
    else:
        results = _by_pool(function, jobs, number) if number > 1 else (function(job) for job in jobs)
    with closing(results):
        yield from track(results, label, len(jobs), console=Console(stderr=True), transient=True)


def _by_pool(function: Callable[[J], R], jobs: Sequence[J], workers: int) -> Generator[R, None, None]:
    done = 0
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        try:
            for result in pool.map(function, jobs):
                yield result
                done += 1
        except BrokenProcessPool as error:
            raise UserError(
                f"{jobs[done]} or one of the next: its process was killed; if memory ran out, lower --workers (now {workers})."
                " Run the same command again to continue"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _by_ray(function: Callable[[J], R], jobs: Sequence[J], workers: int | None, cores: int) -> Generator[R, None, None]:
    import ray

    settings = {name: value for name, value in os.environ.items() if name.startswith("MMCONTRAST_")}
    with _cluster(cores):
        at_once = workers or max(AHEAD, 2 * int(ray.cluster_resources().get("CPU", 1)))
        task: Any = ray.remote(max_retries=TRIES - 1)(_on_worker)
        waiting, running, finished, next_job = iter(enumerate(jobs)), dict[Any, int](), dict[int, Any](), 0
        try:
            while next_job < len(jobs):
                for number, job in islice(waiting, at_once - len(running)):
                    running[task.remote(function, job, os.getcwd(), settings)] = number
                for reference in ray.wait(list(running))[0]:
                    finished[running.pop(reference)] = reference
                while next_job in finished:
                    yield _result(finished.pop(next_job), jobs[next_job])
                    next_job += 1
        finally:
            for reference in running:
                ray.cancel(reference)


def _on_worker(function: Callable[[J], R], job: J, folder: str, settings: dict[str, str]) -> R:
    """Call a function as a process of the pool would: in the same folder, with the same settings, on one thread."""
    os.environ.update(settings)
    torch.set_num_threads(1)
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"--engine ray: {folder} is not there on {os.uname().nodename} ({error.strerror}): the machines of the cluster must"
            " share the folders of the shards, of the output, and that where the command runs"
        ) from error
    return function(job)


def _result(reference: Any, job: object) -> Any:
    """Return a task's result.

    Raises:
        BaseException: what the function raised, as it would be here.
        UserError: if its worker died at every try, or Ray could not run it.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, BaseException) else error) from error
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--engine ray: {job}: {reason} (tried {TRIES} times). Run the same command again to continue"
        ) from error


@contextmanager
def _cluster(cores: int) -> Iterator[None]:
    """Connect to the Ray cluster that there is, or start one of this machine; leave, or end, it.

    Raises:
        UserError: if there is none where RAY_ADDRESS says.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    join_cluster(cores)
    try:
        yield
    finally:
        ray.shutdown()


def join_cluster(cores: int) -> None:
    """Connect to the Ray cluster that there is, or start one of this machine: several times, as Ray gives up after half a
    minute, in which a busy machine may not have started it.

    Raises:
        UserError: if it does not start.
    """
    import ray

    for attempt in range(TRIES):
        try:
            ray.init(num_cpus=cores, include_dashboard=False, logging_level=logging.ERROR)
            return
        except ValueError:  # there is a cluster, which has its own number of cores
            ray.init(logging_level=logging.ERROR)
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            reason = " ".join(str(error).split())
            _log.warning("Ray did not start (%d of %d times): %s", attempt + 1, TRIES, reason)
    raise UserError(f"--engine ray: no cluster starts here: {reason}")


def _check_address(address: str) -> None:
    """Check that a Ray cluster listens at an address; without one Ray would end the whole process, after a minute.

    Raises:
        UserError: if none does.
    """
    host, colon, port = address.rpartition(":")
    if address in ("", "auto", "local"):
        return
    if not colon or not port.isdecimal() or "://" in host:
        raise UserError(
            f"RAY_ADDRESS={address}: not of the form HOST:PORT, of a cluster whose machines share this one's folders"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--engine ray: no cluster at RAY_ADDRESS={address} ({error})") from error
