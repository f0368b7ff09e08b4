"""Run a suite's retrieval on one split: every pair of fields, the tasks it names, and consistency over languages."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor

from mmcontrast.errors import UserError
from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.evaluation.consistency import mean_rank_variance
from mmcontrast.evaluation.embed import EmbeddingTable
from mmcontrast.evaluation.labels import entries_of
from mmcontrast.evaluation.options import EvaluationOptions, LanguageOptions, RetrievalOptions
from mmcontrast.evaluation.rankings import Pairs, Ranking, rank
from mmcontrast.evaluation.results import Evaluation
from mmcontrast.evaluation.retrieval import query_metrics
from mmcontrast.evaluation.retrieval_inputs import RetrievalInput, group_by_label, read_relevance, retrieval_input, whitened
from mmcontrast.evaluation.scoring import ScoreCorrection


@dataclass
class RetrievalTasks:
    """The retrieval tasks of one split.

    Attributes:
        split: its name.
        table: its embeddings.
        captions: the captions of each field of which every line is one.
        evaluation: where results go; other ranks than the first take part, and drop theirs.
        texts: the fields that hold texts.
        bridge_of: (fields of the queries, fields of the candidates) → the options' bridge between them, if there is one.
    """

    split: str
    table: EmbeddingTable
    captions: Mapping[str, RetrievalInput]
    options: EvaluationOptions
    device: torch.device | str
    progress: Progress | None
    group: dist.ProcessGroup | None
    evaluation: Evaluation
    texts: Collection[str] = ()
    bridge_of: Callable[[Sequence[str], Sequence[str]], Bridge | None] | None = None

    def __post_init__(self) -> None:
        if self.options.whiten:
            self.table, self.captions = whitened(self.table, self.captions)

    def run(self) -> None:
        """Run all retrieval tasks of the split.

        Raises:
            UserError: for a task of which no query has a relevant candidate.
        """
        prefix, k = f"{self.split}/retrieval", self.options.retrieval_at[0]
        if self.options.pairs and len(self.table.fields) > 1:
            recalls = [recall for pair in combinations(self.table.fields, 2) for recall in self.pair(prefix, *pair)]
            if recalls:
                self.evaluation.values[f"{prefix}/mean_recall_at_{k}"] = sum(recalls) / len(recalls)
        for name, task in self.options.retrieval.items():
            if self.split in (task.splits or [self.split]) and self.has(task.query) and self.has(task.candidate):
                self.task(f"{prefix}/{name}", task)
        for name, language in self.options.languages.items():
            if self.has([*language.fields, language.candidate]):
                self.languages(f"{self.split}/languages/{name}", language)

    def has(self, fields: str | list[str]) -> bool:
        return {*([fields] if isinstance(fields, str) else fields)} <= self.table.fields.keys()

    def pair(self, prefix: str, first: str, second: str) -> list[float]:
        """Retrieve two fields, each by the other, and return the recall of each at the first k; none, with a note, if they
        share no group."""
        x, y = self.input(first), self.input(second)
        pairs = Pairs.of_groups(x.groups, y.groups)
        if not len(pairs):
            self.evaluation.notes.append(
                f"{prefix}: no sample has both {first} and {second}: neither is retrieved by the other"
            )
            return []
        x_candidates, y_candidates = self.candidates(prefix, first, x), self.candidates(prefix, second, y)
        if x_candidates is x and y_candidates is y and not self.directed:
            x_to_y, y_to_x = self.rank(x, y, pairs, ([first], [second]), both=True)
        else:
            (x_to_y,) = self.rank(x, y_candidates, Pairs.of_groups(x.groups, y_candidates.groups), ([first], [second]))
            (y_to_x,) = self.rank(y, x_candidates, Pairs.of_groups(y.groups, x_candidates.groups), ([second], [first]))
        recalls = []
        for name, queries, ranking in ((f"{first}_to_{second}", x, x_to_y), (f"{second}_to_{first}", y, y_to_x)):
            self.add(f"{prefix}/{name}", queries, ranking)
            recalls.append(self.evaluation.values[f"{prefix}/{name}/recall_at_{self.options.retrieval_at[0]}"])
        return recalls

    def task(self, prefix: str, task: RetrievalOptions) -> None:
        """Run one named task, and add its results under `prefix`."""
        queries, candidates = self.input(task.query), self.input(task.candidate)
        if task.by:
            labels = entries_of(self.table.metadata, task.by, prefix)
            queries, candidates = group_by_label(queries, labels), group_by_label(candidates, labels)
        same_field = task.within
        by_group = not (task.by or task.relevance or same_field)
        once = task.once
        if once is None:
            once = by_group and isinstance(task.candidate, str) and self.one_per_group(task.candidate)
        if once:
            candidates = candidates.one_per_group()
        elif task.once is None and by_group and isinstance(task.candidate, str):
            candidates = self.candidates(prefix, task.candidate, candidates)
        if task.relevance:
            pairs, relevant, missing = read_relevance(task.relevance, queries, candidates, self.table)
            if missing:
                self.evaluation.notes.append(
                    f"{prefix}: {missing} of {relevant} relevant pairs in {task.relevance} are left out: a sample of theirs"
                    f" has no {task.query} to ask with, or no {task.candidate} to be found"
                )
        else:
            pairs = Pairs.of_groups(queries.groups, candidates.groups)
        own_rows = torch.arange(len(queries)) if same_field else None
        if not len(pairs if own_rows is None else pairs.without(own_rows)):
            requirement = f"a gain above 0 in {task.relevance}" if task.relevance else f"an equal {task.by or 'group'}"
            raise UserError(
                f"{prefix}: there is nothing to retrieve: {len(queries)} samples have {task.query}, {len(candidates)} have"
                f" {task.candidate}, and none of them {requirement}"
            )
        fields = [[side] if isinstance(side, str) else side for side in (task.query, task.candidate)]
        (ranking,) = self.rank(queries, candidates, pairs, fields, excluded=own_rows)
        self.add(prefix, queries, ranking)

    def languages(self, prefix: str, options: LanguageOptions) -> None:
        """Retrieve between each language's field and the candidate, both ways, over the samples that have all of the fields,
        and add the variance of ranks over languages."""
        present = [self.table.present[field] for field in [*options.fields, options.candidate]]
        samples = torch.stack(present).all(0).nonzero().squeeze(1)
        if not len(samples):
            raise UserError(f"{prefix}: no sample has all of {', '.join([*options.fields, options.candidate])}")
        groups = self.table.group_ids[samples]
        candidates = RetrievalInput(self.table.fields[options.candidate][samples], samples, groups)
        ranks_to: list[Tensor] = []  # of the candidate, from each language
        ranks_from: list[Tensor] = []
        for field in options.fields:
            language = RetrievalInput(self.table.fields[field][samples], samples, groups)
            pairs, fields = Pairs.of_groups(groups, groups), ([field], [options.candidate])
            rankings = self.rank(language, candidates, pairs, fields, both=not self.directed)
            if self.directed:
                rankings += self.rank(candidates, language, pairs.transposed(), fields[::-1])
            to_candidate, from_candidate = rankings
            ranks_to.append(self.add(f"{prefix}/{field}_to_{options.candidate}", language, to_candidate)["rank"])
            ranks_from.append(self.add(f"{prefix}/{options.candidate}_to_{field}", language, from_candidate)["rank"])
        for name, ranks in ((f"to_{options.candidate}", ranks_to), (f"{options.candidate}_to_all", ranks_from)):
            variance = {"mean_rank_variance": mean_rank_variance(torch.stack(ranks, 1))}
            self.evaluation.add_estimates(f"{prefix}/{name}", variance, groups)

    def input(self, fields: str | list[str]) -> RetrievalInput:
        return retrieval_input(self.table, fields, self.captions)

    def candidates(self, prefix: str, field: str, rows: RetrievalInput) -> RetrievalInput:
        """Return a field's candidates without those that count once with another: texts of a group, and repeated rows."""
        if self.one_per_group(field):
            return rows.one_per_group()
        unique = rows if field in self.captions else rows.without_repeats()
        if unique is not rows:
            note = f"{prefix}: {len(rows)} samples have {len(unique)} different {field} values, and each is one candidate"
            self.evaluation.notes += [note] if note not in self.evaluation.notes else []
        return unique

    def one_per_group(self, field: str) -> bool:
        """Return whether a field's candidates count once per group: texts of a group say the same, unless every line is one."""
        return field in self.texts and field not in self.captions

    @property
    def directed(self) -> bool:
        """Return whether scores depend on which field is the query's."""
        return isinstance(self.options.scoring, str)

    def rank(
        self, queries: RetrievalInput, candidates: RetrievalInput, pairs: Pairs, fields: Sequence[Sequence[str]], **options: Any
    ) -> list[Ranking]:
        """Rank by the options' scoring; `fields`: (fields of the queries, fields of the candidates)."""
        x, y = self.table.compared(queries.rows), self.table.compared(candidates.rows, columns=True)
        scoring = self.options.scoring
        if isinstance(scoring, str):
            device_rows = queries.rows.to(self.device), candidates.rows.to(self.device)
            options["scoring"] = ScoreCorrection.of(scoring, *device_rows, alike=options.get("excluded") is not None)
        elif scoring and self.bridge_of and (bridge := self.bridge_of(*fields)):
            if scoring.rows == "exact":
                options["bridge"] = bridge
            else:
                x, y = bridge.expected(x), bridge.expected(y, candidates=True)
        try:
            return rank(x, y, pairs, device=self.device, group=self.group, progress=self.progress, **options)
        except ValueError as error:
            raise UserError(f"{self.split}: {error}") from error

    def add(self, prefix: str, queries: RetrievalInput, ranking: Ranking) -> dict[str, Tensor]:
        """Add a ranking's metrics to the results, and return them per query."""
        values = query_metrics(ranking, self.options.retrieval_at)
        samples = queries.samples[ranking.queries.unique()]
        self.evaluation.add_means(prefix, values, self.table.group_ids[samples])
        self.evaluation.values |= {
            f"{prefix}/num_queries": len(values["rank"]),
            f"{prefix}/num_candidates": ranking.num_candidates,
        }
        return values
