"""`mmcontrast data inspect`: what shards hold."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from rich.table import Table

from mmcontrast.data.index import ShardIndex, open_shards


def inspect_shards(patterns: Sequence[str]) -> Iterator[Table | str]:
    """Tables and lines for the console.

    Raises:
        UserError: for a damaged shard.
    """
    shards = open_shards(patterns, progress=True)
    samples = sum(map(len, shards))
    yield f"{len(shards)} shards, {samples} samples, {sum(int(s.sizes.clip(0).sum()) for s in shards) / 2**20:.0f} MiB"
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


def _rows(shards: Sequence[ShardIndex]) -> Iterator[tuple[ShardIndex, int]]:
    return ((shard, row) for shard in shards for row in range(len(shard)))
