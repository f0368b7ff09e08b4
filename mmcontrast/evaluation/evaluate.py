"""All that a suite asks of a model: every split embedded, fields retrieved by fields, tasks classified, spaces measured."""

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
from mmcontrast.evaluation.results import Evaluation
from mmcontrast.evaluation.retrieval_inputs import embed_captions
from mmcontrast.evaluation.retrieval_tasks import RetrievalTasks
from mmcontrast.evaluation.sending import from_first
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
    """Evaluates a model.

    Args:
        datasets, options: as `open_splits` gives them.
        group: its ranks share embedding and ranking; the first has the results, the others' are empty.
        embed: makes a split's table, which the first rank gets; default: it is embedded now.
        autocast: the context in which the towers compute; all else is in fp32 or more.
    """
    first = not group or dist.get_rank(group) == 0
    found = Evaluation(options.resamples if first else 0)
    embed = embed or partial(embed_split, model, options, device, progress, group)
    with autocast():
        widths = [width for width in options.widths or () if width < model.embed_dim]
        bank = None
        if isinstance(through := options.scoring, BridgeOptions) and datasets:
            keys = {field: read for dataset in datasets.values() for field, read in dataset.choices.items()}
            bank = found.bank = read_bank(model, through.bank, through.field, through.scale, device, keys)
        classes = {n: embed_classes(model, task, device, widths) for n, task in options.zero_shot.items()} if datasets else {}
    for split in options.splits:
        with autocast():
            table = shared(embed(split, datasets[split]), group, entries_asked(options))
            captions = {
                field: embed_captions(model, field, datasets[split], table, device, options.batch_size, group)
                for field in captions_of(options, split)
                if field in table.fields
            }
        for width in (None, *widths):
            part = Evaluation(found.resamples) if width else found
            rows = table.prefix(width) if width else table
            sides = {field: side.prefix(width) if width else side for field, side in captions.items()}
            through_prefix = bank.prefix(width) if bank and width else bank
            RetrievalTasks(model, split, rows, sides, options, device, progress, group, part, through_prefix).run()
            for name, task in options.zero_shot.items() if first else ():
                if split in (task.splits or options.splits):
                    zero_shot(part, f"{split}/zero_shot/{name}", rows, task, classes[name][width])
            if width:
                found.add_prefixes(part, width)
        if first:
            found.tables[split] = table
            if options.geometry:
                measure(found, f"{split}/geometry", table)
    for name, asked in options.probes.items():
        with autocast():
            train = embed(training_split(name), datasets[training_split(name)])
        if first:
            probe(found, {s: f"{s}/probe/{name}" for s in asked.splits or options.splits}, asked, train)
    return found if first else Evaluation()


def embed_split(
    model: ContrastiveModel,
    options: EvaluationOptions,
    device: torch.device | str,
    progress: Progress | None,
    group: dist.ProcessGroup | None,
    split: str,
    dataset: ShardDataset,
) -> EmbeddingTable:
    """By all ranks of the group; the first has the whole."""
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


def entries_asked(options: EvaluationOptions) -> set[str]:
    """Return the entries of samples' metadata that all ranks need to retrieve: labels, keys, as they say what is relevant."""
    by = {task.by for task in options.retrieval.values() if task.by}
    return by | ({"key"} if any(task.relevance for task in options.retrieval.values()) else set())


def shared(table: EmbeddingTable, group: dist.ProcessGroup | None, entries: Collection[str]) -> EmbeddingTable:
    """Return the first rank's table, on all; of its metadata the others have these entries alone."""
    if not group:
        return table
    cuda = "nccl" in str(dist.get_backend(group))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def told() -> dict[str, Any]:
        asked = [{name: entry[name] for name in entries if name in entry} for entry in table.metadata] if entries else None
        return {**vars(table), "metadata": asked}

    found = from_first(told, group, device)
    if dist.get_rank(group) == 0:
        return table
    metadata = [{}] * len(found["sample_ids"]) if found["metadata"] is None else found["metadata"]
    return EmbeddingTable(**found | {"metadata": metadata})


def measure(found: Evaluation, place: str, table: EmbeddingTable) -> None:
    """What the space looks like: of each field, of each pair of fields, of each field as it is found by another. Of a
    hyperbolic one how far fields lie from the origin, in the place of what is of unit vectors."""
    for field, rows in table.fields.items():
        here = table.present[field]
        if not here.any():
            continue
        own = {"effective_rank": effective_rank(rows[here])}
        if table.curvature is None:
            own["uniformity"] = uniformity(rows[here])
        else:
            own["radius"] = Estimate.of_mean(rows[here].double().norm(dim=1))
        found.add_estimates(f"{place}/{field}", own, table.group_ids[here])
    for first, second in combinations(table.fields, 2):
        both = table.present[first] & table.present[second]
        x, y = table.fields[first][both], table.fields[second][both]
        if len(x) and table.curvature is None:
            between = {"alignment": alignment(x, y), "modality_gap": modality_gap(x, y)}
            found.add_estimates(f"{place}/{first}_{second}", between, table.group_ids[both])
    for query, candidate in permutations(table.fields, 2):
        queries, candidates = (table.fields[field][table.present[field]] for field in (query, candidate))
        if len(queries) and len(candidates) > HUB_NEIGHBOURS:
            skewness, antihubs = hubness(table.compared(queries), table.compared(candidates, columns=True))
            found.add_estimates(f"{place}/{query}_to_{candidate}", {"hubness": skewness, "antihubs": antihubs})


def captions_of(options: EvaluationOptions, split: str) -> list[str]:
    """The fields of a split of which every line is a caption."""
    return options.captions.get(split, []) if isinstance(options.captions, dict) else options.captions


def training_split(probe: str) -> str:
    """The name under which a probe's training data stand among the splits' data."""
    return f"probe {probe}"


def open_splits(
    options: EvaluationOptions, model: ContrastiveModel, open_data: Callable[[ShardOptions], ShardDataset]
) -> tuple[EvaluationOptions, dict[str, ShardDataset]]:
    """The options in full, with the fields that stand for a default and the tasks of splits in CLIP_benchmark's layout, and the
    data of all splits and probes.

    Raises:
        UserError: for a field, a split or data that are not there; for labels that are no classes.
    """
    image, text = first_field(model, ImageModality), first_field(model, TextModality)
    as_rgb = {name for name, shards in options.splits.items() if is_layout(shards)}
    options = with_layouts(options, image, text)
    zero_shot = {
        name: task.model_copy(update={"field": task.field or image, "prompt_field": task.prompt_field or text})
        for name, task in options.zero_shot.items()
    }
    probes = {name: task.model_copy(update={"field": task.field or image}) for name, task in options.probes.items()}
    options = options.model_copy(update={"zero_shot": zero_shot, "probes": probes})
    check_tasks(options, model)
    as_rgb |= {training_split(name) for name, task in probes.items() if as_rgb >= set(task.splits or options.splits)}
    data = dict(options.splits) | {training_split(name): task.train for name, task in probes.items()}
    datasets = {}
    for name, shards in data.items():
        place = f"evaluation.splits.{name}" if name in options.splits else f"evaluation.probes.{name.partition(' ')[2]}.train"
        datasets[name] = dataset = open_data(ShardOptions.of(shards))
        if not len(dataset):
            raise UserError(f"{place}: {shown_name(shards)} has no samples")
        for field in set(captions_of(options, name)) & dataset.modalities.keys():
            modality = dataset.modalities[field]
            assert isinstance(modality, TextModality)
            if field in dataset.templates:
                raise UserError(
                    f"{place}: {field!r} holds names of classes, of which no line is a caption: leave it out of captions"
                )
            dataset.modalities[field] = modality.by_lines()
        for field, pictures in dataset.modalities.items() if name in as_rgb else ():
            if isinstance(pictures, ImageModality):
                dataset.modalities[field] = pictures.as_rgb()
    check_labels(options, datasets)
    return options, datasets


def shown_name(shards: Shards) -> str:
    """Return the patterns of shards for a message."""
    patterns = ShardOptions.of(shards).shards
    return patterns if isinstance(patterns, str) else ", ".join(patterns[:3])


def check_labels(options: EvaluationOptions, datasets: Mapping[str, ShardDataset]) -> None:
    """
    Raises:
        UserError: for labels that are no classes, as far as some thousand samples of each split show it.
    """
    if not options.zero_shot and not options.probes:
        return
    ahead = {name: labels_ahead(dataset) for name, dataset in datasets.items()}

    def check(place: str, split: str, task: ZeroShotOptions | ProbeOptions, classes: ClassLabels) -> None:
        metadata, whole = ahead[split]
        if task.field not in datasets[split].modalities or (not any(task.label in entry for entry in metadata) and not whole):
            return
        matched = classes.match(entries_of(metadata, task.label, place), place)
        if whole and not (matched.numbers >= 0).any():
            raise UserError(f"{place}: {classes.unlike(matched.others, {})}")

    for name, task in options.zero_shot.items():
        for split in task.splits or options.splits:
            check(f"{split}/zero_shot/{name}", split, task, labels_of_classes(task))
    for name, probe_task in options.probes.items():
        metadata, whole = ahead[training_split(name)]
        if whole:  # else other samples may have other classes
            classes = trained_classes(metadata, probe_task, f"probe/{name}")
            for split in probe_task.splits or options.splits:
                check(f"{split}/probe/{name}", split, probe_task, classes)


def first_field(model: ContrastiveModel, kind: type[Modality]) -> str:
    """The first of that modality; "" if there is none."""
    return next((field for field in model.modalities if isinstance(model.modality(field), kind)), "")


def check_tasks(options: EvaluationOptions, model: ContrastiveModel) -> None:
    """
    Raises:
        UserError: for what could only be refused after embedding otherwise: a field or a split of a task that is not there.
    """
    fields = list(model.modalities)
    captions = {field for split in options.splits for field in captions_of(options, split)}
    named: list[tuple[str, str | None, list[str]]] = [("captions", field, []) for field in captions]
    for name, of in options.zero_shot.items():
        named += [(f"zero_shot.{name}", f, of.splits) for f in (of.field, of.prompt_field)]
    for name, retrieval in options.retrieval.items():
        for given in (retrieval.query, retrieval.candidate):
            named += [(f"retrieval.{name}", f, retrieval.splits) for f in ([given] if isinstance(given, str) else given)]
        if retrieval.once and (retrieval.query == retrieval.candidate or retrieval.by or retrieval.relevance):
            raise UserError(f"evaluation.retrieval.{name}: once is of groups, for another field's candidates: leave it out")
    for name, language in options.languages.items():
        named += [(f"languages.{name}", f, []) for f in [*language.fields, language.candidate]]
    named += [(f"probes.{name}", task.field, task.splits) for name, task in options.probes.items()]
    for place, field, splits in named:
        if field not in fields:
            missing = f"field {field!r}" if field else "field that it could ask or read"
            raise UserError(f"evaluation.{place}: the model has no {missing}; it has {', '.join(fields)}")
        for split in splits:
            if split not in options.splits:
                raise UserError(f"evaluation.{place}: no split {split!r}; {suggestion(split, options.splits)}")
    texts = [(f"zero_shot.{name}: prompt_field", task.prompt_field) for name, task in options.zero_shot.items()]
    for place, text in [*texts, *(("captions:", field) for field in captions)]:
        if not isinstance(model.modality(text or ""), TextModality):
            raise UserError(f"evaluation.{place} {text!r} is not text")
    for option in ("scoring", "whiten"):
        if getattr(options, option) and not (options.retrieval or options.languages or (options.pairs and len(fields) > 1)):
            raise UserError(
                f"evaluation.{option}: it is of retrieval, and none is asked for: leave it out, or name a task of `retrieval`"
            )
    for option in ("whiten", "scoring", "widths") if model.hyperbolic is not None else ():
        if getattr(options, option):
            raise UserError(f"evaluation.{option}: it is of cosines, and the model's scores are hyperbolic: leave it out")
    if options.whiten and isinstance(options.scoring, BridgeOptions):
        raise UserError("evaluation.whiten: a bank's rows are not whitened with the split's: leave it out, or the bridge")
    for width in options.widths or ():
        if width > model.embed_dim:
            raise UserError(f"evaluation.widths: {width} of embeddings of {model.embed_dim} numbers")
    if options.report_split not in (None, *options.splits):
        raise UserError(f"evaluation.report_split={options.report_split!r} is none of {', '.join(options.splits)}")
