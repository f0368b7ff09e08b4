"""The classification that a suite asks for: zero-shot by prompts, and probes trained on embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.data.class_texts import filled
from mmcontrast.errors import UserError
from mmcontrast.evaluation.classification import phrase_embedding, predict, report
from mmcontrast.evaluation.embed import EmbeddingTable, embed_texts
from mmcontrast.evaluation.labels import ClassLabels, MatchedLabels, entries_of, label_text
from mmcontrast.evaluation.options import ProbeOptions, ZeroShotOptions
from mmcontrast.evaluation.probes import few_shot, knn, linear_probe, over_seeds
from mmcontrast.evaluation.prompts import named_classes, named_templates
from mmcontrast.evaluation.results import Evaluation
from mmcontrast.models import ContrastiveModel


def phrases_of(task: ZeroShotOptions) -> dict[str, list[str]]:
    """Per label, what its class is called.

    Raises:
        UserError: for a list by a name that there is not.
    """
    if isinstance(task.classes, dict):
        return task.classes
    names = named_classes(task.classes) if isinstance(task.classes, str) else task.classes
    return {str(label): [name] for label, name in enumerate(names)}


def labels_of_classes(task: ZeroShotOptions) -> ClassLabels:
    """Return what tells the class of a label."""
    return ClassLabels(list(phrases_of(task)), numbered=not isinstance(task.classes, dict))


Classes = list[Tensor]  # of each class embeddings [P, D] of its phrases


def embed_classes(
    model: ContrastiveModel, task: ZeroShotOptions, device: torch.device | str, widths: Sequence[int] = ()
) -> dict[int | None, Classes]:
    """Return the classes' embeddings, under None; and those of prefixes of them, by width."""
    field, templates = task.prompt_field, task.templates
    assert field
    templates = named_templates(templates) if isinstance(templates, str) else templates

    def embed(phrase: str) -> dict[int | None, Tensor]:
        rows = embed_texts(model, field, [filled(template, phrase) for template in templates], device)
        if model.hyperbolic is not None:
            return {None: rows.mean(0)}  # of tangent vectors, as MERU's
        prefixes: dict[int | None, Tensor] = {width: phrase_embedding(F.normalize(rows[:, :width], dim=1)) for width in widths}
        return {None: phrase_embedding(rows), **prefixes}

    embedded = [[embed(phrase) for phrase in phrases] for phrases in phrases_of(task).values()]
    return {width: [torch.stack([one[width] for one in of]) for of in embedded] for width in (None, *widths)}


def zero_shot(found: Evaluation, place: str, table: EmbeddingTable, task: ZeroShotOptions, classes: Sequence[Tensor]) -> None:
    """Classify one split by one task; nothing, if the split lacks the field.

    Raises:
        UserError: if labels are no classes, as `ClassLabels.match`; if no sample has both the field and one of the labels.
    """
    assert task.field
    if task.field not in table.fields:
        return
    phrases = phrases_of(task)
    rows, labels, matched = labelled_rows(table, task.field, task.label, labels_of_classes(task), place)
    candidates = [table.compared(of_class, columns=True) for of_class in classes]
    predictions, ranks = predict(table.compared(rows), candidates, labels)
    shown = [of[0] if label.isdigit() else label for label, of in phrases.items()]
    found.add_report(place, report(predictions, labels, len(classes), ranks), shown)
    tell(found, place, matched, len(labels.unique()), len(classes))


def tell(found: Evaluation, place: str, matched: MatchedLabels, seen: int, classes: int) -> None:
    """Count the samples that a task leaves out, and note them and the classes without samples."""
    notes = []
    if matched.unlabelled:
        found.values[f"{place}/num_unlabelled"] = matched.unlabelled
        notes.append(f"samples without a label are left out: {matched.unlabelled}")
    if matched.others:
        found.values[f"{place}/num_other_labels"] = number = matched.others.total()
        shown = ", ".join(f"{text[:40]!r} ({count})" for text, count in matched.others.most_common(5))
        shown += ", …" if len(matched.others) > 5 else ""
        notes.append(f"samples with labels that are no class are left out: {number}, of {shown}")
    if seen < classes:
        notes.append(f"classes without samples: {classes - seen} of {classes}")
    if notes:
        found.notes.append(f"{place}: {'; '.join(notes)}")


def probe(found: Evaluation, splits: dict[str, str], task: ProbeOptions, train: EmbeddingTable) -> None:
    """All kinds of probe of one task on splits, whose tables are there already.

    Args:
        splits: the place of its results, by split.

    Raises:
        UserError: if the training samples lack the field or the label, or labels are no classes of theirs.
    """
    assert task.field
    if task.field not in train.fields:
        raise UserError(
            f"probes: the samples of {task.train} have no field {task.field!r}; they have {', '.join(train.fields)}"
        )
    place = next(iter(splits.values())).partition("/")[2]
    here = train.present[task.field].tolist()
    classes = trained_classes([entry for entry, has in zip(train.metadata, here, strict=True) if has], task, place)
    names = classes.names
    rows, labels, matched = labelled_rows(train, task.field, task.label, classes, f"{place}, training samples")
    if matched.unlabelled:
        found.notes.append(f"{place}: training samples without a label are left out: {matched.unlabelled}")
    tests = {
        place: labelled_rows(found.tables[split], task.field, task.label, classes, place)
        for split, place in splits.items()
        if task.field in found.tables[split].fields
    }
    if not tests:
        return
    every, sizes = torch.cat([test for test, *_ in tests.values()]), [len(truth) for _, truth, _ in tests.values()]
    for place, (_, truth, of_test) in tests.items():
        tell(found, place, of_test, len(truth.unique()), len(names))

    def add(kind: str, predictions: Tensor) -> None:
        for (place, (_, truth, _)), of in zip(tests.items(), predictions.split(sizes), strict=True):
            found.add_report(f"{place}/{kind}", report(of, truth, len(names)), names)

    if "linear" in task.kinds:
        add("linear", linear_probe(rows, labels, every))
    if "knn" in task.kinds:
        compared = train.compared(rows, columns=True), labels, train.compared(every)
        add("knn", knn(*compared, task.neighbours, distances=train.distances))
    rarest = int(labels.bincount().min())
    for shots in (shots for shots in task.shots if "few_shot" in task.kinds and shots <= rarest):
        predictions = few_shot(rows, labels, every, shots, seeds=range(task.seeds))
        for (place, (_, truth, _)), of in zip(tests.items(), predictions.split(sizes, dim=1), strict=True):
            found.add_means(f"{place}/few_shot_{shots}", {"top1": (of == truth).double().mean(0)})
            found.values[f"{place}/few_shot_{shots}/top1_std_over_seeds"] = over_seeds(of, truth)[1]


def trained_classes(metadata: Sequence[dict[str, Any]], task: ProbeOptions, place: str) -> ClassLabels:
    """Return the classes that training samples have.

    Raises:
        UserError: if none of them has the label.
    """
    values = entries_of(metadata, task.label, f"{place}, training samples")
    return ClassLabels(sorted({text for value in values if (text := label_text(value)) is not None}))


def labelled_rows(
    table: EmbeddingTable, field: str, label: str, classes: ClassLabels, place: str
) -> tuple[Tensor, Tensor, MatchedLabels]:
    """Return (embeddings [N, D], numbers of classes [N]) of the samples that have the field and a label of the classes, and the
    labels of all that have the field.

    Raises:
        UserError: as `ClassLabels.match`; if there is no such sample.
    """
    values, here = entries_of(table.metadata, label, place), table.present[field].nonzero().squeeze(1)
    matched = classes.match([values[row] for row in here.tolist()], place)
    kept = matched.numbers >= 0
    if not kept.any():
        why = f"; {classes.unlike(matched.others, {})}" if matched.others else f", {len(here)} have the field"
        raise UserError(f"{place}: no sample has the field {field!r} and a label {label!r} that is a class{why}")
    return table.fields[field][here[kept]], matched.numbers[kept], matched
