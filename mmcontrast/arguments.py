"""Define the arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="a YAML file, as in configs/", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted overrides: train.steps=50 objective=siglip")]
ModelName = Annotated[
    str, typer.Argument(help="a run's folder, or a folder or name of open_clip's, transformers' or timm's", metavar="MODEL")
]
Shards = Annotated[list[str], typer.Argument(help="tars (by URL too), folders, tables: globs, brace ranges", metavar="SHARDS")]
Checkpoint = Annotated[str, typer.Option(help="of a run: last, best, or a step's number")]
Pretrained = Annotated[str | None, typer.Option(help="weights of an architecture: a tag of open_clip, or a checkpoint's file")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if there is one")]
Precision = Annotated[str, typer.Option(help="of the towers: fp32, bf16 or fp16")]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code/--no-trust-code", help="import the classes that a run's config names by path: for folders you trust"
    ),
]
Keys = Annotated[
    list[str] | None, typer.Option(metavar="FIELD=COLUMN", help="a field's column or extension in DATA; may be repeated")
]
Files = Annotated[str | None, typer.Option(help="of a table that names files: their folder; default: the table's")]
Select = Annotated[str | None, typer.Option(help="a selection: the samples that it keeps alone")]
Width = Annotated[
    int | None, typer.Option(min=1, help="the first numbers of each embedding alone: of models of train.matryoshka")
]
