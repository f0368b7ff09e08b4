"""Opens shards of every kind: tars on a disk or at a URL, folders, tables."""

import signal
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from mmcontrast.data.files import expand_shards, is_remote
from mmcontrast.data.folder import index_folder
from mmcontrast.data.mapped import CONNECTIONS, File, open_tars
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import FILE_COLUMNS, is_table, open_table
from mmcontrast.data.tar import index_file, index_tar
from mmcontrast.errors import UserError

T = TypeVar("T")
WORTH_PROCESSES = 256 * 2**20  # bytes of tars to scan from which several processes pay


def open_shards(
    patterns: str | Sequence[str],
    progress: bool = False,
    file_columns: Collection[str] = FILE_COLUMNS,
    files: str | None = None,
    then: Callable[[ShardIndex], ShardIndex] = lambda shard: shard,
) -> list[ShardIndex]:
    """Open all shards, in order. Tars that the cache has no index of are scanned by one process of a machine, several at once
    where that is worth it; many and large indexes are mapped from one file.

    Args:
        file_columns, files: of tables: columns whose texts are paths, and the folder in which those files are.
        then: applied to each shard when it is open, so that what it drops is in memory of one shard at a time.

    Raises:
        UserError: for the first shard that is missing or damaged.
    """
    names = expand_shards(patterns)
    tars = [name for name in names if not is_table(name) and (is_remote(name) or not Path(name).is_dir())]
    indexes = open_tars(tars, lambda files: _scan(files, progress)) if len(tars) > 1 else map(index_tar, tars)
    tar_names = set(tars)

    def open_one(name: str) -> ShardIndex:
        if name in tar_names:
            return next(indexes)
        return open_table(name, file_columns, files) if is_table(name) else index_folder(name)

    return [then(open_one(name)) for name in names]


def _scan(tars: Sequence[File], progress: bool) -> None:
    """Put the indexes of tars into the cache, several at once where that is worth it.

    Raises:
        UserError: for the first that is damaged.
    """
    if any(is_remote(tar.name) for tar in tars):
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            indexes = threads.map(lambda tar: index_tar(tar.name, file=tar), tars)
            for _ in _tracked(indexes, len(tars), progress):
                pass
        return
    lacking = [tar for tar in tars if not index_file(tar.name).exists()]
    if len(lacking) == 1 or sum(tar.size for tar in lacking) <= WORTH_PROCESSES:
        for tar in lacking:
            index_tar(tar.name, file=tar)
        return
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        scanned = pool.map(_index_error, [tar.name for tar in lacking], chunksize=max(1, len(lacking) // 256))
        for error in _tracked(scanned, len(lacking), progress):
            if error:
                raise UserError(error)


def index_shard(name: str | Path, scan: bool = False) -> ShardIndex:
    """Open one shard.

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


def _index_error(name: str) -> str | None:
    """Index a tar into the cache, and return what is wrong with it, which a worker process cannot raise in one line."""
    try:
        index_tar(name)
    except UserError as error:
        return str(error)
    return None
