"""Defines the commands of embedding tables: make one, mine hard negatives, score pairs, drop near duplicates, cluster."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmcontrast.arguments import Pretrained
from mmcontrast.errors import UserError

console = Console(stderr=True, soft_wrap=True)
Table = Annotated[Path, typer.Argument(help="an embedding table: the OUT of mmcontrast embed", metavar="TABLE")]
Out = Annotated[Path, typer.Argument(help="a new Parquet file", metavar="OUT.parquet")]


def table(
    out: Annotated[Path, typer.Argument(help="a folder for the table", metavar="OUT")],
    vectors: Annotated[
        list[str], typer.Argument(help="image='img_emb/*.npy', or of Parquet text=rows.parquet:COLUMN", metavar="FIELD=FILES…")
    ],
    metadata: Annotated[str | None, typer.Option(help="Parquet or CSV files, a row a sample: its json, ids, key")] = None,
    key: Annotated[str | None, typer.Option(help="a column of the metadata that names a sample; default: key")] = None,
    group: Annotated[
        str | None, typer.Option(help="a column that is equal for rows about one thing; default: group_id")
    ] = None,
    model: Annotated[str | None, typer.Option(help="what made the vectors, as ViT-B-32/laion2b_s34b_b79k: for queries")] = None,
    pretrained: Pretrained = None,
    normalize: Annotated[bool, typer.Option(help="take vectors of any length; only their directions count")] = False,
) -> None:
    """Make an embedding table of vectors that another program wrote: .npy files or columns of Parquet files.

    Row i of all files is sample i. The table can be evaluated, indexed, searched, mined, deduplicated and clustered like one of
    mmcontrast embed. docs/tables.md

    mmcontrast data table laion image='img_emb/*.npy' text='text_emb/*.npy' --metadata 'metadata/*.parquet' --key image_path
    """
    from mmcontrast.vector_tables import write_vector_table

    fields = dict(pair.partition("=")[::2] for pair in vectors)
    if len(fields) < len(vectors) or not all(re.fullmatch(r"[\w-]+", field) and files for field, files in fields.items()):
        raise UserError(f"{' '.join(vectors)}: not of the form FIELD=FILES, each with a field of its own")
    rows = write_vector_table(out, fields, metadata, key, group, (model, pretrained) if model else None, normalize)
    console.print(f"{out}: {rows} rows of {', '.join(fields)}", highlight=False)


def mine(
    table: Table,
    out: Out,
    query: Annotated[str, typer.Option(help="the field of the samples that get negatives")],
    candidate: Annotated[str, typer.Option(help="the field of which the negatives are; it may be the same")],
    count: Annotated[int, typer.Option(min=1, help="negatives of each query, at most")] = 5,
    range_min: Annotated[int, typer.Option(min=0, help="skip so many of the best that are left by the rules below")] = 0,
    range_max: Annotated[
        int | None, typer.Option(min=1, help="look at so many of the best candidates; default: enough of them for --count")
    ] = None,
    max_score: Annotated[float | None, typer.Option(help="of a negative")] = None,
    min_score: Annotated[float | None, typer.Option(help="of a negative")] = None,
    absolute_margin: Annotated[
        float | None, typer.Option(help="a negative's score is at most p − this, p the positive's")
    ] = None,
    relative_margin: Annotated[float | None, typer.Option(help="at most p − |p| · this; 0.05 is a good start")] = None,
    sampling: Annotated[str, typer.Option(help="top, or random of what is left")] = "top",
    seed: Annotated[int, typer.Option(min=0, help="of random")] = 0,
    search: Annotated[str, typer.Option(help="exact, or ivf: approximate, with its recall measured")] = "exact",
    recall: Annotated[float, typer.Option(help="of ivf, at least")] = 0.95,
    device: Annotated[str, typer.Option(help="of the exact search: cpu, cuda")] = "cpu",
) -> None:
    """Mine hard negatives: of each sample the best candidates of a field, without those that may be right.

    Samples of one group id are never each other's negatives. OUT has a row a query: sample_id, candidate_ids, scores,
    positive_score. Beside it are OUT.summary.json and OUT.report.html. Training reads it with data.negatives. docs/mining.md

    mmcontrast data mine table mined.parquet --query image --candidate text --relative-margin 0.05
    """
    from mmcontrast.curation.mine import MiningOptions
    from mmcontrast.curation.mine import mine as mine_table
    from mmcontrast.curation.outputs import alone

    options = MiningOptions(
        query, candidate, count, range_min, range_max, max_score, min_score, absolute_margin, relative_margin,
        sampling, seed, search, recall,  # type: ignore[arg-type]
    )  # fmt: skip
    with alone(out):
        summary = mine_table(table, out, options, device)
    _print_mined(summary)


def _print_mined(summary: dict[str, Any]) -> None:
    queries, short = summary["queries"], summary["short_queries"]
    console.print(f"{summary['negatives']:,} negatives of {queries:,} queries", highlight=False)
    removed = {rule: number for rule, number in summary["removed"].items() if number}
    if removed:
        words = ", ".join(f"{number:,} by {rule}" for rule, number in removed.items())
        console.print(f"of {summary['candidates']:,} candidates in their windows, removed: {words}", highlight=False)
    if short:
        console.print(
            f"warning: {short:,} queries have fewer than {summary['options']['count']} negatives, {summary['empty_queries']:,}"
            f" of them none: raise --range-max (it was {summary['options']['range_max']}), or lower --count or a rule",
            highlight=False,
        )
    if summary["without_positive"]:
        console.print(
            f"warning: {summary['without_positive']:,} queries have no positive: nobody else of their group has the field"
            f" {summary['options']['candidate']!r}; with a margin they get no negatives",
            highlight=False,
        )
    if "nprobe" in summary["search"]:
        search = summary["search"]
        console.print(
            f"recall of the approximate search: {search['recall']:.3f} at {search['at']} ({search['queries']:,} queries;"
            f" {search['nprobe']} of {search['lists']} lists)",
            highlight=False,
        )


def dedup_near(
    table: Table,
    out: Out,
    field: Annotated[str, typer.Option(help="the field by whose embeddings samples are alike")],
    epsilon: Annotated[
        float, typer.Option(help="drop a sample whose similarity to an earlier one of its cluster is more than 1 − this")
    ] = 0.05,
    clusters: Annotated[int | None, typer.Option(min=1, help="of k-means; default: about 1,000 samples each")] = None,
    best: Annotated[
        str | None,
        typer.Option(help="keep those with the largest number of this name in their json; default: the paper's order"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of k-means")] = 0,
) -> None:
    """Drop near duplicates by their embeddings (SemDeDup): OUT is a selection, which data.select reads.

    OUT has a row a sample: sample_id, key, keep, reason, duplicate_of, similarity, cluster. docs/mining.md

    mmcontrast data dedup-near table unique.parquet --field image --epsilon 0.03
    """
    from mmcontrast.curation.near import drop_near_duplicates
    from mmcontrast.curation.outputs import alone

    with alone(out):
        summary = drop_near_duplicates(table, out, field, epsilon, clusters, best, seed)
    share = summary["dropped"] / summary["samples"]
    console.print(f"{summary['kept']:,} of {summary['samples']:,} samples are kept, {share:.1%} dropped", highlight=False)
    at = ", ".join(f"{number:,} at {epsilon}" for epsilon, number in summary["dropped_at_epsilon"].items())
    console.print(f"dropped by ε: {at}", highlight=False)
    if summary["without_field"]:
        console.print(f"warning: {summary['without_field']:,} samples lack the field {field!r} and are kept", highlight=False)


def cluster(
    table: Table,
    out: Out,
    field: Annotated[str, typer.Option(help="the field whose embeddings are clustered")],
    clusters: Annotated[int, typer.Option(min=1, help="how many")],
    seed: Annotated[int, typer.Option(min=0, help="of k-means")] = 0,
    iterations: Annotated[int, typer.Option(min=1, help="of k-means")] = 20,
) -> None:
    """Cluster samples by their embeddings (spherical k-means): OUT is what data.clusters reads.

    OUT has a row a sample: sample_id, key, cluster, distance. Samples that lack the field are cluster −1.

    mmcontrast data cluster table clusters.parquet --field image --clusters 1000
    """
    from mmcontrast.curation.cluster import cluster as cluster_table
    from mmcontrast.curation.outputs import alone

    with alone(out):
        summary = cluster_table(table, out, field, clusters, seed, iterations)
    sizes = f"{summary['smallest']:,} to {summary['largest']:,} samples each, {summary['median']:,.0f} in the median"
    console.print(f"{clusters:,} clusters of {sizes}", highlight=False)
    if summary["without_field"]:
        console.print(f"warning: {summary['without_field']:,} samples lack the field {field!r}: cluster −1", highlight=False)


def score(
    table: Table,
    out: Out,
    pair: Annotated[tuple[str, str], typer.Option(help="two fields whose cosine is a sample's score: image text")],
    minimum: Annotated[float | None, typer.Option("--min", help="keep samples of at least this score")] = None,
    top: Annotated[
        float | None, typer.Option(help="instead, keep this share of all samples, those of the largest scores")
    ] = None,
) -> None:
    """Score how well two fields of each sample fit, and keep the best samples.

    OUT has a row a sample: sample_id, key, keep, reason, score. It is a selection: data.select=OUT, or --select OUT of another
    stage. Beside it are OUT.summary.json and OUT.report.html with the scores' histogram.

    mmcontrast data score table scores.parquet --pair image text --top 0.3
    """
    from mmcontrast.curation.score import ScoreOptions
    from mmcontrast.curation.score import score as score_table

    summary = score_table(table, out, ScoreOptions(*pair, minimum, top))
    quantiles = ", ".join(f"{value:.3f}" for value in summary["quantiles"].values())
    console.print(f"scores at 1, 5, 25, 50, 75, 95 and 99 %: {quantiles}", highlight=False)
    console.print(f"{out}: {summary['kept']:,} of {summary['samples']:,} samples are kept", highlight=False)
