"""The `mmcontrast` command. Each command parses, builds, runs; mistakes are one line and exit code 2."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmcontrast.errors import EveryRankError, UserError

app = typer.Typer(
    name="mmcontrast", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Pretrain, evaluate and fine-tune multimodal contrastive models. Start with: [bold]mmcontrast train"
    " configs/quickstart.yaml[/]", rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 a plan that does not fit, 2 a mistake in what was given, 3 stopped on a non-finite loss, 4"
    " stalled, 5 another rank ended, 75 asked to end and saved (requeue it), 130 interrupted.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Build and look into webdataset shards.")
app.add_typer(data_app, name="data")
console = Console(stderr=True, soft_wrap=True)
SHOWN_FAULTS = 20
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted overrides: train.steps=50 objective=siglip")]
ConfigFile = Annotated[Path, typer.Argument(help="a YAML file, as in configs/", metavar="CONFIG")]
RunFolder = Annotated[Path, typer.Argument(help="a run's folder: runs/NAME", metavar="RUN")]
Checkpoint = Annotated[str, typer.Option(help="last, best, or a step's number")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if there is one")]


def command(group: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose user's mistakes end in one line instead of a traceback."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except UserError as error:
                if os.environ.get("RANK", "0") == "0" or not isinstance(error, EveryRankError):
                    console.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
                raise typer.Exit(error.exit_code) from None
            except KeyboardInterrupt:
                console.print("interrupted; a training run continues from its last checkpoint with --resume")
                raise typer.Exit(130) from None

        return group.command(name)(run)

    return decorate


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))


@command(app, "train")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run of this name from its last checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="remove the run of this name, then start it")] = False,
) -> None:
    """Train a model, evaluate it, and write its page.

    The run's folder is run.dir/run.name; it holds config.yaml, checkpoints/, metrics.jsonl, tensorboard/, results.json
    and report.html. On several GPUs: torchrun --nproc-per-node 8 -m mmcontrast train CONFIG
    """
    from mmcontrast.config import load_config
    from mmcontrast.runs import check_folder, lock_folder, make_job, prepare_folder
    from mmcontrast.training.distributed import join_processes
    from mmcontrast.training.loop import train as run_training

    loaded = load_config(config, overrides or ())
    state = join_processes()
    if state.is_main_process:
        check_folder(loaded, resume, overwrite)
        console.print(f"preparing [bold]{loaded.run.name}[/]: model and data", highlight=False)
    job = make_job(loaded)
    if state.is_main_process:
        lock = lock_folder(loaded)
        prepare_folder(loaded, overwrite)
    state.wait_for_everyone()
    results = run_training(job, resume)
    if state.is_main_process and results:
        console.print(f"results: {job.folder / 'results.json'}\npage:    {job.folder / 'report.html'}", highlight=False)
        lock.close()


@command(app, "evaluate")
def evaluate(run: RunFolder, checkpoint: Checkpoint = "last", device: Device = None) -> None:
    """Evaluate a trained run again: writes its results.json and report.html, and prints the table."""
    from mmcontrast.runs import evaluate_run

    console.print(evaluate_run(run, checkpoint, device))


@command(app, "embed")
def embed(
    run: RunFolder,
    data: Annotated[str, typer.Argument(help="shards: a path, a glob, or a brace range", metavar="DATA")],
    out: Annotated[Path, typer.Argument(help="a new folder for the table", metavar="OUT")],
    checkpoint: Checkpoint = "last",
    device: Device = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    num_workers: Annotated[int, typer.Option(min=0, help="decoding processes")] = 0,
) -> None:
    """Embed every sample of DATA with a trained run.

    OUT gets part-*.safetensors (one tensor a field), part-*.parquet (key, sample_id, group_id, metadata) and, when it is
    complete, manifest.json.
    """
    from mmcontrast.runs import embed_shards

    table = embed_shards(run, data, out, checkpoint, device, batch_size, num_workers)
    console.print(f"{len(table)} samples, fields {', '.join(table.fields)}: {out}", highlight=False)


@command(app, "config")
def show_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print a config in full, with overrides applied and every default filled in; fails as `train` would."""
    from mmcontrast.config import load_config
    from mmcontrast.runs import check_components

    loaded = load_config(config, overrides or ())
    check_components(loaded)
    print(loaded.to_yaml(), end="")


@command(app, "plan")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, help="GPUs that share the batch")] = 1,
    memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of each; default: the GPU's here, else 80")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Say whether a config's batch fits, and what it costs: parameters, FLOPs, memory; computed, with no GPU, data or weights.

    Exit code 1 if it does not fit.
    """
    import json
    import logging

    from mmcontrast.config import load_config
    from mmcontrast.plan import GIB, plan_run, plan_table

    logging.disable(logging.WARNING)  # open_clip warns of random weights, which are meant
    found = plan_run(load_config(config, overrides or ()), devices, round(memory * GIB) if memory else None)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        Console(soft_wrap=True).print(plan_table(found), highlight=False)
    if not found.fits:
        raise typer.Exit(1)


@command(data_app, "build")
def data_build(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="another folder than the config's")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="build again what is there")] = False,
) -> None:
    """Build a corpus of webdataset shards, as data_pipelines/glyphs/glyphs.yaml describes one.

    A corpus that is complete and of the same description is left as it is.
    """
    from mmcontrast.data.build import build_corpus

    console.print(build_corpus(config, out, workers, overwrite), highlight=False)


Shards = Annotated[list[str], typer.Argument(help="tars (by URL too), folders, tables: globs, brace ranges", metavar="SHARDS")]


@command(data_app, "index")
def data_index(shards: Shards) -> None:
    """Scan shards, and keep their indexes for the next time they are opened.

    Training does so by itself; do it beforehand where the scan takes long. Exit code 2 at the first damaged shard.
    """
    from mmcontrast.data import open_shards
    from mmcontrast.data.range_cache import cache_root

    found = open_shards(shards, progress=True)
    console.print(f"{len(found)} shards, {sum(map(len, found))} samples; indexes in {cache_root()}", highlight=False)


@command(data_app, "inspect")
def data_inspect(
    shards: Shards,
    page: Annotated[Path | None, typer.Option(help="write a page with samples to look at and listen to")] = None,
) -> None:
    """Show what shards hold: samples, members with their sizes, lengths of texts, durations, sides of pictures, groups."""
    from mmcontrast.data.inspect import inspect_shards

    for part in inspect_shards(shards, page):
        console.print(part, highlight=False)


@command(data_app, "verify")
def data_verify(
    shards: Shards,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the whole report to this file")] = None,
) -> None:
    """Decode every member of every sample, and list what is wrong. Exit code 2 if anything is.

    Finds truncated and overwritten shards, samples whose members are not adjacent, pictures, sounds and texts that cannot be
    decoded or are beyond a limit, and wrong json.
    """
    import json

    from mmcontrast.data.verify import Fault, verify_shards

    report = verify_shards(shards, workers)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1))
    faults = [str(Fault(**fault)) for fault in report["faults"]]
    for fault in faults[:SHOWN_FAULTS]:
        console.print(fault, highlight=False, markup=False)
    if len(faults) > SHOWN_FAULTS:
        console.print(f"… and {len(faults) - SHOWN_FAULTS} more: --json FILE has them all")
    done = f"{report['shards']} shards, {report['samples']} samples, {report['members']} members"
    if faults:
        raise UserError(f"{len(faults)} faults in {done}")
    console.print(f"{done}: all is well", highlight=False)


def keep_freed_memory() -> None:
    """Lets the C library reuse what is freed instead of giving it back: on a CPU the first touch of new memory takes longer
    than most of what is done with a batch in it. Does nothing where that library is not glibc."""
    with suppress(AttributeError, OSError):
        for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)


def main() -> None:
    # on a CPU the threads of torch share the cores with data workers: spinning while they wait would slow both
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    sys.path.insert(0, os.getcwd())  # `type: my_lab.losses:MyObjective` is found beside the user, as `python -m` finds it
    app()
