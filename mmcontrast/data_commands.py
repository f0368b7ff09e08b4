"""Defines the commands of data: build a corpus of shards; index, inspect and verify shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mmcontrast.arguments import Shards
from mmcontrast.errors import UserError
from mmcontrast.options import Patterns

if TYPE_CHECKING:
    from mmcontrast.data.verify import Reading

console = Console(stderr=True, soft_wrap=True)
SHOWN_FAULTS = 20
CorpusFile = Annotated[Path, typer.Argument(help="a YAML file, as in data_pipelines/", metavar="CORPUS.yaml")]


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

    indexes = open_shards(shards, progress=True)
    console.print(f"{len(indexes)} shards, {sum(map(len, indexes))} samples; indexes in {cache_root()}", highlight=False)


def inspect(
    shards: Shards,
    page: Annotated[Path | None, typer.Option(help="write a page with samples to look at and listen to")] = None,
) -> None:
    """Show what shards hold: samples, members with their sizes, lengths of texts, durations, sides of pictures, groups."""
    from mmcontrast.data.inspect import inspect_shards

    for part in inspect_shards(shards, page):
        console.print(part, highlight=False)


def verify(
    shards: Annotated[
        list[str], typer.Argument(help="tars (by URL too), folders, tables; or CONFIG.yaml, with overrides", metavar="SHARDS")
    ],
    keys: Annotated[list[str] | None, typer.Option(help="extensions or columns of a field: speech=speech_fr,speech_de")] = None,
    files: Annotated[str | None, typer.Option(help="the folder of files that tables name; default: the table's own")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the whole report to this file")] = None,
) -> None:
    """Decode every member of every sample, and list what is wrong. Exit code 2 if anything is.

    Finds truncated and overwritten shards, samples whose members are not adjacent, pictures, sounds and texts that cannot be
    decoded or are beyond a limit, wrong json, and a sample_id that repeats. Lists what was not decoded. Of a config, all
    sources and splits are read as training and evaluation read them: fields, keys, limits.
    """
    from mmcontrast.data.verify import Fault, verify_shards, verify_sources
    from mmcontrast.strict_json import dumps

    if shards[0].lower().endswith((".yaml", ".yml")):
        if keys or files:
            raise UserError(f"{shards[0]} says itself what its keys and files are: override them, as fields.image.keys=[jpg]")
        report = verify_sources(*_sources(shards[0], shards[1:]), workers)
    else:
        report = verify_shards(shards, workers, reading=_reading(keys or [], files))
    if json_file:
        json_file.write_text(dumps(report, indent=1))
    faults = [str(Fault(**fault)) for fault in report["faults"]]
    for fault in faults[:SHOWN_FAULTS]:
        console.print(fault, highlight=False, markup=False)
    if len(faults) > SHOWN_FAULTS:
        console.print(f"… and {len(faults) - SHOWN_FAULTS} more: --json FILE has them all")
    for note in report["notes"]:
        console.print(f"not decoded: {note}", highlight=False, markup=False)
    done = f"{report['shards']} shards, {report['samples']} samples, {report['members']} members"
    if faults:
        raise UserError(f"{len(faults)} faults in {done}")
    console.print(f"{done}: no faults in {'what was decoded' if report['notes'] else 'any sample'}", highlight=False)


def _reading(keys: Sequence[str], files: str | None) -> "Reading":
    """Return how shards are read with the keys of a command line.

    Raises:
        UserError: for keys that are not of the form FIELD=KEY,KEY.
    """
    from mmcontrast.data import read_keys
    from mmcontrast.data.verify import Reading
    from mmcontrast.modalities import AudioModality, ImageModality, TextModality

    kinds = {"image": ImageModality, "text": TextModality, "audio": AudioModality}
    field_keys = read_keys(keys)
    modalities = {field: kinds[field](**({"size": 224} if field == "image" else {})) for field in field_keys if field in kinds}
    return Reading(modalities, field_keys, files)


def _sources(config: str, overrides: Sequence[str]) -> "tuple[dict[str, tuple[Patterns, Reading]], list[str]]":
    """Return the sources and splits that a run reads, by name; and those whose equal sample_ids are the same sample.

    Raises:
        UserError: if the config is wrong.
    """
    from mmcontrast.config import load_config
    from mmcontrast.data import ShardOptions, StoredEmbeddings
    from mmcontrast.data.verify import Reading
    from mmcontrast.evaluation.clip_benchmark_layout import with_layouts
    from mmcontrast.options import Keys
    from mmcontrast.runs import modalities_of
    from mmcontrast.training.data import source_modalities
    from mmcontrast.training.options import StoredTeacherOptions

    run = load_config(config, overrides)
    modalities = modalities_of(run)
    keys = {field: options.keys for field, options in run.fields.items() if options.keys}
    sources: dict[str, tuple[Patterns, Reading]] = {}
    shared: list[str] = []
    stored = [teacher.stored for teacher in run.train.teachers if isinstance(teacher, StoredTeacherOptions)]
    teacher_keys: dict[str, Keys] = {f"train.teacher: {member}": [member] for members in stored for member in members.values()}
    embeddings = {name: StoredEmbeddings() for name in teacher_keys}
    train = run.data.train
    for name, source in train.items() if isinstance(train, dict) else ():
        source_fields = source_modalities(name, source, run.fields, modalities)
        select = source.select or run.data.select
        reading = Reading(source_fields | embeddings, keys | source.keys | teacher_keys, source.files, True, select)
        sources[f"data.train.{name}"] = source.shards, reading
        shared += [] if source.own_ids else [f"data.train.{name}"]
    if not isinstance(train, dict):
        sources["data.train"] = train, Reading(modalities | embeddings, keys | teacher_keys, None, True, run.data.select)
    for name, split in with_layouts(run.evaluation, "", "").splits.items():
        split_options = ShardOptions.of(split)
        if split_options.held_out and run.data.held_out:
            continue  # it is read as a part of the training data
        reading = Reading(modalities, keys | split_options.keys, split_options.files, True, split_options.select)
        sources[f"evaluation.splits.{name}"] = split_options.shards, reading
    return sources, shared
