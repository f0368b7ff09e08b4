"""Keeps the indexes of many tars in one memory-mapped file of the cache, which all processes of a machine share uncopied.

    magic, then of each tar: places, sizes, ends of the keys, text of the keys, to a multiple of eight bytes;
    a JSON of what the tars are and of their fingerprints; its length in eight bytes

It is one file because a process may map some tens of thousands at most, and a thousand million samples are more tars than that.
"""

import hashlib
import json
import logging
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from mmcontrast.data.files import LocalFile, RemoteFile, is_remote, open_file
from mmcontrast.data.range_cache import cache_root
from mmcontrast.data.shard import Keys
from mmcontrast.data.tar import VERSION, TarIndex, index_file, index_tar
from mmcontrast.file_lock import lock_file

MAGIC = b"mmindex1"
LEAST = 2**24  # bytes of indexes from which they are put together: fewer are read as fast as they are mapped
MANY = 256  # tars from which several are opened at a time: a file on a network answers slowly
CONNECTIONS = 32  # tars that are opened, or scanned at URLs, at a time
LOCKS = 1024
File = LocalFile | RemoteFile
logger = logging.getLogger("mmcontrast")


def open_tars(names: Sequence[str], scan: Callable[[Sequence[File]], None]) -> Iterator[TarIndex]:
    """Yield the indexes of tars, in order: mapped from one file if they are large. One process makes that file, while others
    that want it wait.

    Args:
        names: of whole tars, on a disk or at URLs.
        scan: puts the indexes of those that have none into the cache.

    Raises:
        UserError: for the first that is missing or damaged.
    """
    files = _open_files(names)
    target = _mapped_file(names)
    indexes = _read(target, files)
    if indexes is None and not _are_small(names):
        with _lock(target) as is_alone:
            indexes = _read(target, files) if is_alone else None  # of the process that was waited for
            if is_alone and indexes is None:
                scan(files)
                if not _are_small(names):
                    indexes = _read(target, files) if _write(target, files) else None
                    if indexes is None and os.environ.get("RANK", "0") == "0":
                        text = "no index can be written to %s: each process holds its own, of %d tars"
                        logger.warning(text, target.parent, len(names))
    if indexes is None:
        return (index_tar(file.name, file=file) for file in files)
    return iter(indexes)


def _open_files(names: Sequence[str]) -> list[File]:
    if len(names) < MANY and not any(map(is_remote, names)):
        return [open_file(name) for name in names]
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        return list(threads.map(open_file, names))


def _mapped_file(names: Sequence[str]) -> Path:
    paths = "\0".join(name if is_remote(name) else str(Path(name).absolute()) for name in names)
    digest = hashlib.blake2b(paths.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    return cache_root() / "index" / f"{digest}.tars"


def _are_small(names: Sequence[str]) -> bool:
    """Return whether the indexes of all tars are in the cache, and small."""
    try:
        return sum(index_file(name).stat().st_size for name in names) < LEAST
    except OSError:
        return False


def _stamp(files: Sequence[File]) -> str:
    hasher = hashlib.blake2b(f"{VERSION}\n".encode(), digest_size=16)
    for file in files:
        hasher.update(f"{file.fingerprint}\n".encode())
    return hasher.hexdigest()


def _read(path: Path, files: Sequence[File]) -> list[TarIndex] | None:
    """Return the indexes of these tars from their file; None if there is none, or it is not of the tars as they are now."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        end = len(mapped) - 8
        header = json.loads(mapped[end - int.from_bytes(mapped[end:], "little") : end])
        if mapped[: len(MAGIC)] != MAGIC or header["stamp"] != _stamp(files) or len(header["tars"]) != len(files):
            return None
        extensions = [tuple(names) for names in header["extensions"]]
        start, indexes = len(MAGIC), []
        for tar, entry in zip(files, header["tars"], strict=True):
            rows, text_bytes, kind, sizes_type, ends_type, digest, notes = entry
            arrays = []
            cells = rows * len(extensions[kind])
            for dtype, length in (("<i8", cells), (sizes_type, cells), (ends_type, rows), ("u1", text_bytes)):
                arrays.append(np.frombuffer(mapped, dtype, length, start) if length else np.empty(0, dtype))
                start += arrays[-1].nbytes
            start += -start % 8
            places, sizes = (array.reshape(rows, len(extensions[kind])) for array in arrays[:2])
            keys = Keys(arrays[3], arrays[2])
            indexes.append(TarIndex(tar.name, keys, extensions[kind], digest, places, sizes, tar, notes=tuple(notes)))
        return indexes
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None  # not there, or not ours


def _write(path: Path, files: Sequence[File]) -> bool:
    """Put the indexes of tars into one file, one after the other; False if it cannot be written."""
    kinds: dict[tuple[str, ...], int] = {}
    tars: list[Any] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}-{uuid4().hex}.partial")
        target = partial.open("xb")
    except OSError:
        return False
    try:
        with target:
            target.write(MAGIC)
            for file in files:
                index = index_tar(file.name, file=file)
                assert isinstance(index.keys, Keys)
                sizes, ends = _shrink(index.sizes), _shrink(index.keys.ends)
                for array in (index.places.astype("<i8", copy=False), sizes, ends, index.keys.text):
                    target.write(np.ascontiguousarray(array).data)
                target.write(bytes(-target.tell() % 8))
                kind, dtypes = kinds.setdefault(index.extensions, len(kinds)), (sizes.dtype.str, ends.dtype.str)
                tars.append([len(index), len(index.keys.text), kind, *dtypes, index.digest, index.notes])
            header = json.dumps({"stamp": _stamp(files), "extensions": list(kinds), "tars": tars}).encode()
            target.write(header + len(header).to_bytes(8, "little"))
        os.replace(partial, path)
        return True
    except OSError:  # a cache that cannot be written is none
        return False
    finally:
        partial.unlink(missing_ok=True)


def _shrink(numbers: np.ndarray) -> np.ndarray:
    """Return whole numbers in four bytes each, where they fit."""
    return numbers.astype("<i4" if numbers.max(initial=0) < 2**31 else "<i8", copy=False)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Let one process at a time within; yield False where the cache cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = (path.parent / f"{zlib.crc32(path.name.encode()) % LOCKS:04d}.lock").open("wb")
    except OSError:
        yield False
        return
    with lock:
        lock_file(lock, wait=True)
        yield True
