"""Evaluate a model by a suite: embed every split, run retrieval, zero-shot classification and probes, measure the geometry."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import combinations, permutations
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress

from mmcontrast.components import suggestion
from mmcontrast.data import ShardDataset, ShardOptions, Shards
from mmcontrast.errors import UserError
from mmcontrast.evaluation.banks import read_bank
from mmcontrast.evaluation.bootstrap import Estimate
from mmcontrast.evaluation.classification_tasks import embed_classes, labels_of_classes, probe, trained_classes, zero_shot
from mmcontrast.evaluation.clip_benchmark_layout import is_layout, with_layouts
from mmcontrast.evaluation.embed import EmbeddingTable, embed_dataset, embed_together
from mmcontrast.evaluation.geometry import HUB_NEIGHBOURS, alignment, effective_rank, hubness, modality_gap, uniformity
from mmcontrast.evaluation.labels import ClassLabels, entries_of, labels_ahead
from mmcontrast.evaluation.options import BridgeOptions, EvaluationOptions, ProbeOptions, ZeroShotOptions
from mmcontrast.evaluation.repeats import repeats_note
from mmcontrast.evaluation.results import Evaluation
from mmcontrast.evaluation.retrieval_inputs import embed_captions
from mmcontrast.evaluation.retrieval_tasks import RetrievalTasks
from mmcontrast.evaluation.sending import device_of, from_first
from mmcontrast.modalities import ImageModality, Modality, TextModality
from mmcontrast.models import ContrastiveModel

Embed = Callable[[str, ShardDataset], EmbeddingTable]  # (split, its data) → its embeddings


def evaluate(
    model: ContrastiveModel,
    datasets: Mapping[str, ShardDataset],
    options: EvaluationOptions,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
    embed: Embed | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Evaluation:
    """Evaluate a model.

    Args:
        datasets, options: as returned by `open_splits`.
        group: its ranks share embedding and ranking; the first has the results, the others' are empty.
        embed: returns a split's table to the first rank; default: embed it now.
        autocast: the context in which the towers compute; everything else is in fp32 or more.
    """
    first = not group or dist.get_rank(group) == 0
    evaluation = Evaluation(options.resamples if first else 0)
    embed = embed or partial(embed_split, model, options, device, progress, group)
    with autocast():
        widths = [width for width in options.widths or () if width < model.embed_dim]
        bank = None
        if isinstance(scoring := options.scoring, BridgeOptions) and datasets:
            keys = {field: read for dataset in datasets.values() for field, read in dataset.choices.items()}
            bank = evaluation.bank = read_bank(model, scoring.bank, scoring.field, scoring.scale, device, keys)
        class_embeddings = {}
        if datasets:
            class_embeddings = {name: embed_classes(model, task, device, widths) for name, task in options.zero_shot.items()}
    for split in options.splits:
        with autocast():
            table = broadcast_table(embed(split, datasets[split]), group, relevance_entries(options))
            captions = {
                field: embed_captions(model, field, datasets[split], table, device, options.batch_size, group)
                for field in captions_of(options, split)
                if field in table.fields
            }
        texts = [field for field in table.fields if isinstance(model.modality(field), TextModality)]
        for width, split_table, target in evaluation.by_width(table, widths):
            split_captions = {field: rows.prefix(width) if width else rows for field, rows in captions.items()}
            bridge_of = partial((bank.prefix(width) if width else bank).between, model) if bank else None
            RetrievalTasks(split, split_table, split_captions, options, device, progress, group, target, texts, bridge_of).run()
            for name, task in options.zero_shot.items():
                if first and split in (task.splits or options.splits):
                    zero_shot(target, f"{split}/zero_shot/{name}", split_table, task, class_embeddings[name][width])
        if first:
            evaluation.tables[split] = table
            for field in table.fields:
                repeated = None if isinstance(model.modality(field), TextModality) else repeats_note(table, split, field)
                evaluation.notes += [repeated] if repeated else []
            if options.geometry:
                add_geometry(evaluation, f"{split}/geometry", table)
    for name, probe_task in options.probes.items():
        with autocast():
            training_table = embed(training_split(name), datasets[training_split(name)])
        if first:
            prefixes = {split: f"{split}/probe/{name}" for split in probe_task.splits or options.splits}
            probe(evaluation, prefixes, probe_task, training_table)
    return evaluation if first else Evaluation()


def embed_split(
    model: ContrastiveModel,
    options: EvaluationOptions,
    device: torch.device | str,
    progress: Progress | None,
    group: dist.ProcessGroup | None,
    split: str,
    dataset: ShardDataset,
) -> EmbeddingTable:
    """Embed a split with all ranks of the group; the first returns the complete table."""
    embed = partial(embed_together, group=group) if group else embed_dataset
    return embed(
        model,
        dataset,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=device,
        progress=progress,
        label=f"embedding {split}",
        name=f"split {split!r}",
    )


def relevance_entries(options: EvaluationOptions) -> set[str]:
    """Return the entries of samples' metadata that all ranks need for retrieval: the labels or keys that define relevance."""
    label_names = {task.by for task in options.retrieval.values() if task.by}
    return label_names | ({"key"} if any(task.relevance for task in options.retrieval.values()) else set())


def broadcast_table(table: EmbeddingTable, group: dist.ProcessGroup | None, entries: Collection[str]) -> EmbeddingTable:
    """Return the first rank's table on all ranks; of its metadata the other ranks get these entries only. The ranks of a
    machine hold one copy of the embeddings together."""
    if not group:
        return table

    def first_rank_table() -> dict[str, Any]:
        metadata = [{name: entry[name] for name in entries if name in entry} for entry in table.metadata] if entries else None
        return {**vars(table), "metadata": metadata}

    columns = from_first(first_rank_table, group, device_of(group), share=True)
    if dist.get_rank(group) == 0:
        return EmbeddingTable(**columns | {"metadata": table.metadata})
    metadata = [{}] * len(columns["sample_ids"]) if columns["metadata"] is None else columns["metadata"]
    return EmbeddingTable(**columns | {"metadata": metadata})


def add_geometry(evaluation: Evaluation, prefix: str, table: EmbeddingTable) -> None:
    """Add the geometry of each field, of each pair of fields, and the hubness of each field as another's candidates. Of a
    hyperbolic model add the distance from the origin instead of what is defined for unit vectors."""
    for field, rows in table.fields.items():
        present = table.present[field]
        if not present.any():
            continue
        estimates = {"effective_rank": effective_rank(rows[present])}
        if table.curvature is None:
            estimates["uniformity"] = uniformity(rows[present])
        else:
            estimates["radius"] = Estimate.of_mean(rows[present].double().norm(dim=1))
        evaluation.add_estimates(f"{prefix}/{field}", estimates, table.group_ids[present])
    for first, second in combinations(table.fields, 2):
        in_both = table.present[first] & table.present[second]
        x, y = table.fields[first][in_both], table.fields[second][in_both]
        if len(x) and table.curvature is None:
            estimates = {"alignment": alignment(x, y), "modality_gap": modality_gap(x, y)}
            evaluation.add_estimates(f"{prefix}/{first}_{second}", estimates, table.group_ids[in_both])
    for query, candidate in permutations(table.fields, 2):
        queries, candidates = (table.fields[field][table.present[field]] for field in (query, candidate))
        if len(queries) and len(candidates) > HUB_NEIGHBOURS:
            skewness, antihubs = hubness(table.compared(queries), table.compared(candidates, columns=True))
            evaluation.add_estimates(f"{prefix}/{query}_to_{candidate}", {"hubness": skewness, "antihubs": antihubs})


def captions_of(options: EvaluationOptions, split: str) -> list[str]:
    """Return the fields of a split of which every line is a caption."""
    return options.captions.get(split, []) if isinstance(options.captions, dict) else options.captions


def training_split(probe: str) -> str:
    """Return the name of a probe's training data among the data sets of the splits."""
    return f"probe {probe}"


def open_splits(
    options: EvaluationOptions, model: ContrastiveModel, open_data: Callable[[ShardOptions], ShardDataset]
) -> tuple[EvaluationOptions, dict[str, ShardDataset]]:
    """Return the options with default fields filled in and the tasks of splits in CLIP_benchmark's layout added, and the data
    sets of all splits and probes.

    Raises:
        UserError: for a missing field, split or data; for labels that are no classes.
    """
    image, text = first_field(model, ImageModality), first_field(model, TextModality)
    rgb_splits = {name for name, shards in options.splits.items() if is_layout(ShardOptions.of(shards).shards)}
    options = with_layouts(options, image, text)
    zero_shot = {
        name: task.model_copy(update={"field": task.field or image, "prompt_field": task.prompt_field or text})
        for name, task in options.zero_shot.items()
    }
    probes = {name: task.model_copy(update={"field": task.field or image}) for name, task in options.probes.items()}
    options = options.model_copy(update={"zero_shot": zero_shot, "probes": probes})
    check_tasks(options, model)
    rgb_splits |= {training_split(name) for name, task in probes.items() if rgb_splits >= set(task.splits or options.splits)}
    shards_by_name = dict(options.splits) | {training_split(name): task.train for name, task in probes.items()}
    datasets = {}
    for name, shards in shards_by_name.items():
        option = f"evaluation.splits.{name}" if name in options.splits else f"evaluation.probes.{name.partition(' ')[2]}.train"
        datasets[name] = dataset = open_data(ShardOptions.of(shards))
        if not len(dataset):
            raise UserError(f"{option}: {shown_name(shards)} has no samples")
        for field in set(captions_of(options, name)) & dataset.modalities.keys():
            modality = dataset.modalities[field]
            assert isinstance(modality, TextModality)
            if field in dataset.templates:
                raise UserError(
                    f"{option}: {field!r} holds names of classes, of which no line is a caption: leave it out of captions"
                )
            dataset.modalities[field] = modality.by_lines()
        for field, modality in dataset.modalities.items():
            if name in rgb_splits and isinstance(modality, ImageModality):
                dataset.modalities[field] = modality.as_rgb()
    check_labels(options, datasets)
    return options, datasets


def shown_name(shards: Shards) -> str:
    """Return the patterns of shards for a message."""
    patterns = ShardOptions.of(shards).shards
    return patterns if isinstance(patterns, str) else ", ".join(patterns[:3])


def check_labels(options: EvaluationOptions, datasets: Mapping[str, ShardDataset]) -> None:
    """Check the labels of some thousand samples of each split against the classes of its tasks.

    Raises:
        UserError: for labels that are no classes.
    """
    if not options.zero_shot and not options.probes:
        return
    previews = {name: labels_ahead(dataset) for name, dataset in datasets.items()}

    def check(task_name: str, split: str, task: ZeroShotOptions | ProbeOptions, classes: ClassLabels) -> None:
        metadata, complete = previews[split]
        if task.field not in datasets[split].modalities or (
            not any(task.label in entry for entry in metadata) and not complete
        ):
            return
        matched = classes.match(entries_of(metadata, task.label, task_name), task_name)
        if complete and not (matched.numbers >= 0).any():
            raise UserError(f"{task_name}: {classes.mismatch_message(matched.unmatched, {})}")

    for name, task in options.zero_shot.items():
        for split in task.splits or options.splits:
            check(f"{split}/zero_shot/{name}", split, task, labels_of_classes(task))
    for name, probe_task in options.probes.items():
        metadata, complete = previews[training_split(name)]
        if complete:  # else other samples may have other classes
            classes = trained_classes(metadata, probe_task, f"probe/{name}")
            for split in probe_task.splits or options.splits:
                check(f"{split}/probe/{name}", split, probe_task, classes)


def first_field(model: ContrastiveModel, kind: type[Modality]) -> str:
    """Return the first field of a modality; "" if there is none."""
    return next((field for field in model.modalities if isinstance(model.modality(field), kind)), "")


def check_tasks(options: EvaluationOptions, model: ContrastiveModel) -> None:
    """Check the fields, splits and combinations of options of all tasks, before anything is embedded.

    Raises:
        UserError: for a missing field or split, or options that exclude each other.
    """
    fields = list(model.modalities)
    for split in options.captions if isinstance(options.captions, dict) else ():
        if split not in options.splits:
            raise UserError(f"evaluation.captions: no split {split!r}; {suggestion(split, options.splits)}")
    captions = {field for split in options.splits for field in captions_of(options, split)}
    named: list[tuple[str, str | None, list[str]]] = [("captions", field, []) for field in captions]  # (task, field, splits)
    for name, task in options.zero_shot.items():
        named += [(f"zero_shot.{name}", field, task.splits) for field in (task.field, task.prompt_field)]
    for name, retrieval in options.retrieval.items():
        for side in (retrieval.query, retrieval.candidate):
            side_fields = [side] if isinstance(side, str) else side
            named += [(f"retrieval.{name}", field, retrieval.splits) for field in side_fields]
        if retrieval.once and (retrieval.within or retrieval.by or retrieval.relevance):
            raise UserError(f"evaluation.retrieval.{name}: once is of groups, for another field's candidates: leave it out")
    for name, language in options.languages.items():
        named += [(f"languages.{name}", field, []) for field in [*language.fields, language.candidate]]
    named += [(f"probes.{name}", probe_task.field, probe_task.splits) for name, probe_task in options.probes.items()]
    for option, field, splits in named:
        if field not in fields:
            missing = f"field {field!r}" if field else "image or text field for it: name its fields"
            raise UserError(f"evaluation.{option}: the model has no {missing}; it has {', '.join(fields)}")
        for split in splits:
            if split not in options.splits:
                raise UserError(f"evaluation.{option}: no split {split!r}; {suggestion(split, options.splits)}")
    texts = [(f"zero_shot.{name}: prompt_field", task.prompt_field) for name, task in options.zero_shot.items()]
    for option, text in [*texts, *(("captions:", field) for field in captions)]:
        if not isinstance(model.modality(text or ""), TextModality):
            raise UserError(f"evaluation.{option} {text!r} is not text")
    for option in ("scoring", "whiten"):
        if getattr(options, option) and not (options.retrieval or options.languages or (options.pairs and len(fields) > 1)):
            raise UserError(
                f"evaluation.{option}: it is of retrieval, and none is asked for: leave it out, or name a task of `retrieval`"
            )
    for option in ("whiten", "scoring", "widths"):
        if model.hyperbolic is not None and getattr(options, option):
            raise UserError(f"evaluation.{option}: it is of cosines, and the model's scores are hyperbolic: leave it out")
    if options.whiten and isinstance(options.scoring, BridgeOptions):
        raise UserError("evaluation.whiten: a bank's rows are not whitened with the split's: leave it out, or the bridge")
    for width in options.widths or ():
        if width > model.embed_dim:
            raise UserError(f"evaluation.widths: {width} of embeddings of {model.embed_dim} numbers")
    if options.report_split not in (None, *options.splits):
        raise UserError(f"evaluation.report_split={options.report_split!r} is none of {', '.join(options.splits)}")
