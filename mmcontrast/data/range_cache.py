"""Keeps remote bytes that were read on the local disk, up to a size; any number of processes may read and write."""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

from mmcontrast.errors import UserError
from mmcontrast.file_lock import lock_file

CHUNK = 4 * 2**20  # bytes that are fetched and kept together
KEPT_FREE = 2 * 2**30  # of the disk: beyond that nothing more is kept
LOCKS = 1024


def cache_root() -> Path:
    """Return $MMCONTRAST_CACHE, or mmcontrast in the user's cache folder."""
    if folder := os.environ.get("MMCONTRAST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcontrast"


def range_cache() -> "RangeCache":
    """Return this process's cache, in $MMCONTRAST_CACHE/ranges, of $MMCONTRAST_CACHE_GIB (default: 32).

    Raises:
        UserError: if that is no number.
    """
    gib = os.environ.get("MMCONTRAST_CACHE_GIB", "32")
    try:
        limit = int(float(gib) * 2**30)
    except (ValueError, OverflowError) as error:
        raise UserError(f"MMCONTRAST_CACHE_GIB={gib!r} is not a number of GiB; 0 keeps nothing") from error
    return _open_cache(cache_root() / "ranges", limit)


class RangeCache:
    """Chunks of files, each a file of its own that appears when it is complete; the least recently read go first.

    The limit holds to a hundredth for every process that writes at the same time.

    Args:
        limit: bytes; 0: nothing is kept, and every range is fetched.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.written = limit  # bytes since the last eviction

    def read(self, file: str, size: int, start: int, stop: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Return bytes start … stop − 1 of a file, whose name identifies it and its version.

        Args:
            size: bytes of the whole file.
            fetch: reads a range that is not kept.
        """
        if self.limit < CHUNK or start == stop:
            return fetch(start, stop)
        name = hashlib.blake2b(file.encode(), digest_size=12).hexdigest()
        parts = []
        for number in range(start // CHUNK, (stop - 1) // CHUNK + 1):
            first = number * CHUNK
            last = min(first + CHUNK, size)
            part = slice(max(start - first, 0), min(stop, last) - first)
            parts.append(self._chunk(self.folder / name[:2] / f"{name}-{number:06d}", first, last, part, fetch))
        return b"".join(parts)

    def _chunk(self, path: Path, first: int, last: int, part: slice, fetch: Callable[[int, int], bytes]) -> bytes:
        kept = _read_part(path, last - first, part)
        if kept is not None:
            return kept
        with self._lock(path):  # the others wait for the one that fetches it
            kept = _read_part(path, last - first, part)
            if kept is not None:
                return kept
            data = fetch(first, last)
            with suppress(OSError):  # a full disk, a read-only folder: nothing is kept
                self._store(path, data)
            return data[part]

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f"{zlib.crc32(path.name.encode()) % LOCKS:04d}.lock").open("wb")
        except OSError:
            yield
            return
        with lock:
            lock_file(lock, wait=True)
            yield

    def _store(self, path: Path, data: bytes) -> None:
        if shutil.disk_usage(self.folder).free < KEPT_FREE + len(data):
            return
        partial = path.with_name(f"{path.name}-{uuid4().hex}.partial")
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self.written += len(data)
        if self.written > self.limit // 100:
            self.written = 0
            self._evict()

    def _evict(self) -> None:
        """Remove chunks down to nine tenths of the limit, if there is more than that and a twentieth."""
        entries = []
        for folder in os.scandir(self.folder):
            if folder.is_dir():
                with suppress(FileNotFoundError):
                    for entry in os.scandir(folder):
                        status = entry.stat()
                        entries.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = sum(size for _, size, _ in entries) - self.limit * 9 // 10
        if excess <= self.limit // 20:
            return
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            with suppress(FileNotFoundError):  # another process was faster
                os.unlink(path)
            excess -= size


def _read_part(path: Path, length: int, part: slice) -> bytes | None:
    """Return a part of a chunk, None unless the whole chunk is kept; it counts as read now."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != length:
                return None  # torn by a crash
            os.utime(file.fileno())
            return os.pread(file.fileno(), part.stop - part.start, part.start)
    except OSError:
        return None


_open_cache = lru_cache(RangeCache)
