"""Opening shards of every kind: tars on a disk or at a URL, folders, tables."""

import signal
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from mmcontrast.data.files import expand_shards, is_remote
from mmcontrast.data.folder import index_folder
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import FILE_COLUMNS, is_table, open_table
from mmcontrast.data.tar import index_file, index_tar
from mmcontrast.errors import UserError

T = TypeVar("T")
WORTH_PROCESSES = 256 * 2**20  # bytes of tars to scan from which several processes pay
CONNECTIONS = 32  # remote shards that are opened at a time


def open_shards(
    patterns: str | Sequence[str],
    progress: bool = False,
    file_columns: Collection[str] = FILE_COLUMNS,
    files: str | None = None,
    then: Callable[[ShardIndex], ShardIndex] = lambda shard: shard,
) -> list[ShardIndex]:
    """All shards, in order. Tars are scanned, at once where that is worth it, unless the cache has their indexes.

    Args:
        file_columns, files: of tables: columns whose texts are paths, and the folder in which those files are.
        then: what is made of each when it is open, one after the other, so that not all of all of them is in memory.

    Raises:
        UserError: for the first shard that is missing or damaged.
    """
    names = expand_shards(patterns)

    def opened(name: str) -> ShardIndex:
        return then(open_table(name, file_columns, files) if is_table(name) else index_shard(name))

    if any(map(is_remote, names)):
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            return list(_tracked(threads.map(opened, names), len(names), progress))
    tars = [name for name in names if Path(name).is_file() and not is_table(name) and not index_file(name).exists()]
    if sum(Path(name).stat().st_size for name in tars) > WORTH_PROCESSES and len(tars) > 1:
        with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            scanned = pool.map(_error, tars, chunksize=max(1, len(tars) // 256))
            for error in _tracked(scanned, len(tars), progress):
                if error:
                    raise UserError(error)
    return [opened(name) for name in names]


def index_shard(name: str | Path, scan: bool = False) -> ShardIndex:
    """One shard.

    Args:
        scan: read a tar again, whatever the cache has of it.

    Raises:
        UserError: if it is missing or damaged.
    """
    name = str(name)
    if is_table(name):
        return open_table(name)
    return index_folder(name) if not is_remote(name) and Path(name).is_dir() else index_tar(name, scan)


def _tracked(results: Iterable[T], total: int, progress: bool) -> Iterable[T]:
    console = Console(stderr=True)
    return track(results, "indexing shards", total, console=console, transient=True, disable=not progress)


def _error(name: str) -> str | None:
    """What a worker process cannot raise in one line."""
    try:
        index_tar(name)
    except UserError as error:
        return str(error)
    return None
