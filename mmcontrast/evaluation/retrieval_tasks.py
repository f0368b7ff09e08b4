"""The retrieval that a suite asks for on one split: every pair of fields, tasks of its own, languages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor

from mmcontrast.errors import UserError
from mmcontrast.evaluation.banks import Bank
from mmcontrast.evaluation.consistency import mean_rank_variance
from mmcontrast.evaluation.embed import EmbeddingTable
from mmcontrast.evaluation.labels import entries_of
from mmcontrast.evaluation.options import EvaluationOptions, LanguageOptions, RetrievalOptions
from mmcontrast.evaluation.rankings import Pairs, Ranking, rank
from mmcontrast.evaluation.results import Evaluation
from mmcontrast.evaluation.retrieval import query_metrics
from mmcontrast.evaluation.retrieval_inputs import Side, graded, labelled, side_of, whitened
from mmcontrast.evaluation.scoring import ScoreCorrection
from mmcontrast.modalities import TextModality
from mmcontrast.models import ContrastiveModel


@dataclass
class RetrievalTasks:
    """
    Attributes:
        split: its name.
        table: its embeddings.
        captions: per field of which every line is a caption, all of them.
        found: where results go; ranks of a group that are not the first take part, and drop theirs.
        bank: of the options' bridge.
    """

    model: ContrastiveModel
    split: str
    table: EmbeddingTable
    captions: Mapping[str, Side]
    options: EvaluationOptions
    device: torch.device | str
    progress: Progress | None
    group: dist.ProcessGroup | None
    found: Evaluation
    bank: Bank | None = None

    def __post_init__(self) -> None:
        if self.options.whiten:
            self.table, self.captions = whitened(self.table, self.captions)

    def run(self) -> None:
        """
        Raises:
            UserError: for a task of which no query has a relevant candidate.
        """
        place, at = f"{self.split}/retrieval", self.options.retrieval_at[0]
        if self.options.pairs and len(self.table.fields) > 1:
            recalls = [recall for pair in combinations(self.table.fields, 2) for recall in self.pair(place, *pair)]
            if recalls:
                self.found.values[f"{place}/mean_recall_at_{at}"] = sum(recalls) / len(recalls)
        for name, task in self.options.retrieval.items():
            if self.split in (task.splits or [self.split]) and self.has(task.query) and self.has(task.candidate):
                self.task(f"{place}/{name}", task)
        for name, language in self.options.languages.items():
            if self.has([*language.fields, language.candidate]):
                self.languages(f"{self.split}/languages/{name}", language)

    def has(self, fields: str | list[str]) -> bool:
        return {fields} <= self.table.fields.keys() if isinstance(fields, str) else set(fields) <= self.table.fields.keys()

    def pair(self, place: str, first: str, second: str) -> list[float]:
        """Retrieve two fields, each by the other, and return the first recall of each; none, with a note, if they share no
        group."""
        sides = self.side(first), self.side(second)
        if not len(Pairs.of_groups(sides[0].groups, sides[1].groups)):
            self.found.notes.append(f"{place}: no sample has both {first} and {second}: neither is retrieved by the other")
            return []
        once = [side.once_a_group() if self.says_once(f) else side for f, side in zip((first, second), sides, strict=True)]
        fields = [first], [second]
        if once[0] is sides[0] and once[1] is sides[1] and not self.one_way:
            there, back = self.rank(*sides, Pairs.of_groups(sides[0].groups, sides[1].groups), fields, both=True)
        else:
            (there,) = self.rank(sides[0], once[1], Pairs.of_groups(sides[0].groups, once[1].groups), fields)
            (back,) = self.rank(sides[1], once[0], Pairs.of_groups(sides[1].groups, once[0].groups), fields[::-1])
        recalls = []
        for name, queries, ranking in ((f"{first}_to_{second}", sides[0], there), (f"{second}_to_{first}", sides[1], back)):
            self.add(f"{place}/{name}", queries, ranking)
            recalls.append(self.found.values[f"{place}/{name}/recall_at_{self.options.retrieval_at[0]}"])
        return recalls

    def task(self, place: str, task: RetrievalOptions) -> None:
        queries, candidates = self.side(task.query), self.side(task.candidate)
        if task.by:
            labels = entries_of(self.table.metadata, task.by, place)
            queries, candidates = labelled(queries, labels), labelled(candidates, labels)
        alike = task.query == task.candidate
        own = bool(task.by or task.relevance or alike)  # another meaning than the group's
        says_once = isinstance(task.candidate, str) and self.says_once(task.candidate) and not own
        if says_once if task.once is None else task.once:
            candidates = candidates.once_a_group()
        if task.relevance:
            pairs = graded(task.relevance, queries, candidates, self.table)
        else:
            pairs = Pairs.of_groups(queries.groups, candidates.groups)
        itself = torch.arange(len(queries)) if alike else None
        if not len(pairs if itself is None else pairs.without(itself)):
            by = f"a gain above 0 in {task.relevance}" if task.relevance else f"an equal {task.by or 'group'}"
            raise UserError(
                f"{place}: there is nothing to retrieve: {len(queries)} samples have {task.query}, {len(candidates)} have"
                f" {task.candidate}, and none of them {by}"
            )
        fields = [[given] if isinstance(given, str) else given for given in (task.query, task.candidate)]
        (ranking,) = self.rank(queries, candidates, pairs, fields, excluded=itself)
        self.add(place, queries, ranking)

    def languages(self, place: str, options: LanguageOptions) -> None:
        """Of the samples that have all of the fields: each language's way to the candidate and back, and how ranks vary."""
        present = [self.table.present[field] for field in [*options.fields, options.candidate]]
        samples = torch.stack(present).all(0).nonzero().squeeze(1)
        if not len(samples):
            raise UserError(f"{place}: no sample has all of {', '.join([*options.fields, options.candidate])}")
        sides = [Side(self.table.fields[f][samples], samples, self.table.group_ids[samples]) for f in options.fields]
        candidate = Side(self.table.fields[options.candidate][samples], samples, sides[0].groups)
        ranks: list[list[Tensor]] = [[], []]
        for field, side in zip(options.fields, sides, strict=True):
            pairs, pair = Pairs.of_groups(side.groups, candidate.groups), ([field], [options.candidate])
            both = self.rank(side, candidate, pairs, pair, both=not self.one_way)
            if self.one_way:
                both += self.rank(candidate, side, pairs.transposed(), pair[::-1])
            names = f"{field}_to_{options.candidate}", f"{options.candidate}_to_{field}"
            for of, name, ranking in zip(ranks, names, both, strict=True):
                of.append(self.add(f"{place}/{name}", side, ranking)["rank"])
        names = f"to_{options.candidate}", f"{options.candidate}_to_all"
        for name, of in zip(names, ranks, strict=True):
            variance = {"mean_rank_variance": mean_rank_variance(torch.stack(of, 1))}
            self.found.add_estimates(f"{place}/{name}", variance, candidate.groups)

    def side(self, fields: str | list[str]) -> Side:
        return side_of(self.table, fields, self.captions)

    def says_once(self, field: str) -> bool:
        """Texts of a group say the same, so as candidates they count once, unless every line is one."""
        return isinstance(self.model.modality(field), TextModality) and field not in self.captions

    @property
    def one_way(self) -> bool:
        """Whether scores depend on which side asks."""
        return isinstance(self.options.scoring, str)

    def rank(
        self, queries: Side, candidates: Side, pairs: Pairs, fields: Sequence[Sequence[str]], **options: Any
    ) -> list[Ranking]:
        """Rank by the options' scoring; `fields`: those of the queries, those of the candidates."""
        x, y = self.table.compared(queries.rows), self.table.compared(candidates.rows, columns=True)
        kind = self.options.scoring
        if isinstance(kind, str):
            rows = queries.rows.to(self.device), candidates.rows.to(self.device)
            options["scoring"] = ScoreCorrection.of(kind, *rows, alike=options.get("excluded") is not None)
        elif kind and self.bank and (bridge := self.bank.between(self.model, *fields)):
            if kind.rows == "exact":
                options["bridge"] = bridge
            else:
                x, y = bridge.expected(x), bridge.expected(y, candidates=True)
        try:
            return rank(x, y, pairs, device=self.device, group=self.group, progress=self.progress, **options)
        except ValueError as error:
            raise UserError(f"{self.split}: {error}") from error

    def add(self, place: str, queries: Side, ranking: Ranking) -> dict[str, Tensor]:
        values = query_metrics(ranking, self.options.retrieval_at)
        samples = queries.samples[ranking.queries.unique()]
        self.found.add_means(place, values, self.table.group_ids[samples])
        self.found.values |= {f"{place}/num_queries": len(values["rank"]), f"{place}/num_candidates": ranking.num_candidates}
        return values
