"""Files that samples are read from, by ranges of bytes: on a disk, or at a URL that fsspec reaches."""

import glob
import logging
import os
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import braceexpand
import fsspec

from mmcontrast.data.range_cache import range_cache
from mmcontrast.errors import UserError
from mmcontrast.libraries import tell

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")  # of URLs that are opened; others may run or read anything
STALLED = 30.0  # seconds without a byte after which an HTTP request is given up
ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE = 8, 0.5, 30.0  # of a read; in seconds, doubled each time: a minute in all
OPEN = 128  # shards that a process keeps open; an order by windows comes back to each of its own many times
ENDS = 4096  # bytes at either end of a file that are part of its fingerprint
STAMPS = {"etag", "last-modified", "lastmodified", "last_modified", "generation", "updated", "mtime", "blob_id"}
logger = logging.getLogger("mmcontrast")
T = TypeVar("T")


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """Return the files named by paths, globs (`train-*.tar`; `**/*.tar`: in all folders below), brace ranges
    (`train-{00000..00025}.tar`) and URLs of them, in order.

    Raises:
        UserError: if a pattern matches no file, or a URL's scheme is none of `SCHEMES`.
    """
    files: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not is_remote(pattern) and os.path.lexists(pattern):  # whatever its name, as a[1].csv
            files.append(pattern)
            continue
        try:
            names = list(braceexpand.braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"the braces of {pattern!r} do not match: write {{00000..00025}}") from error
        for expanded in names:
            if not is_remote(expanded):
                matches = [expanded] if os.path.lexists(expanded) else sorted(glob.glob(expanded, recursive=True))
            elif "*" in expanded:
                filesystem = _filesystem(expanded)
                paths = _retry(partial(filesystem.glob, expanded), expanded)
                matches = [str(filesystem.unstrip_protocol(path)) for path in sorted(paths)]
            else:
                _filesystem(expanded)
                matches = [expanded]
            if not matches:
                raise UserError(f"no shard at {expanded!r} (from {Path.cwd()}): correct the path, or build the data first")
            files.extend(matches)
    return files


def identities(names: Sequence[str]) -> list[str]:
    """Return per shard the shortest end of its path that tells it from the others. With their keys, it makes the ids of samples
    without a `sample_id`. It does not depend on the folder, the mount or the server that all of them are in, nor on a URL's
    signature. A shard that is named twice is one."""
    paths = [name if is_remote(name) else os.path.abspath(name) for name in names]
    unsigned = [name.partition("?")[0] if is_remote(name) else name for name in paths]
    if len(set(unsigned)) == len(set(paths)):
        paths = unsigned
    parts = {name: name.rstrip("/").split("/") for name in paths}
    for length in range(1, max((len(path_parts) for path_parts in parts.values()), default=0) + 1):
        ends = {name: "/".join(path_parts[-length:]) for name, path_parts in parts.items()}
        if len(set(ends.values())) == len(ends):
            return [ends[name] for name in paths]
    return paths


def is_remote(name: str) -> bool:
    return "://" in name


def tell_of_newer(made: Iterable[tuple[str, float]], what: object) -> None:
    """Warn of local files that were written after something was made of them; their names and sizes may be as they were.

    Args:
        made: files, and when (in seconds) it was made of each.
    """
    newer = [name for name, time_made in made if os.path.isfile(name) and os.stat(name).st_mtime > time_made]
    if newer:
        more = f" and {len(newer) - 1} more were" if len(newer) > 1 else " was"
        tell(f"{newer[0]}{more} written after {what} was made: if what is in them has changed, remove it and make it again")


def open_file(name: str) -> "LocalFile | RemoteFile":
    """Return a file with its size and fingerprint.

    Raises:
        UserError: if it is not there or cannot be read.
    """
    if is_remote(name):
        return _open_remote(name)
    try:
        with Path(name).open("rb") as file:
            status = os.fstat(file.fileno())
            ends = file.read(ENDS)
            file.seek(max(0, status.st_size - ENDS))
            ends += file.read()
    except OSError as error:
        raise UserError(f"shard {name} cannot be read: {error.strerror}") from error
    return LocalFile(name, status.st_size, f"{status.st_size} {status.st_mtime_ns} {zlib.crc32(ends):08x}")


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk.

    Attributes:
        size: bytes.
        fingerprint: changes if the file does, as far as its size, time, first and last bytes tell.
    """

    name: str
    size: int
    fingerprint: str

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`.

        Raises:
            UserError: if the bytes are not there.
        """
        try:
            try:
                descriptor = _open_descriptor(self)  # kept until it is read: another thread may drop it from the cache
                data = os.pread(descriptor.number, stop - start, start)
            except OSError:  # a server may have forgotten what was open
                _open_descriptor.cache_clear()
                descriptor = _open_descriptor(self)
                data = os.pread(descriptor.number, stop - start, start)
        except OSError as error:
            raise UserError(f"shard {self.name} cannot be read: {error.strerror}") from error
        if len(data) != stop - start:
            raise _has_changed(self.name)
        return data


class _Descriptor:
    """A file that is open until nobody has it any more: another thread may read it while it leaves the cache."""

    def __init__(self, name: str) -> None:
        self.number = os.open(name, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(OPEN)
def _open_descriptor(file: LocalFile) -> _Descriptor:
    """Return an open file; the last few stay open.

    Raises:
        UserError: if it is not the one that was indexed.
    """
    descriptor = _Descriptor(file.name)
    status = os.fstat(descriptor.number)
    if not file.fingerprint.startswith(f"{status.st_size} {status.st_mtime_ns} "):
        raise _has_changed(file.name)
    return descriptor


def _has_changed(name: str) -> UserError:
    return UserError(f"shard {name} has changed since it was indexed: start again")


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL; what was read of it is kept in the range cache. Picklable, and safe to use after a fork.

    Attributes:
        fingerprint: changes if the file does: its size and the server's tag or time for it.
    """

    name: str
    size: int
    fingerprint: str

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`, from the range cache or the server.

        Raises:
            UserError: if the bytes still do not come after all attempts.
        """
        return range_cache().read(f"{self.name} {self.fingerprint}", self.size, start, stop, self.fetch)

    def fetch(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`, past the cache."""

        def request() -> bytes:
            data = _filesystem(self.name).cat_file(self.name, start, stop)
            if len(data) > stop - start:
                raise _no_ranges(self.name)
            if len(data) < stop - start:
                raise EOFError(f"{len(data)} bytes came of {stop - start}")
            return data

        return _retry(request, self.name) if stop > start else b""

    def check_ranges(self) -> None:
        """Check that the server sends ranges of files, by the head of its answer.

        Raises:
            UserError: if it sends whole files only.
        """

        def request() -> None:
            with _filesystem(self.name).open(self.name, "rb", size=self.size, cache_type="none") as file:
                file.seek(self.size - 1)
                try:
                    file.read(1)
                except ValueError as error:
                    raise _no_ranges(self.name) from error

        if self.name.startswith("http") and self.size > 1:
            _retry(request, self.name)


def open_stream(name: str) -> BinaryIO:
    """Open a file to be read once from its beginning. Opening it is tried again; what breaks later is not.

    Raises:
        UserError: if it cannot be opened.
    """
    if is_remote(name):
        options = {"block_size": 0} if name.startswith("http") else {"cache_type": "readahead"}
        return _retry(lambda: _filesystem(name).open(name, "rb", **options), name)
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise UserError(f"shard {name} cannot be read: {error.strerror}") from error


def _no_ranges(name: str) -> UserError:
    return UserError(f"shard {name}: its server sends whole files only, not ranges of them; read it with data.sequential=true")


def _open_remote(name: str) -> RemoteFile:
    info: dict[str, Any] = _retry(lambda: _filesystem(name).info(name), name)
    if info.get("size") is None:
        raise UserError(f"shard {name}: its server does not tell its size; read it with data.sequential=true")
    size = int(info["size"])
    stamps = [f"{key}={info[key]}" for key in sorted(info) if key.lower() in STAMPS and info[key]]
    if not stamps:
        file = RemoteFile(name, size, "")
        stamps = [f"{zlib.crc32(file.fetch(0, min(ENDS, size)) + file.fetch(max(0, size - ENDS), size)):08x}"]
    return RemoteFile(name, size, " ".join([str(size), *stamps]))


def _forget_event_loop() -> None:
    """Let fsspec start an event loop of this process's own: a fork has not the thread that runs its parent's, and would wait
    for it without an end. fsspec does so itself from 2025.5 on."""
    if "fsspec.asyn" in sys.modules:
        sys.modules["fsspec.asyn"].reset_lock()


os.register_at_fork(after_in_child=_forget_event_loop)


def _filesystem(name: str) -> Any:
    """Return fsspec's file system for a URL; fsspec keeps one for each process and set of options.

    Raises:
        UserError: for a scheme that is not allowed, or whose package is not installed.
    """
    scheme = name.partition("://")[0]
    if scheme not in SCHEMES:
        raise UserError(f"shard {name}: URLs of {scheme!r} are not opened; there is: {', '.join(SCHEMES)}")
    options: dict[str, Any] = {}
    try:
        if scheme.startswith("http"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)
            options = {"client_kwargs": {"timeout": timeout}}
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise UserError(f"shard {name}: install what reads it: pip install 'fsspec[{scheme}]' ({error})") from error


def _retry(read: Callable[[], T], name: str) -> T:
    """Return what `read` returns. It is tried again with growing pauses, as long as its errors may be temporary.

    Raises:
        UserError: for an error that is permanent, or after the last attempt.
    """
    start = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # every file system has its own kinds
            cause = error.__cause__ or error  # fsspec says "not found" of whatever happened
            reason = f"{type(cause).__name__}: {cause}".rstrip(": ")
            status = getattr(cause, "status", None)
            permanent = cause is error and isinstance(error, FileNotFoundError | PermissionError)
            if permanent or (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)):
                raise UserError(f"shard {name} cannot be read ({reason})") from error
            if attempt == ATTEMPTS:
                tried = f"{attempt} attempts over {time.monotonic() - start:.0f} s"
                raise UserError(f"shard {name} could not be read in {tried} ({reason})") from error
            pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            logger.warning("shard %s: attempt %d of %d failed (%s), again in %.1f s", name, attempt, ATTEMPTS, reason, pause)
            time.sleep(pause)
    raise AssertionError
