"""Defines the `mmcontrast` command. Each command parses, builds, runs; mistakes are one line and exit code 2."""

import ctypes
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import mmcontrast.blend.commands as blend_commands
import mmcontrast.curation.commands as curation_commands
import mmcontrast.curation.table_commands as table_commands
import mmcontrast.export.commands as export_commands
import mmcontrast.search.commands as search_commands
from mmcontrast import data_commands, slurm_commands, train_commands
from mmcontrast.arguments import (
    Checkpoint,
    ConfigFile,
    Device,
    Files,
    Keys,
    ModelName,
    Overrides,
    Precision,
    Pretrained,
    Select,
    TrustCode,
    Width,
)
from mmcontrast.errors import EveryRankError, UserError, leave_exit_code
from mmcontrast.train_commands import CommandWithHints

app = typer.Typer(
    name="mmcontrast", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Pretrain, evaluate and fine-tune multimodal contrastive models. Start with: [bold]mmcontrast train"
    " configs/quickstart.yaml[/]", rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 a plan that does not fit or a bad finding of doctor, 2 invalid input, 3 stopped on a"
    " non-finite loss, 4 stalled, 5 another rank ended, 75 preempted with a saved checkpoint (requeue it), 130 interrupted.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Build and look into webdataset shards.")
app.add_typer(data_app, name="data")
console = Console(stderr=True, soft_wrap=True)
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h


def command(group: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that makes a command of a function; a user's mistakes end it with one line instead of a traceback."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except UserError as error:
                leave_exit_code(error.exit_code)
                if os.environ.get("RANK", "0") == "0" or not isinstance(error, EveryRankError):
                    console.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
                raise typer.Exit(error.exit_code) from None
            except KeyboardInterrupt:
                console.print("interrupted; a training run continues from its last checkpoint with --resume")
                raise typer.Exit(130) from None

        return group.command(name, cls=CommandWithHints)(run)

    return decorate


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))


command(app, "train")(train_commands.train)
command(app, "finetune")(train_commands.finetune)


@command(app, "evaluate")
def evaluate(
    model: ModelName,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="of the suite's options: scoring=csls 'splits.mine=pairs.csv' resamples=0")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="a YAML file, as in eval/, or a folder in CLIP_benchmark's layout; default: the run's own"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results; default: RUN, or evaluations/ there or here")] = None,
    checkpoint: Checkpoint = "last",
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = "fp32",
    cache: Annotated[bool, typer.Option(help="keep embeddings, and read those of the same model and data")] = True,
    trust_code: TrustCode = False,
) -> None:
    """Evaluate a model: writes results.json and report.html, and prints the table.

    A run has an evaluation of its own; for other models, and other data, name a suite. docs/evaluation.md. On several GPUs:
    torchrun --nproc-per-node 8 -m mmcontrast evaluate MODEL. An embedding table may stand in MODEL's place: retrieval of every
    field by every other.
    """
    from mmcontrast.evaluation import results_table
    from mmcontrast.suites import evaluate_table, is_table, open_suite, run_suite

    if is_table(model):
        results, folder = evaluate_table(Path(model), suite, overrides or (), out, device)
    else:
        opened_suite = open_suite(model, suite, overrides or (), out, checkpoint, pretrained)
        folder = opened_suite.out
        results = run_suite(
            model, opened_suite, checkpoint=checkpoint, pretrained=pretrained, device=device, precision=precision,
            cached=cache, trust_code=trust_code,
        )  # fmt: skip
    if results.values:
        console.print(results_table(results))
        console.print(f"results: {folder / 'results.json'}\npage:    {folder / 'report.html'}", highlight=False)


@command(app, "compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, or files like their results.json", metavar="RUN…")],
    match: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="parts of results' names: recall_at_1, 'val/*/top1'")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="draw them: a file .png, .svg or .pdf")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with the picture and the table")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="print all results, not the first recall and accuracies alone")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print them as JSON")] = False,
) -> None:
    """Show results of runs side by side, with their intervals: the best is bold; ▲ and ▼: better and worse than the first run,
    outside both intervals."""
    from mmcontrast.evaluation.compare import compare as compare_runs
    from mmcontrast.evaluation.compare import comparison_table
    from mmcontrast.evaluation.compare_figure import write_page, write_picture
    from mmcontrast.strict_json import dumps

    comparison = compare_runs(runs, match)
    if png:
        write_picture(comparison, png)
    if html:
        write_page(comparison, html)
    if as_json:
        print(dumps(comparison.to_json(), indent=1))
    else:
        shown = comparison if everything or match else comparison.headline()
        Console(width=None if sys.stdout.isatty() else 1000).print(comparison_table(shown), highlight=False)
        if shown is not comparison:
            counts = f"{len(shown.names)} of {len(comparison.names)}"
            console.print(f"{counts} results: --all prints the others too", highlight=False)
    for warning in comparison.warnings():
        console.print(f"[bold red]warning:[/] {_escape(warning)}; do not compare", highlight=False)


@command(app, "embed")
def embed(
    model: ModelName,
    data: Annotated[str, typer.Argument(help="shards: a path, a glob, or a brace range", metavar="DATA")],
    out: Annotated[Path, typer.Argument(help="a folder for the table", metavar="OUT")],
    checkpoint: Checkpoint = "last",
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, help="samples that go through the model at a time")] = 256,
    num_workers: Annotated[int, typer.Option(min=0, help="decoding processes")] = 0,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="the I-th of N slices alone: many processes, one table")
    ] = None,
    slice_rows: Annotated[
        int | None, typer.Option(min=1, help="samples of a slice: what a kill may lose; default: 50000")
    ] = None,
    keys: Keys = None,
    files: Files = None,
    select: Select = None,
    trust_code: TrustCode = False,
    width: Width = None,
) -> None:
    """Embed every sample of DATA with a trained run, or a model of open_clip, transformers or timm. docs/tables.md

    OUT gets part-*.safetensors (one tensor a field), part-*.parquet (key, sample_id, group_id, metadata) and, when it is
    complete, manifest.json. Killed and started again, it goes on. On several GPUs: torchrun --nproc-per-node 8 -m mmcontrast
    embed MODEL DATA OUT
    """
    import json

    from mmcontrast.data import ShardOptions, read_keys
    from mmcontrast.embedding_job import embed_shards
    from mmcontrast.evaluation import TableSlice

    was_complete = (out / "manifest.json").exists()
    complete = embed_shards(
        model, ShardOptions(shards=data, keys=read_keys(keys or ()), files=files, select=select), out,
        part=TableSlice.parse(out, part) if part else None,
        checkpoint=checkpoint, pretrained=pretrained,
        device=device, precision=precision, batch_size=batch_size, num_workers=num_workers, slice_rows=slice_rows,
        trust_code=trust_code, width=width,
    )  # fmt: skip
    if complete:
        table = json.loads((out / "manifest.json").read_text())
        console.print(f"{out}: {table['rows']} samples, fields {', '.join(table['fields'])}", highlight=False)
        if was_complete:
            console.print("it was complete: nothing was embedded; to embed again, remove it", highlight=False)
    elif part:
        console.print(f"slice {part} of {out}", highlight=False)


command(app, "submit")(slurm_commands.submit)
command(app, "submit-embed")(slurm_commands.submit_embed)


@command(app, "config")
def show_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print a config in full, with overrides applied and every default filled in. Reports the errors that
    `train` would report, except those that need the model or the data."""
    from mmcontrast.config import load_config
    from mmcontrast.run_checks import check_components_ahead

    loaded = load_config(config, overrides or ())
    check_components_ahead(loaded)
    print(loaded.to_yaml(), end="")


@command(app, "doctor")
def doctor(
    config: Annotated[Path | None, typer.Argument(help="look also at what this config needs", metavar="[CONFIG]")] = None,
    overrides: Overrides = None,
    rate: Annotated[float | None, typer.Option(help="samples a second of its training: how many workers feed it")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write what was found to this file")] = None,
) -> None:
    """Is this machine ready? Packages, GPUs, a real all-reduce, speeds, limits, disks; and does it fit a config?

    A row for each check, with what to do about it. Exit code 1 if anything is bad. Nothing is trained.
    """
    from dataclasses import asdict

    from mmcontrast.doctor import BAD, examine, table_of
    from mmcontrast.strict_json import dumps

    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise UserError(f"--rate {rate}: samples a second, more than 0")
    if json_file and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: no such folder")
    with console.status("looking at the machine"):
        checks = list(examine(config, overrides or (), rate))
    console.print(table_of(checks))
    if json_file:
        json_file.write_text(dumps([asdict(check) for check in checks], indent=1))
    if any(check.state == BAD for check in checks):
        raise typer.Exit(1)


@command(app, "plan")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    devices: Annotated[int | None, typer.Option(min=1, help="GPUs that share the batch; default: 1, or 8 a node")] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of each; default: the GPU's here, else 80")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="nodes over which the devices are divided evenly")] = 1,
    link: Annotated[str, typer.Option(metavar="GB/s[,us]", help="between nodes, of a GPU, one direction")] = "50,5",
    within: Annotated[str, typer.Option(metavar="GB/s[,us]", help="within a node, of a GPU, one direction")] = "450,2",
    gpu: Annotated[str | None, typer.Option(help="A100, A800, H100, …; default: the one here, else H100")] = None,
    mfu: Annotated[
        float | None, typer.Option(help="share of its peak that the towers reach; default: 0.4, from H100 on 0.2")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Say whether a config's batch fits, and what it costs: parameters, FLOPs, memory, the time of a step; computed, with no
    GPU, data or weights.

    Exit code 1 if it does not fit.
    """
    import logging

    from mmcontrast.config import load_config
    from mmcontrast.plan import GIB, plan_run, plan_table
    from mmcontrast.scaling import Cluster, link_of
    from mmcontrast.strict_json import dumps

    if memory is not None and not math.isfinite(memory):
        raise UserError(f"--memory {memory}: GiB of a device")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: a share, above 0 and at most 1")
    cluster = Cluster(nodes, link_of(link, "--link"), link_of(within, "--within"), gpu, mfu)
    devices = devices or (8 * nodes if nodes > 1 else 1)
    logging.disable(logging.WARNING)  # open_clip warns of random weights, which are meant
    try:
        run_plan = plan_run(load_config(config, overrides or ()), devices, round(memory * GIB) if memory else None, cluster)
    finally:
        logging.disable(logging.NOTSET)
    if as_json:
        print(dumps(run_plan.to_json(), indent=1))
    else:
        Console(soft_wrap=True).print(plan_table(run_plan), highlight=False)
    if not run_plan.fits:
        raise typer.Exit(1)


for name in ("index", "search", "serve"):
    command(app, name)(getattr(search_commands, name))
command(app, "export")(export_commands.export)
command(app, "blend")(blend_commands.blend)
for name in ("build", "index", "inspect", "verify"):
    command(data_app, name)(getattr(data_commands, name))
for name in ("balance", "dedup", "write"):
    command(data_app, name)(getattr(curation_commands, name))
command(data_app, "filter")(curation_commands.filter_shards)
for name in ("table", "mine", "score", "cluster", "dedup-near"):
    command(data_app, name)(getattr(table_commands, name.replace("-", "_")))


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of giving it back: on a CPU the first touch of new memory takes longer than
    most of the work on a batch in it. Does nothing where that library is not glibc."""
    with suppress(AttributeError, OSError):
        for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)


def main() -> None:
    # on a CPU the threads of torch share the cores with data workers: spinning while they wait would slow both
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    app()
