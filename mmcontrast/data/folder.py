"""A folder of files, `a.jpg` beside `a.txt`, read like a shard."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmcontrast.data.shard import MemberIndex, Members, sample_of
from mmcontrast.errors import UserError


@dataclass(frozen=True)
class FolderIndex(MemberIndex):
    """A folder, indexed each time it is opened.

    Attributes:
        names: of the files, relative to the folder; `places` are indices into them.
        changed: a digest of the times at which the files were written last.
    """

    names: tuple[str, ...]
    changed: str

    def describe(self, sample: int, extension: str = "") -> str:
        description = super().describe(sample, extension)
        file = self.wanted(sample, [extension])
        return f"{description} ({self.names[file[0][0]]})" if file else description

    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        try:
            return {
                extension: (Path(self.name) / self.names[place]).read_bytes()
                for place, _, extension in self.wanted(sample, extensions)
            }
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _files(folder: Path, name: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield the names of all files in a folder, and in those below it and linked from it, but for links to what is above."""
    state = folder.stat()
    if (place := (state.st_dev, state.st_ino)) not in above:
        for entry in os.scandir(folder):
            if entry.is_dir():
                yield from _files(Path(entry.path), f"{name}{entry.name}/", (*above, place))
            elif entry.is_file():
                yield f"{name}{entry.name}"


def index_folder(name: str) -> FolderIndex:
    """Index a folder. The files of a sample lie in one folder; samples are in the order of their names.

    Raises:
        UserError: if a folder in it cannot be read.
    """
    path = Path(name)
    try:
        names = sorted(_files(path))
    except OSError as error:
        raise UserError(f"{error.filename or name} cannot be read: {error.strerror}") from error
    names.sort(key=lambda member: sample_of(member)[0])  # `a.b/x` between `a.png` and `a.txt` would part them
    states = [(path / member).stat() for member in names]
    members = Members.collect(
        name, ((member, k, state.st_size) for k, (member, state) in enumerate(zip(names, states, strict=True)))
    )
    changed = hashlib.blake2b(str([state.st_mtime_ns for state in states]).encode(), digest_size=8).hexdigest()
    arrays = (members.keys, members.extensions, members.digest, members.places, members.sizes, tuple(names), changed)
    return FolderIndex(name, *arrays, notes=members.notes)
