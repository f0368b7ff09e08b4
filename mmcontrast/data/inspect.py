"""`mmcontrast data inspect`: what shards hold."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from rich.progress import track
from rich.table import Table

from mmcontrast.data.index import ShardIndex, expand_shards, index_shard
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, Modality, TextModality

DECODERS: tuple[Modality, ...] = (ImageModality(size=1), TextModality(), AudioModality())


def inspect_shards(patterns: Sequence[str], decode: bool) -> Iterator[Table | str]:
    """Tables and lines for the console.

    Raises:
        UserError: for a damaged shard and, if `decode`, once all were tried, for members that cannot be decoded.
    """
    shards = [index_shard(path) for path in expand_shards(patterns)]
    samples = sum(map(len, shards))
    yield f"{len(shards)} shards, {samples} samples, {sum(s.path.stat().st_size for s in shards) / 2**20:.0f} MiB"
    table = Table("member", "samples", "of all", "median bytes", "largest")
    sizes: dict[str, list[np.ndarray]] = {}
    for shard in shards:
        for column, extension in enumerate(shard.extensions):
            column_sizes = shard.sizes[:, column]
            sizes.setdefault(extension, []).append(column_sizes[column_sizes >= 0])
    for extension, parts in sorted(sizes.items()):
        every = np.concatenate(parts)
        table.add_row(
            f".{extension}", str(len(every)), f"{len(every) / samples:.1%}", f"{np.median(every):.0f}", str(every.max())
        )
    yield table
    if "json" in sizes:
        groups = Counter(
            json.loads(shard.read(row, ["json"])["json"]).get("group_id")
            for shard, row in _rows(shards)
            if shard.sizes[row, shard.extensions.index("json")] >= 0
        )
        yield f"{len(groups)} groups; the largest has {max(groups.values())} samples"
    first = shards[0].read(0, ["txt", "json"])
    yield f"first sample {shards[0].keys[0]}: {b' '.join(first.values()).decode('utf-8', 'replace')[:400]}"
    if decode:
        bad = [error for shard, row in track(list(_rows(shards)), "decoding", transient=True) for error in _errors(shard, row)]
        yield from bad
        if bad:
            raise UserError(f"{len(bad)} members cannot be decoded: remove or repair them")
        yield "every picture, text and sound can be decoded"


def _rows(shards: Sequence[ShardIndex]) -> Iterator[tuple[ShardIndex, int]]:
    return ((shard, row) for shard in shards for row in range(len(shard)))


def _errors(shard: ShardIndex, row: int) -> Iterator[str]:
    for modality in DECODERS:
        for extension, data in shard.read(row, modality.extensions).items():
            try:
                modality.decode(data)
            except DecodeError as error:
                yield f"{shard.path}, sample {shard.keys[row]!r}, member .{extension}: {error}"
