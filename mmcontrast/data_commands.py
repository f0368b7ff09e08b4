"""The commands of data: build a corpus of shards, index, look into, and verify shards."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmcontrast.errors import UserError

console = Console(stderr=True, soft_wrap=True)
SHOWN_FAULTS = 20
CorpusFile = Annotated[Path, typer.Argument(help="a YAML file, as in data_pipelines/", metavar="CORPUS.yaml")]
Shards = Annotated[list[str], typer.Argument(help="tars (by URL too), folders, tables: globs, brace ranges", metavar="SHARDS")]


def build(
    config: CorpusFile,
    out: Annotated[Path | None, typer.Option(help="another folder than the config's")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="build again what is there")] = False,
) -> None:
    """Build a corpus of webdataset shards, as data_pipelines/glyphs/glyphs.yaml describes one.

    A corpus that is complete and of the same description is left as it is.
    """
    from mmcontrast.data.build import build_corpus

    console.print(build_corpus(config, out, workers, overwrite), highlight=False)


def index(shards: Shards) -> None:
    """Scan shards, and keep their indexes for the next time they are opened.

    Training does so by itself; do it beforehand where the scan takes long. Exit code 2 at the first damaged shard.
    """
    from mmcontrast.data import open_shards
    from mmcontrast.data.range_cache import cache_root

    found = open_shards(shards, progress=True)
    console.print(f"{len(found)} shards, {sum(map(len, found))} samples; indexes in {cache_root()}", highlight=False)


def inspect(
    shards: Shards,
    page: Annotated[Path | None, typer.Option(help="write a page with samples to look at and listen to")] = None,
) -> None:
    """Show what shards hold: samples, members with their sizes, lengths of texts, durations, sides of pictures, groups."""
    from mmcontrast.data.inspect import inspect_shards

    for part in inspect_shards(shards, page):
        console.print(part, highlight=False)


def verify(
    shards: Shards,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the whole report to this file")] = None,
) -> None:
    """Decode every member of every sample, and list what is wrong. Exit code 2 if anything is.

    Finds truncated and overwritten shards, samples whose members are not adjacent, pictures, sounds and texts that cannot be
    decoded or are beyond a limit, and wrong json.
    """
    from mmcontrast.data.verify import Fault, verify_shards
    from mmcontrast.strict_json import dumps

    report = verify_shards(shards, workers)
    if json_file:
        json_file.write_text(dumps(report, indent=1))
    faults = [str(Fault(**fault)) for fault in report["faults"]]
    for fault in faults[:SHOWN_FAULTS]:
        console.print(fault, highlight=False, markup=False)
    if len(faults) > SHOWN_FAULTS:
        console.print(f"… and {len(faults) - SHOWN_FAULTS} more: --json FILE has them all")
    done = f"{report['shards']} shards, {report['samples']} samples, {report['members']} members"
    if faults:
        raise UserError(f"{len(faults)} faults in {done}")
    console.print(f"{done}: all is well", highlight=False)
