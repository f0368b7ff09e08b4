"""Reads from one sample what rules measure: its text, the sides of its picture, the length of its sound, entries of its json.

Nothing is decoded but texts and headers.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import soundfile
from PIL import Image, UnidentifiedImageError

from mmcontrast.data.dataset import MAX_MEMBER_BYTES
from mmcontrast.data.ids import read_json
from mmcontrast.data.keys import entry_of, member_name
from mmcontrast.data.shard import ShardIndex, member_of
from mmcontrast.data.tar import TarIndex
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, Modality, TextModality
from mmcontrast.modalities.audio import BLOCK, UNKNOWN, open_sound
from mmcontrast.modalities.image import DAMAGED, FORMATS
from mmcontrast.modalities.parts import check_parts

ENTRY = "json:"
KINDS: dict[str, type[Modality]] = {"text": TextModality, "image": ImageModality, "audio": AudioModality}
FIELDS: dict[str, tuple[str, ...]] = {field: kind.extensions for field, kind in KINDS.items()}
T = TypeVar("T")


class Missing(Exception):
    """A sample lacks what a rule measures; the message names it."""


class Look:
    """One sample, each part of which is read once.

    Args:
        members: of the shard's extensions those that any rule reads, of which some may be too large.
        previous: the measures of an earlier stage.
        read: those members, if they have been read.
    """

    def __init__(
        self,
        shard: ShardIndex,
        row: int,
        members: Sequence[str],
        previous: Mapping[str, Any],
        read: dict[str, bytes] | None = None,
    ) -> None:
        self.shard, self.row, self.previous = shard, row, previous
        self.parts: dict[Any, Any] = {}
        self.bytes: dict[str, bytes] = {}
        self.error: DecodeError | None = None
        self._json: dict[str, Any] | None = None
        if read is not None:
            self.bytes = read
            return
        for name in members:
            if (size := shard.size(row, name)) > MAX_MEMBER_BYTES:
                self.error = DecodeError(f"member .{name}: {size} bytes, more than {MAX_MEMBER_BYTES}")
                members = [other for other in members if other != name]
        try:
            self.bytes = shard.read(row, members) if members else {}
        except DecodeError as error:  # of a table: a file that is not there
            self.error = error

    def once(self, name: Any, compute: Callable[[], T]) -> T:
        """Return what `compute` returns, or raise what it raises; it is called once."""
        if name not in self.parts:
            try:
                self.parts[name] = compute()
            except (DecodeError, Missing) as error:
                self.parts[name] = error
        value = self.parts[name]
        if isinstance(value, Exception):
            raise value
        return value

    def member(self, keys: Sequence[str], what: str) -> bytes:
        """Return the first of some members, or entries of the json, that the sample has.

        Raises:
            Missing: if it has none.
            DecodeError: if it cannot be read.
        """
        for key in keys:
            if key.startswith(ENTRY):
                data = member_of(value) if (value := self.entry(key)) is not None else None
            else:
                data = self.bytes.get(key)
            if data:
                return data
        if self.error:
            raise self.error
        if any(self.bytes.get(key) == b"" for key in keys):
            raise DecodeError("empty")
        raise Missing(f"no {what}")

    def metadata(self) -> dict[str, Any]:
        """Return the sample's json, empty if it has none."""
        if self._json is None:
            self._json = self.once("json", lambda: read_json(self.bytes["json"]) if "json" in self.bytes else {})
        return self._json

    def entry(self, key: str) -> Any:
        """Return the entry of the json that "json:a.b" names, None if there is none."""
        return entry_of(self.metadata(), key)

    def text(self, keys: Sequence[str]) -> str:
        """Return the text without the white space around it."""

        def read() -> str:
            try:
                text = self.member(keys, "text").decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise DecodeError("not UTF-8") from error
            if not text:
                raise DecodeError("empty")
            return text

        return self.once(("text", *keys), read)

    def sides(self, keys: Sequence[str], entries: Sequence[str] = ()) -> tuple[int, int]:
        """Return (width, height) of the picture, by its header alone, or by two entries of the json, where both exist."""

        def read() -> tuple[int, int]:
            numbers = [number_of(self.entry(name)) or 0.0 for name in entries]
            if len(numbers) == 2 and min(numbers) >= 1:
                return int(numbers[0]), int(numbers[1])
            data = self.member(keys, "picture")
            try:
                check_parts(data)
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    return image.size
            except UnidentifiedImageError as error:
                raise DecodeError(f"no {', '.join(FORMATS)}") from error
            except DAMAGED as error:
                raise DecodeError(str(error) or type(error).__name__) from error

        return self.once(("sides", *keys, *entries), read)

    def seconds(self, keys: Sequence[str]) -> float:
        """Return how long the sound is, by its header; one whose header does not say is read to its end."""

        def read() -> float:
            data = self.member(keys, "sound")
            try:
                with open_sound(data) as file:
                    frames = file.frames
                    if frames >= UNKNOWN:
                        frames = 0
                        while block := len(file.read(max(1, BLOCK // file.channels), always_2d=True)):
                            frames += block
                    return frames / file.samplerate
            except (soundfile.SoundFileError, ValueError, ZeroDivisionError) as error:
                raise DecodeError(str(getattr(error, "error_string", error))) from error

        return self.once(("seconds", *keys), read)

    def size(self, keys: Sequence[str]) -> int:
        """Return the bytes of the first of some members that the sample has: of a shard's without reading them."""
        for key in keys:
            if not key.startswith(ENTRY) and key in self.shard.extensions and (size := self.shard.size(self.row, key)) >= 0:
                return size
        return len(self.member(keys, f"member {' or '.join(keys)}"))

    def number(self, column: str) -> float:
        """Return a number of the json ("json:NAME"), of an earlier stage, or of a table's column.

        Raises:
            Missing: if there is none.
            DecodeError: for a value that is no number.
        """
        if column.startswith(ENTRY):
            value = self.entry(column)
        else:
            value = self.previous[column] if column in self.previous else self.entry(f"{ENTRY}{column}")
        if value is None or value == "":
            raise Missing(f"no {column}")
        number = number_of(value)
        if number is None:
            raise DecodeError(f"{str(value)[:40]!r} is no number")
        return number


def number_of(value: Any) -> float | None:
    """Return a finite number, also one that is a text; None of anything else, and of truth values."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        try:
            value = float(value)
        except (ValueError, OverflowError):
            return None
    return value if math.isfinite(value) else None


@cache
def decoder(field: str) -> Modality:
    """Return the modality that decodes a field's members as training does."""
    return KINDS[field](**({"size": 224} if field == "image" else {}))


def looks(shard: ShardIndex, rows: np.ndarray, members: Iterable[str], previous: Mapping[str, Sequence[Any]]) -> Iterator[Look]:
    """Yield a `Look` at each of some rows of a shard.

    Args:
        previous: columns [n] of an earlier stage's measures of these rows.
    """
    names = sorted(set(members) & set(shard.extensions))
    members_of_rows: Iterable[dict[str, bytes] | None] = [None] * len(rows)
    if names and isinstance(shard, TarIndex) and all(shard.sizes_of(name).max(initial=0) <= MAX_MEMBER_BYTES for name in names):
        members_of_rows = shard.read_many(rows, names)
    for number, (row, read) in enumerate(zip(rows.tolist(), members_of_rows, strict=True)):
        previous_measures = {name: column[number] for name, column in previous.items()} if previous else {}
        yield Look(shard, row, names, previous_measures, read)


def members_of_keys(keys: Sequence[str]) -> set[str]:
    """Return the members that keys are read from."""
    return {member_name(key) for key in keys}
