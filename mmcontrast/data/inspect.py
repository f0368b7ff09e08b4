"""`mmcontrast data inspect`: shows the contents of shards, as tables and as a page to look at and listen to."""

import html
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmcontrast.data.dataset import MAX_MEMBER_BYTES
from mmcontrast.data.ids import id_of, read_json
from mmcontrast.data.index import open_shards
from mmcontrast.data.page import media, page, svg
from mmcontrast.data.shard import ShardIndex
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, TextModality, VectorModality
from mmcontrast.modalities.audio import UNKNOWN, open_sound
from mmcontrast.modalities.image import FORMATS
from mmcontrast.modalities.parts import check_parts
from mmcontrast.text_files import lines_of

MEASURED, SHOWN = 2000, 24  # samples, evenly spread over the shards: those that are measured, and shown on the page
ALPHA = "alpha"  # a measure that is counted, and has no quantiles
Measures = dict[tuple[str, str], list[float]]  # of (member, measure): its values


def inspect_shards(patterns: Sequence[str], to: Path | None = None) -> Iterator[Table | str]:
    """Yield tables and lines for the console, and write a page.

    Args:
        to: where a page with samples is written.

    Raises:
        UserError: for a damaged shard.
    """
    shards = open_shards(patterns, progress=True)
    samples, extensions = sum(map(len, shards)), sorted({e for shard in shards for e in shard.extensions})
    if not samples:
        raise UserError(f"{', '.join(patterns)}: no sample in {len(shards)} shards")
    sizes = {e: np.concatenate([shard.sizes_of(e) for shard in shards if e in shard.extensions]) for e in extensions}
    sizes = {extension: present[present >= 0] for extension, present in sizes.items()}
    yield f"{len(shards)} shards, {samples} samples, {sum(int(present.sum()) for present in sizes.values()) / 2**20:.0f} MiB"
    members = Table("member", "samples", "of all", "median bytes", "largest")
    for extension, present in sizes.items():
        if len(present):
            share, median = f"{len(present) / samples:.1%}", f"{np.median(present):.0f}"
            members.add_row(f".{extension}", str(len(present)), share, median, str(present.max()))
    yield members
    yield from (f"{shard.name}: {note}" for shard in shards for note in shard.notes)
    with_fields = {e for e in extensions if e.rpartition(".")[2] in {*MEASURES, *VectorModality.extensions}}
    lacking = samples
    for shard in shards:
        lacking -= int(sum((shard.has(e) for e in with_fields & set(shard.extensions)), np.zeros(len(shard), dtype=bool)).sum())
    if lacking:
        yield f"{lacking} samples have no picture, text, sound or vector, by the names of their members"

    chosen = _spread(shards, MEASURED)
    measures, groups, faults = _measure(chosen, extensions)
    alphas = [alpha for member, measure in list(measures) if measure == ALPHA for alpha in measures.pop((member, measure))]
    if measures:
        yield f"of {len(chosen)} samples:"
        yield _quantiles(measures)
    if any(alphas):
        yield f"{sum(map(int, alphas))} of {len(alphas)} pictures have alpha: `background` is the colour under it"
    if groups:
        yield f"{len(groups)} groups in them; the largest has {max(groups.values())}"
    if faults:
        yield f"{faults} members cannot be read: `mmcontrast data verify` says which and why"
    if to:
        title = f"{samples} samples: {', '.join(patterns)}"
        cards = "".join(_card(shard, row) for shard, row in _spread(shards, SHOWN))
        sections = [_histograms(measures), f'<h2>Samples</h2><div class="cards">{cards}</div>']
        to.write_text(page(title, sections), encoding="utf-8", errors="replace")
        yield f"page: {to}"


def _spread(shards: Sequence[ShardIndex], number: int) -> list[tuple[ShardIndex, int]]:
    """Return so many samples, evenly spread, or all, as (shard, row)."""
    ends = np.cumsum([len(shard) for shard in shards])
    positions = np.unique(np.linspace(0, ends[-1] - 1, min(number, int(ends[-1]))).astype(np.int64))
    numbers = np.searchsorted(ends, positions, side="right")
    return [(shards[k], int(position - ends[k] + len(shards[k]))) for k, position in zip(numbers, positions, strict=True)]


def _measure(chosen: Sequence[tuple[ShardIndex, int]], extensions: Sequence[str]) -> tuple[Measures, Counter[int], int]:
    """Return (lengths, durations and sides; samples of each group; members that could not be read)."""
    measures: Measures = defaultdict(list)
    groups: Counter[int] = Counter()
    faults = 0
    for shard, row in track(chosen, "reading samples", console=Console(stderr=True), transient=True):
        for extension in extensions:
            measure = MEASURES.get(extension.rpartition(".")[2])
            if (not measure and extension != "json") or not 0 <= shard.size(row, extension) <= MAX_MEMBER_BYTES:
                continue
            try:
                data = shard.read(row, [extension]).get(extension)
                if data is None:  # a list of nothing
                    continue
                if extension == "json":
                    group_id = read_json(data).get("group_id")
                    groups.update([id_of("group_id", group_id, 0)] if group_id is not None else [])
                elif measure:
                    for name, value in measure(data).items():
                        measures[f".{extension}", name].append(value)
            except (OSError, SyntaxError, ValueError, TypeError, RuntimeError, DecodeError):
                faults += 1
    return measures, groups, faults


def _measure_text(data: bytes) -> dict[str, float]:
    text = data.decode("utf-8")
    return {"words": len(text.split()), "lines": len(lines_of(text.strip()))}


def _measure_picture(data: bytes) -> dict[str, float]:
    check_parts(data)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # its header alone
        return {"width": image.width, "height": image.height, ALPHA: image.has_transparency_data}


def _measure_sound(data: bytes) -> dict[str, float]:
    with open_sound(data) as file:
        seconds = {"seconds": file.frames / file.samplerate} if file.frames < UNKNOWN else {}
        return seconds | {"Hz": file.samplerate}


MEASURES: dict[str, Callable[[bytes], dict[str, float]]] = {
    **dict.fromkeys(TextModality.extensions, _measure_text),
    **dict.fromkeys(ImageModality.extensions, _measure_picture),
    **dict.fromkeys(AudioModality.extensions, _measure_sound),
}


def _quantiles(measures: Measures) -> Table:
    table = Table("member", "", "least", "5 %", "median", "95 %", "most")
    for (member, measure), values in measures.items():
        cells = np.quantile(values, (0, 0.05, 0.5, 0.95, 1))
        table.add_row(member, measure, *(f"{cell:.6g}" for cell in cells))
    return table


def _histograms(measures: Measures) -> str:
    """Draw the measures that differ between samples."""
    from matplotlib.figure import Figure

    shown = [(name, values) for name, values in measures.items() if min(values) < max(values)]
    if not shown:
        return ""
    figure = Figure(figsize=(11, 2.2 * -(-len(shown) // 4)), layout="constrained")
    axes = list(figure.subplots(-(-len(shown) // 4), 4, squeeze=False).flat)
    for axis, ((member, measure), values) in zip(axes, shown, strict=False):
        axis.hist(values, bins=30)
        axis.set_title(f"{member}: {measure}", fontsize=10)
        axis.tick_params(labelsize=8)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return svg(figure)


def _card(shard: ShardIndex, row: int) -> str:
    """Show a sample: first the members that can be seen and heard."""
    parts = []
    for extension in sorted(shard.extensions, key=lambda e: (e == "json", e)):
        size = shard.size(row, extension)
        if not 0 <= size <= MAX_MEMBER_BYTES:
            continue
        name = extension.rpartition(".")[2]
        try:
            data = shard.read(row, [extension]).get(extension) if name in MEASURES or extension == "json" else b""
        except (ValueError, DecodeError) as error:
            data = str(error).encode()
        shown = media(data) if data else f"{size} bytes"
        parts.append(f"<p><small>.{html.escape(extension)}</small> {shown}</p>")
    return f'<div class="card"><small>{html.escape(shard.keys[row])}</small>{"".join(parts)}</div>'
