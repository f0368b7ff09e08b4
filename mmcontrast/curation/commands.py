"""Defines the commands that make selections: filter, dedup, balance, and write, which copies what a selection keeps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmcontrast.arguments import Shards
from mmcontrast.errors import UserError

if TYPE_CHECKING:
    from mmcontrast.curation.run_stage import Outcome

console = Console(stderr=True, soft_wrap=True)
Out = Annotated[Path, typer.Argument(help="the selection's folder", metavar="OUT")]
Select = Annotated[Path | None, typer.Option(help="a selection to go on from: what it dropped stays dropped")]
Files = Annotated[str | None, typer.Option(help="the folder of files that tables name; default: the table's own")]
Workers = Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")]
Engine = Annotated[str, typer.Option(help="pool: processes here; ray: the Ray cluster there is, or one for this command")]


def filter_shards(
    shards: Shards,
    out: Out,
    rules: Annotated[str, typer.Option(help="a YAML file of rules, or a preset: datacomp-basic, laion, cat", metavar="RULES")],
    keys: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=KEY", help="of text, image or audio: text=json:caption; may be repeated")
    ] = None,
    files: Files = None,
    select: Select = None,
    workers: Workers = None,
    engine: Engine = "pool",
) -> None:
    """Select the samples that pass rules: words, language, sides of pictures, durations, scores … docs/curation.md

    Nothing is copied: OUT gets a table of each shard that says of every sample whether it is kept, and why not, and what was
    measured; summary.json and report.html. Train with data.select=OUT. Killed and started again, it goes on.
    """
    from mmcontrast.curation.filter import Filter
    from mmcontrast.curation.rules import parse_rules, read_rules
    from mmcontrast.curation.run_stage import run_stage
    from mmcontrast.data import read_keys

    parsed = read_rules(rules)
    if keys:
        tree = parsed.model_dump(by_alias=True, exclude_unset=True)
        parsed = parse_rules({**tree, "keys": {**tree.get("keys", {}), **read_keys(keys)}}, "--keys")
    stage = Filter(parsed, files)
    _show(run_stage(stage, shards, out, select=str(select) if select else None, workers=workers, engine=engine))


def dedup(
    shards: Shards,
    out: Out,
    by: Annotated[
        list[str], typer.Option(help="image, text, audio, a member, or an entry as json:sha256; several: all of them together")
    ],
    decoded: Annotated[
        bool, typer.Option("--decoded/--bytes", help="compare pixels, or samples of sounds, instead of the files' bytes")
    ] = False,
    best: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="keep the one with the largest: json:similarity, or an earlier measure")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=KEY", help="of image, text or audio; may be repeated")
    ] = None,
    files: Files = None,
    select: Select = None,
    workers: Workers = None,
    engine: Engine = "pool",
) -> None:
    """Select one of each set of samples that are exactly the same. docs/curation.md

    The first is kept, or the best; a sample that lacks what is compared is kept. OUT is as `data filter` writes it.
    """
    from mmcontrast.curation.exact_duplicates import ExactDuplicates
    from mmcontrast.curation.looking import FIELDS
    from mmcontrast.curation.run_stage import run_stage
    from mmcontrast.data import read_keys

    field_keys = read_keys(keys or ())
    for field in field_keys:
        if field not in FIELDS or field not in by:
            raise UserError(f"--keys {field}=…: keys are of the fields image, text and audio that --by names")
    stage = ExactDuplicates(
        tuple(by), decoded, best, tuple((field, tuple(map(str, names))) for field, names in sorted(field_keys.items())), files
    )
    _show(run_stage(stage, shards, out, select=str(select) if select else None, workers=workers, engine=engine))


def write(
    shards: Shards,
    out: Annotated[Path, typer.Argument(help="a folder for the new shards", metavar="OUT")],
    select: Annotated[Path, typer.Option(help="the selection whose samples are written")],
    name: Annotated[str, typer.Option(help="of the shards: NAME-00000.tar")] = "train",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="of each but the last")] = 10_000,
    files: Files = None,
    workers: Workers = None,
    engine: Engine = "pool",
) -> None:
    """Write the samples of a selection as new shards, their members as they are, and a manifest.

    Training needs none: it reads a selection where the samples are. Killed and started again, it goes on.
    """
    from mmcontrast.data.rewriting import write_selected

    manifest = write_selected(shards, out, str(select), name, samples_per_shard, files, workers, engine)
    split = manifest["splits"][name]
    console.print(f"{out}: {split['samples']} samples in {len(split['shards'])} shards", highlight=False)


def balance(
    shards: Shards,
    out: Out,
    entries: Annotated[Path, typer.Option(help="one entry a line, or a list in JSON, as MetaCLIP's metadata", metavar="FILE")],
    limit: Annotated[float | None, typer.Option(min=1, help="texts of an entry that are kept, about")] = None,
    tail: Annotated[
        float | None, typer.Option(min=0, max=1, help="instead: the share of all matches that rare entries have")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=KEY", help="where the text is: text=json:caption; may be repeated")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    files: Files = None,
    select: Select = None,
    workers: Workers = None,
    engine: Engine = "pool",
) -> None:
    """Select texts in balance over a list of entries: of frequent ones some, of rare ones all (MetaCLIP).

    A text matches an entry that stands in it between spaces; an entry in N texts keeps each with min(1, limit / N); what
    matches none is dropped. Outputs as of `mmcontrast data filter`.
    """
    from mmcontrast.curation.balance import balance_of
    from mmcontrast.curation.looking import FIELDS
    from mmcontrast.curation.run_stage import run_stage
    from mmcontrast.data import read_keys

    field_keys = read_keys(keys or ())
    if field_keys.keys() - {"text"}:
        raise UserError(f"--keys {min(field_keys.keys() - {'text'})}=…: what is balanced is the field text")
    stage = balance_of(entries, limit, tail, seed, [str(key) for key in field_keys.get("text", FIELDS["text"])], files)
    _show(run_stage(stage, shards, out, select=str(select) if select else None, workers=workers, engine=engine))


def _show(outcome: "Outcome") -> None:
    if not outcome.complete:
        console.print(
            f"{outcome.folder}: this share is done; {outcome.missing} of {outcome.shards} shards are left to other processes",
            highlight=False,
        )
        return
    summary = outcome.summary
    if rules := summary.get("rules"):
        table = Table("rule", "removed, first of all", "would remove alone")
        for rule in rules:
            table.add_row(rule["rule"], str(rule["removed"]), str(rule["alone"]))
        console.print(table, highlight=False)
    elif summary["reasons"]:
        table = Table("reason", "samples")
        for reason, number in list(summary["reasons"].items())[:20]:
            table.add_row(reason, str(number))
        console.print(table, highlight=False)
    share = f", {summary['kept'] / summary['samples']:.1%}" if summary["samples"] else ""
    console.print(f"{outcome.folder}: {summary['kept']} of {summary['samples']} samples are kept{share}", highlight=False)
    console.print(f"page: {outcome.folder / 'report.html'}", highlight=False)
