"""Mines hard negatives in an embedding table: for each sample the best candidates of another field, or of the same, without
those that may be right.

The candidates that each rule removes are counted, and so are queries with fewer negatives than wanted: none are made up.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich.progress import Progress

from mmcontrast.curation.blocks import Blocks
from mmcontrast.curation.outputs import (
    about_table,
    check_out,
    counts_table,
    finish,
    ids_of_table,
    open_stored,
    parquet_file,
    sample_cell,
    spread,
)
from mmcontrast.curation.windows import Windows, WindowSearch
from mmcontrast.errors import UserError
from mmcontrast.search.query import faiss_module
from mmcontrast.search.table import StoredTable
from mmcontrast.share import WHOLE, Share
from mmcontrast.training.log import make_progress

SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("candidate_ids", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
        ("positive_score", pa.float32()),
    ]
)
RULES = ("no_positive", "absolute_margin", "relative_margin", "max_score", "min_score")  # in the order of their application
WIDER = 10  # times the count: the window where a rule may remove candidates, or some of it are drawn
SHOWN = 24  # queries on the page
MINED = "mined"


@dataclass(frozen=True)
class MiningOptions:
    """Options that choose negatives among candidates, named as those of sentence-transformers' mine_hard_negatives.

    Attributes:
        query, candidate: fields; they may be the same.
        count: negatives of each query, at most.
        range_max: the window: so many of the best candidates that are not of the query's group are considered. Default:
            range_min + count; ten times the count where a rule may remove some of them, or `random` draws.
        range_min: so many of the best that pass the rules are skipped.
        max_score, min_score: of a negative.
        absolute_margin: a negative's score is at most p − this, p being the positive's: of several the smallest.
        relative_margin: at most p − |p| · this: 0.05 is NV-Retriever's "95 % of the positive" (arXiv:2407.15831), for p < 0
            too.
        sampling: "top": the best; "random": some of those that remain, by (seed, sample id, candidate's sample id).
        search: "exact": all pairs are scored; "ivf": by faiss's IVF, whose measured recall of the windows is at least `recall`.
    """

    query: str
    candidate: str
    count: int = 5
    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    sampling: Literal["top", "random"] = "top"
    seed: int = 0
    search: Literal["exact", "ivf"] = "exact"
    recall: float = 0.95

    @property
    def window(self) -> int:
        if self.range_max is not None:
            return self.range_max
        removal_options = (self.max_score, self.absolute_margin, self.relative_margin)
        is_wide = self.sampling == "random" or any(option is not None for option in removal_options)
        return self.range_min + self.count * (WIDER if is_wide else 1)

    def check(self) -> None:
        """Check the options.

        Raises:
            UserError: for options that contradict each other.
        """
        if self.count < 1 or self.range_min < 0:
            raise UserError(f"--count {self.count}, --range-min {self.range_min}: at least 1 negative, and no rank below 0")
        if self.window - self.range_min < self.count:
            raise UserError(
                f"--range-min {self.range_min}, --range-max {self.window}: {max(0, self.window - self.range_min)} candidates"
                f" are left for --count {self.count}: raise --range-max, or lower one of the others"
            )
        if self.sampling not in ("top", "random"):
            raise UserError(f"--sampling {self.sampling!r}: top, or random")
        if self.search not in ("exact", "ivf"):
            raise UserError(f"--search {self.search!r}: exact, or ivf")
        if not 0 < self.recall <= 1:
            raise UserError(f"--recall {self.recall}: more than 0, and at most 1")
        for name in ("max_score", "min_score", "absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be finite")
        if self.max_score is not None and self.min_score is not None and self.max_score < self.min_score:
            raise UserError(f"--min-score {self.min_score} is above --max-score {self.max_score}: no candidate is left")


def mine(
    table: Path, out: Path, options: MiningOptions, device: str = "cpu", progress: bool = True, share: Share = WHOLE
) -> dict[str, Any]:
    """Mine hard negatives, and return the counts, which are also in the file's metadata and beside it.

    The blocks that a killed run has mined are kept beside `out`, and not mined again.

    Args:
        table: a folder that `mmcontrast embed` wrote. It is read a block at a time, as often as there are blocks of queries.
        out: a Parquet file: of every sample that has the query's field, in the table's order, `sample_id`, `candidate_ids`,
            their `scores`, best first, and `positive_score`.
        device: of the exact product.
        share: of several processes that mine one table together, which this one is. The first one returns the counts, the
            others an empty dict.

    Raises:
        UserError: for a table that is damaged or lacks a field, a file that exists, options that contradict each other,
            blocks that a run with other options has left.
    """
    options.check()
    check_out(out)
    stored = open_stored(table, {"--query": options.query, "--candidate": options.candidate})
    ids, groups = ids_of_table(stored), stored.ids("group_id")
    search = WindowSearch(stored, options.query, options.candidate, groups, options.window, device)
    blocks = Blocks(out, stored, asdict(options) | {"range_max": options.window})
    with make_progress(progress and share.is_first) as bar:
        number_of_blocks, recall_measures = _mine_share(stored, search, blocks, ids, options, share, bar)
    if not share.is_first:
        return {}
    totals, sums = Counter[str](dict.fromkeys(RULES, 0)), Counter[str]()
    sizes, examples = np.zeros(options.count + 1, dtype=np.int64), []
    with parquet_file(out, SCHEMA) as writer:
        for number in range(number_of_blocks):
            table_of_block, counts = blocks.read(MINED, number)
            writer.write_table(table_of_block)
            totals.update(counts["counted"])
            sums.update(counts["sums"])
            sizes += np.array(counts["sizes"])
            examples += counts["examples"]
        stored.check_unchanged()
        if not totals["candidates"]:
            blocks.remove()
            raise UserError(
                f"{table}: every sample with the field {options.candidate!r} is of the query's own group: there are no"
                " negatives"
            )
        summary = _summary(stored, options, totals, sums, sizes, recall_measures)
        finish(out, writer, summary, _sections(summary, examples))
    blocks.remove()
    return summary


def training_miner(options: Mapping[str, Any]) -> Callable[[Path, Path, int, str, Share], dict[str, Any]]:
    """Return the function with which a run with `train.mine_every` mines: of an embedding table, a new Parquet file, a seed,
    a device and this rank's share.

    Raises:
        UserError: for options that contradict each other, or faiss if it is needed and not installed.
    """
    mining_options = MiningOptions(**options)
    try:
        mining_options.check()
        if mining_options.search == "ivf":
            faiss_module()
    except UserError as error:
        raise UserError(f"train.mine: {error}") from error

    def mine_table(table: Path, out: Path, seed: int, device: str, share: Share) -> dict[str, Any]:
        return mine(table, out, replace(mining_options, seed=seed), device, progress=False, share=share)

    return mine_table


def _mine_share(
    stored: StoredTable,
    search: WindowSearch,
    blocks: Blocks,
    ids: np.ndarray,
    options: MiningOptions,
    share: Share,
    bar: Progress,
) -> tuple[int, dict[str, Any] | None]:
    """Mine this process's blocks that do not exist, wait for those of the others, and return how many blocks there are in all,
    and the measures of an approximate search."""
    index, measures, number = None, None, -1
    if options.search == "ivf":
        task = bar.add_task("learning and measuring the IVF", total=None, note="")
        if not share.is_first:
            share.wait()  # the first one learns it, and leaves it beside the blocks
        index, measures = search.make_ivf(options.recall, blocks.folder)
        if share.is_first:
            share.wait()
        bar.remove_task(task)
    rows = stored.present(options.query)
    shown = set(rows[spread(SHOWN, len(rows))].tolist())
    task = bar.add_task(f"mining {options.candidate} for {options.query}", total=len(rows), note="")
    for number, block in enumerate(stored.blocks(options.query)):
        if share.has(number) and not blocks.has(MINED, number):
            (windows,) = search.exact([block]) if index is None else search.approximate(index, [block])
            blocks.write(MINED, number, *_mine_block(stored, windows, ids, options, shown))
        bar.advance(task, len(block[0]))
    share.wait()
    return number + 1, measures


def _mine_block(
    stored: StoredTable, windows: Windows, ids: np.ndarray, options: MiningOptions, shown: set[int]
) -> tuple[pa.Table, dict[str, Any]]:
    """Return the rows of the output of a block of queries, and the counts of the block."""
    chosen, removed = choose(windows, ids, options)
    per_query = chosen.sum(1)
    offsets = np.concatenate([[0], np.cumsum(per_query)])
    scores = windows.scores[chosen]
    gaps = (windows.positives[:, None] - windows.scores)[chosen & ~np.isnan(windows.positives)[:, None]]
    positives = windows.positives[~np.isnan(windows.positives)]
    columns = [
        pa.array(ids[windows.rows]),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids[windows.candidates[chosen]])),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(scores.astype(np.float32))),
        pa.array(windows.positives.astype(np.float32), mask=np.isnan(windows.positives)),
    ]
    counts = {
        "counted": removed,
        "sums": {
            "negatives": float(scores.sum()),
            "gap": float(gaps.sum()),
            "gaps": len(gaps),
            "positives": float(positives.sum()),
            "with_positive": len(positives),
        },
        "sizes": np.bincount(per_query, minlength=options.count + 1).tolist(),
        "examples": [_example(stored, windows, chosen, k) for k, row in enumerate(windows.rows.tolist()) if row in shown],
    }
    return pa.table(columns, schema=SCHEMA), counts


def choose(windows: Windows, ids: np.ndarray, options: MiningOptions) -> tuple[np.ndarray, dict[str, int]]:
    """Return which candidates of each window become negatives, bool [Q, K], and how many were removed by which rule.

    A candidate counts for the first rule that removes it.

    Args:
        ids: sample ids of all rows of the table.
    """
    scores, positives = windows.scores, windows.positives[:, None]
    remaining = windows.candidates >= 0
    removed = {"candidates": int(remaining.sum()), "same_group": windows.same_group}
    removed["without_positive"] = int(np.isnan(positives).sum())
    removed["window_short"] = int((remaining.sum(1) < options.window).sum())
    removes: dict[str, Any] = {}
    if options.absolute_margin is not None or options.relative_margin is not None:
        removes["no_positive"] = np.isnan(positives)
    if options.absolute_margin is not None:
        removes["absolute_margin"] = scores + options.absolute_margin > positives
    if options.relative_margin is not None:
        removes["relative_margin"] = scores > positives - np.abs(positives) * options.relative_margin
    if options.max_score is not None:
        removes["max_score"] = scores > options.max_score
    if options.min_score is not None:
        removes["min_score"] = scores < options.min_score
    for rule, matches in removes.items():
        removed[rule] = int((remaining & matches).sum())
        remaining = remaining & ~matches
    rank = remaining.cumsum(1) - 1  # among those that remain
    skipped = remaining & (rank < options.range_min)
    removed["range_min"] = int(skipped.sum())
    remaining = remaining & ~skipped
    if options.sampling == "random":
        keys = _random_keys(options.seed, ids[windows.rows], ids[windows.candidates])
        order = np.lexsort((keys, ~remaining))  # those that remain first, in a random order
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(order.shape[1])[None, :], 1)
    else:
        rank = rank - options.range_min
    return remaining & (rank < options.count), removed


def _random_keys(seed: int, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return uint64 [Q, K] of sample ids [Q] and [Q, K]: a function of them and the seed alone (splitmix64)."""
    with np.errstate(over="ignore"):
        keys = _mix(np.uint64(seed) + _mix(queries.astype(np.uint64)))[:, None]
        return _mix(keys + candidates.astype(np.uint64))


def _mix(values: np.ndarray) -> np.ndarray:
    """Return the splitmix64 hash of each value."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _summary(
    table: StoredTable,
    options: MiningOptions,
    totals: Counter[str],
    sums: Counter[str],
    sizes: np.ndarray,
    recall_measures: dict[str, Any] | None,
) -> dict[str, Any]:
    queries, negatives = int(sizes.sum()), int((sizes * np.arange(len(sizes))).sum())

    def mean(total: str, number: float) -> float | None:
        return sums[total] / number if number else None

    return {
        "stage": "mine",
        "table": about_table(table),
        "options": asdict(options) | {"range_max": options.window},
        "queries": queries,
        "negatives": negatives,
        "short_queries": queries - int(sizes[-1]),
        "empty_queries": int(sizes[0]),
        "queries_by_negatives": {str(number): int(size) for number, size in enumerate(sizes)},
        "without_positive": totals["without_positive"],
        "window_short": totals["window_short"],
        "same_group_pairs": totals["same_group"],
        "candidates": totals["candidates"],
        "removed": {rule: totals[rule] for rule in (*RULES, "range_min")},
        "mean_positive_score": mean("positives", sums["with_positive"]),
        "mean_negative_score": mean("negatives", negatives),
        "mean_gap": mean("gap", sums["gaps"]),
        "search": recall_measures or {"recall": 1.0},
    }


def _example(table: StoredTable, windows: Windows, chosen: np.ndarray, k: int) -> str:
    positive = windows.positives[k]
    note = "no positive" if np.isnan(positive) else f"positive {positive:.3f}"
    negatives = zip(windows.candidates[k][chosen[k]].tolist(), windows.scores[k][chosen[k]].tolist(), strict=True)
    cells = [sample_cell(table, row, f"{score:.3f}") for row, score in negatives] or ['<div class="item">none</div>']
    return f'<div class="row">{sample_cell(table, int(windows.rows[k]), note, "query")}{"".join(cells)}</div>'


def _sections(summary: dict[str, Any], examples: list[str]) -> list[str]:
    options = {name: value for name, value in summary["options"].items() if value is not None}
    names = ("queries", "negatives", "short_queries", "empty_queries", "without_positive", "window_short", "same_group_pairs")
    counts = {name.replace("_", " "): summary[name] for name in (*names, "candidates")}
    counts |= {f"removed by {rule}": number for rule, number in summary["removed"].items()}
    means = {name.replace("_", " "): summary[name] for name in ("mean_positive_score", "mean_negative_score", "mean_gap")}
    tables = [counts_table("Options", options), counts_table("Counts", counts | means | summary["search"])]
    return [*tables, "<h2>Queries, evenly spread, and their negatives</h2>", *examples]
