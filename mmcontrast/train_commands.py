"""Defines the commands `train` and `finetune`: run a config, or one that is made for a model and data."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from mmcontrast.arguments import ConfigFile, Overrides, Pretrained
from mmcontrast.errors import UserError

if TYPE_CHECKING:
    from mmcontrast.config import RunConfig
    from mmcontrast.training.preemption import Preemption

console = Console(stderr=True, soft_wrap=True)


class CommandWithHints(TyperCommand):
    """A command that, if it takes overrides, names the one that an unknown option may have meant: --lr, train.lr=…"""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            takes_overrides = any(parameter.name == "overrides" for parameter in self.params)
            if takes_overrides and type(error).__name__ == "NoSuchOption":  # of Typer's own click, which has no public name
                override = override_of(error.option_name, suite=self.name == "evaluate")  # type: ignore[attr-defined]
                error.message += override and f" (an override has no dashes: {override}=…)"  # type: ignore[attr-defined]
            raise


def override_of(option: str, suite: bool) -> str:
    """Return "train.lr" for "--lr" or "--train.lr", of a config or a suite, which is its `evaluation` alone; "" for others."""
    from mmcontrast.config import RunConfig

    section, _, name = option.lstrip("-").partition("=")[0].replace("-", "_").rpartition(".")
    for known in ("evaluation",) if suite else ("train", "data", "model", "evaluation", "run"):
        options = RunConfig.model_fields[known].annotation
        if name in getattr(options, "model_fields", {}) and section in ("", known):
            return name if suite else f"{known}.{name}"
    return ""


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
    from mmcontrast.training.preemption import preemptible

    with preemptible() as preemption:  # from the start, so that no warning of a scheduler is missed
        from mmcontrast.config import load_config

        _run(load_config(config, overrides or ()), resume, overwrite, preemption)


def _run(config: "RunConfig", resume: bool, overwrite: bool, preemption: "Preemption", request: str | None = None) -> None:
    """Train the run of a config; `request`: that of `mmcontrast finetune`."""
    from mmcontrast.run_folder import check_folder, lock_folder, prepare_folder, remove_failed_start
    from mmcontrast.runs import make_run_context
    from mmcontrast.training.distributed import join_processes, reporting_lost_ranks
    from mmcontrast.training.loop import train as run_training
    from mmcontrast.training.mining import mining_options

    state = join_processes()
    if state.is_main_process:
        check_folder(config, resume, overwrite)
        lock = lock_folder(config)
        check_folder(config, resume, overwrite)  # another process may have trained it meanwhile
        console.print(f"preparing [bold]{config.run.name}[/]: model and data", highlight=False)
    try:
        miner = None
        if config.train.mine:
            from mmcontrast.curation.mine import training_miner

            miner = training_miner(mining_options(config.train.mine, config.data))
        context = make_run_context(config, resume)
        if state.is_main_process and not resume:
            prepare_folder(config, overwrite, context.config, request)
        with reporting_lost_ranks():
            state.wait_for_everyone()
        run_training(context, resume, preemption, miner)
    except UserError:
        if state.is_main_process and not resume:
            remove_failed_start(config.folder)
        raise
    if state.is_main_process:
        outputs = {"checkpoint": "checkpoints", "results": "results.json", "page": "report.html", "log": "metrics.jsonl"}
        for name, file in outputs.items():
            if (context.folder / file).exists():
                console.print(f"{f'{name}:':12}{context.folder / file}", highlight=False)
        lock.close()


def finetune(
    model: Annotated[
        str,
        typer.Argument(
            help="any model: ViT-B-32/laion2b_s34b_b79k, a run, a name or folder of open_clip's, transformers' or"
            " timm's; or a file of weights, with --architecture",
            metavar="MODEL",
        ),
    ],
    data: Annotated[str, typer.Argument(help="your pairs: a CSV or Parquet file, a folder, or shards", metavar="DATA")],
    overrides: Overrides = None,
    val: Annotated[str | None, typer.Option(help="pairs to evaluate on; default: a tenth of DATA, not trained on")] = None,
    name: Annotated[str | None, typer.Option(help="of the run: runs/NAME; default: the model's and the data's")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="how often each pair is seen")] = 10,
    lora: Annotated[int | None, typer.Option(min=1, metavar="RANK", help="learn low-rank updates, not the weights")] = None,
    lock: Annotated[list[str] | None, typer.Option(metavar="FIELD", help="a field whose tower stays as it is")] = None,
    probe_epochs: Annotated[float, typer.Option(min=0, help="at first the new projections learn alone (LP-FT)")] = 0,
    beside: Annotated[str | None, typer.Option(metavar="MODEL", help="a second encoder: a text model beside timm's")] = None,
    architecture: Annotated[str | None, typer.Option(help="of a file of weights: an architecture of open_clip or timm")] = None,
    pretrained: Pretrained = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="pixels of a side, other than MODEL's own")] = None,
    context_length: Annotated[int | None, typer.Option(min=1, help="tokens of a text, other than MODEL's own")] = None,
    new_tokens: Annotated[
        list[str] | None, typer.Option(metavar="WORD", help="a word that the tokenizer gets as one token; repeatable")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=COLUMN", help="a field's column in DATA; default: by name or values")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="class names to use as texts; folder: the name of a file's folder"),
    ] = None,
    templates: Annotated[
        list[str] | None, typer.Option(help='of --classes, as "a photo of a {}."; or openai_imagenet, simple_imagenet')
    ] = None,
    files: Annotated[str | None, typer.Option(help="the folder that paths in DATA start from; default: DATA's own")] = None,
    select: Annotated[
        str | None, typer.Option(metavar="SELECTION", help="what `mmcontrast data filter`, dedup or score has kept of DATA")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run of this name from its last checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="remove the run of this name, then start it")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the config; train nothing")] = False,
) -> None:
    """Fine-tune any model on your own pairs: evaluated before and after, with a page that shows what has changed.

    Everything that is chosen for you (learning rate, warm-up, batch, objective, what is held out) is printed, written to
    runs/NAME/config.yaml, and overridden as in: mmcontrast finetune MODEL DATA train.lr=3e-5. docs/finetuning.md
    """
    from mmcontrast.training.preemption import preemptible

    with preemptible() as preemption:
        from mmcontrast.data import read_keys
        from mmcontrast.finetune import make_config_once
        from mmcontrast.finetune_request import Request, config_to_resume

        request = Request(
            model, data, val, name, architecture, pretrained, beside, lora, tuple(lock or ()), epochs, probe_epochs,
            read_keys(keys or ()), files, image_size, context_length, classes, tuple(templates or ()), tuple(new_tokens or ()),
            select,
        )  # fmt: skip
        if resume:
            config = config_to_resume(request, overrides or ())
        else:
            config, chosen = make_config_once(request, overrides or ())
            if os.environ.get("RANK", "0") == "0":
                console.print(chosen.table(), highlight=False)
        if dry_run:
            print(config.to_yaml(), end="")
            return
        _run(config, resume, overwrite, preemption, request.to_json())
