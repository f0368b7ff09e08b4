"""Commands that submit jobs to Slurm: a training run, an embedding table."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmcontrast.arguments import (
    Checkpoint,
    ConfigFile,
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
from mmcontrast.errors import UserError

console = Console(stderr=True, soft_wrap=True)
Time = Annotated[str, typer.Option("--time", metavar="HH:MM:SS", help="the job's time limit")]
Gpus = Annotated[int, typer.Option(min=0, help="0: none")]
Cpus = Annotated[int | None, typer.Option(min=1, help="of a node; default: one for each process and each of its data workers")]
Partition = Annotated[str | None, typer.Option(help="of the cluster; default: its own")]
Account = Annotated[str | None, typer.Option(help="to be charged; default: yours")]
Sbatch = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="any further option of sbatch: constraint=a100")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be submitted; write nothing")]


def submit(
    config: ConfigFile,
    time: Time,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="of the cluster")] = 1,
    gpus_per_node: Gpus = 1,
    procs_per_node: Annotated[int | None, typer.Option(min=1, help="of nodes without GPUs; default: 1")] = None,
    cpus_per_task: Cpus = None,
    partition: Partition = None,
    account: Account = None,
    sbatch: Sbatch = None,
    warn: Annotated[int, typer.Option(min=1, help="seconds before the time limit: save, and queue again")] = 120,
    evaluate_after: Annotated[bool, typer.Option("--evaluate-after", help="by a second job, after the last step")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue a run that has another config")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train as a job of Slurm, which is queued again until it is complete. docs/slurm.md says how.

    run.dir/run.name.slurm/ gets the config, the script, the version of the code and the log. A run that exists with this
    config is continued.
    """
    from mmcontrast.config import load_config
    from mmcontrast.slurm import Resources, training_launch

    if gpus_per_node and procs_per_node:
        raise UserError("--procs-per-node: a process for each GPU; it is for --gpus-per-node 0")
    processes = gpus_per_node or procs_per_node or 1
    cpus = cpus_per_task or processes * (1 + load_config(config, overrides or ()).data.num_workers)
    resources = Resources(time, nodes, gpus_per_node, cpus, partition, account, sbatch or ())
    launch = training_launch(config, overrides or (), resources, processes, warn, evaluate_after, resume)
    if dry_run:
        print("\n".join(text for name, text in launch.files.items() if name.endswith(".sbatch")), end="")
        return
    jobs = launch.submit(*(["train", "evaluate"] if evaluate_after else ["train"]))
    console.print(f"submitted: job {', then '.join(jobs)}\nin:        {launch.folder}", highlight=False)


def submit_embed(
    model: ModelName,
    data: Annotated[str, typer.Argument(help="shards: a path, a glob, or a brace range", metavar="DATA")],
    out: Annotated[Path, typer.Argument(help="the table's folder", metavar="OUT")],
    tasks: Annotated[int, typer.Option(min=1, help="slices of the table, each a task of the array")],
    time: Time,
    checkpoint: Checkpoint = "last",
    pretrained: Pretrained = None,
    precision: Precision = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, help="samples that go through the model at a time")] = 256,
    num_workers: Annotated[int, typer.Option(min=0, help="decoding processes of a task")] = 0,
    keys: Keys = None,
    files: Files = None,
    select: Select = None,
    width: Width = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, max=1, help="of a task; 0: none")] = 1,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="default: 1 and one for each of its workers")] = None,
    partition: Partition = None,
    account: Account = None,
    sbatch: Sbatch = None,
    trust_code: TrustCode = False,
    dry_run: DryRun = False,
) -> None:
    """Embed DATA by an array of Slurm's tasks into one table. Submitted again, only slices that are missing are embedded."""
    from mmcontrast.data import ShardOptions, read_keys
    from mmcontrast.slurm import Resources, embedding_launch

    resources = Resources(time, 1, gpus_per_node, cpus_per_task or 1 + num_workers, partition, account, sbatch or ())
    shards = ShardOptions(shards=data, keys=read_keys(keys or ()), files=files, select=select)
    launch = embedding_launch(
        model, shards, out, tasks, checkpoint, resources, batch_size, num_workers, trust_code, pretrained, precision, width
    )
    if launch is None:
        console.print(f"{out} is complete", highlight=False)
    elif dry_run:
        print(launch.files["embed.sbatch"], end="")
    else:
        (job,) = launch.submit("embed")
        console.print(f"submitted: job {job}\nin:        {launch.folder}", highlight=False)
