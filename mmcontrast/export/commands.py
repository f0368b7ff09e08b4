"""Command `export`: write a model in the format of another library."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmcontrast.arguments import Checkpoint, ModelName, Pretrained, TrustCode

console = Console(stderr=True, soft_wrap=True)


def export(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="a new folder", metavar="OUT")],
    kind: Annotated[
        str, typer.Option("--format", help="open_clip, huggingface, sentence-transformers, onnx, or safetensors: our own")
    ],
    fields: Annotated[str | None, typer.Option(help="these alone: image,text; default: all")] = None,
    data: Annotated[
        str | None, typer.Option(help="shards or a table to compare on; default: a few samples that are made")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="of --data, spread over all of it")] = 32,
    checkpoint: Checkpoint = "last",
    pretrained: Pretrained = None,
    pooling: Annotated[str | None, typer.Option(help="of a plain encoder of transformers: mean, first or last")] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="onnx: weights of half precision")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write a model as a folder of another library, reopen it there, and compare embeddings of sample inputs. docs/export.md

    OUT gets the weights, the tokenizer and the preprocessing, a model card (README.md) and parity.json: how far the embeddings
    are from the model's. Beyond 1e-4 nothing is written. What a format cannot hold is refused.
    """
    from mmcontrast.export.folder import export_model

    parity = export_model(
        model, out, kind, fields=[name.strip() for name in fields.split(",")] if fields else None, data=data, samples=samples,
        checkpoint=checkpoint, pretrained=pretrained, pooling=pooling, fp16=fp16, overwrite=overwrite, trust_code=trust_code,
    )  # fmt: skip
    table = Table("", "samples", "largest difference", box=None)
    for field, entry in parity["fields"].items():
        table.add_row(field, str(entry["samples"]), f"{entry['largest_difference']:.1e}")
    for score in ("logit_scale", "logit_bias"):
        if score in parity:
            table.add_row(score, "", f"{parity[score]:.1e}")
    console.print(table, highlight=False)
    if parity["samples"] == "generated":
        console.print("compared on samples that were made for it: give your own with --data", highlight=False)
    console.print(f"{kind}: {out}", highlight=False)
