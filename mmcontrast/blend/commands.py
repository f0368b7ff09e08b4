"""Command `blend`: average models in weight space, evaluate the blends, and write one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmcontrast.arguments import Device, Precision, TrustCode
from mmcontrast.errors import UserError

console = Console(stderr=True, soft_wrap=True)
SOUPS = ("uniform", "greedy")


def blend(
    models: Annotated[
        list[str],
        typer.Argument(
            help="two models or more of one architecture, as evaluate takes them; with --alpha or --soup, OUT comes"
            " last: a new folder",
            metavar="MODEL… [OUT]",
        ),
    ],
    alpha: Annotated[float | None, typer.Option(min=0, max=1, help="write (1 − α) · first + α · second to OUT")] = None,
    curve: Annotated[bool, typer.Option("--curve", help="evaluate α = 0, 0.1, … 1 of two models, and draw it")] = False,
    soup: Annotated[str | None, typer.Option(help="write an average to OUT: uniform, or greedy by --metric")] = None,
    suite: Annotated[str | None, typer.Option(help="a YAML file, as in eval/; default: the last run's own evaluation")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="of --curve: what is drawn, '*/top1', may be repeated; of greedy: one result's name"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="of --curve: a folder for curve.json and curve.svg; default: blends/…")
    ] = None,
    device: Device = None,
    precision: Precision = "fp32",
    cache: Annotated[bool, typer.Option(help="keep embeddings, and read those of the same weights and data")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier OUT")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Average models in weight space: WiSE-FT between a model and its fine-tuned self, or a soup of several. docs/export.md

    mmcontrast blend ViT-B-32/laion2b_s34b_b79k runs/shoes --suite eval/both.yaml --curve, then
    mmcontrast blend ViT-B-32/laion2b_s34b_b79k runs/shoes --alpha 0.5 out/blend
    """  # fmt: skip
    from mmcontrast.blend.run import blend_models

    modes = [name for name, is_set in (("--alpha", alpha is not None), ("--curve", curve), ("--soup", soup)) if is_set]
    if len(modes) != 1:
        raise UserError(f"blend takes one of --alpha, --curve and --soup, {' and '.join(modes) or 'none'} given")
    if soup is not None and soup not in SOUPS:
        raise UserError(f"--soup {soup}: it is uniform or greedy")
    if out is not None and not curve:
        raise UserError(f"--out is of --curve: with {modes[0]} the folder comes last, after the models")
    if soup == "greedy" and len(metric or ()) != 1:
        raise UserError("--soup greedy needs --metric with one result's name, as val/retrieval/image_to_text/recall_at_1")
    names, target = (models, out) if curve else (models[:-1], Path(models[-1]))
    if len(names) < 2 or (soup is None and len(names) > 2):
        expected = "two models" if soup is None else "two models or more"
        raise UserError(f"{modes[0]} blends {expected}{'' if curve else ', and OUT comes last'}: {len(names)} named")
    outcome = blend_models(
        names, target, alpha=alpha, soup=soup, suite=suite, metrics=metric or (), device=device, precision=precision,
        cached=cache, overwrite=overwrite, trust_code=trust_code,
    )  # fmt: skip
    _show(names, outcome)


def _show(names: Sequence[str], outcome: dict[str, Any]) -> None:
    if "curve" in outcome:
        curve, metrics = outcome["curve"], outcome["metrics"]
        table = Table("α", *metrics, box=None)
        for number, alpha in enumerate(curve.alphas):
            table.add_row(f"{alpha:g}", *(f"{curve.results[name][number]['value']:.3f}" for name in metrics))
        console.print(table, highlight=False)
    if outcome.get("alone") is not None:
        for number, (name, value) in enumerate(zip(names, outcome["alone"], strict=True)):
            console.print(
                f"{value:.4f} {name}{'' if number in outcome['members'] else ' (left out)'}", highlight=False, markup=False
            )
        console.print(f"{outcome['value']:.4f} the soup of {len(outcome['members'])}", highlight=False)
    for file in outcome["files"]:
        console.print(f"written: {file}", highlight=False)
