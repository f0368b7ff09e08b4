"""A folder of files, `a.jpg` beside `a.txt`, read like a shard."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmcontrast.data.shard import MemberIndex, Members, sample_of
from mmcontrast.errors import UserError


@dataclass(frozen=True)
class FolderIndex(MemberIndex):
    """`places` are those in `names`, which are relative to the folder. Indexed each time it is opened."""

    names: tuple[str, ...]

    def describe(self, sample: int, extension: str = "") -> str:
        words = super().describe(sample, extension)
        named = self.wanted(sample, [extension])
        return f"{words} ({self.names[named[0][0]]})" if named else words

    def read(self, sample: int, extensions: Iterable[str]) -> dict[str, bytes]:
        try:
            return {
                extension: (Path(self.name) / self.names[place]).read_bytes()
                for place, _, extension in self.wanted(sample, extensions)
            }
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def index_folder(name: str) -> FolderIndex:
    """Files that are one sample lie in one folder; their order is that of their names."""
    path = Path(name)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    names.sort(key=lambda member: sample_of(member)[0])  # `a.b/x` between `a.png` and `a.txt` would part them
    found = Members.collect(name, ((member, k, (path / member).stat().st_size) for k, member in enumerate(names)))
    parts = (found.keys, found.extensions, found.digest, found.places, found.sizes, tuple(names))
    return FolderIndex(name, *parts, notes=found.notes)
