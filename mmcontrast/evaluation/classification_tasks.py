"""Run a suite's classification: zero-shot by prompts, and probes trained on embeddings."""

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
    """Return the phrases of the class of each label.

    Raises:
        UserError: for an unknown name of a list.
    """
    if isinstance(task.classes, dict):
        return task.classes
    names = named_classes(task.classes) if isinstance(task.classes, str) else task.classes
    return {str(label): [name] for label, name in enumerate(names)}


def labels_of_classes(task: ZeroShotOptions) -> ClassLabels:
    """Return the matcher of labels to a task's classes."""
    return ClassLabels(list(phrases_of(task)), numbered=not isinstance(task.classes, dict))


Classes = list[Tensor]  # embeddings [P, D] of each class's phrases


def embed_classes(
    model: ContrastiveModel, task: ZeroShotOptions, device: torch.device | str, widths: Sequence[int] = ()
) -> dict[int | None, Classes]:
    """Return the classes' embeddings, under None; and those of their prefixes, by width."""
    field, templates = task.prompt_field, task.templates
    assert field
    templates = named_templates(templates) if isinstance(templates, str) else templates

    def embed(phrase: str) -> dict[int | None, Tensor]:
        rows = embed_texts(model, field, [filled(template, phrase) for template in templates], device)
        if model.hyperbolic is not None:
            return {None: rows.mean(0)}  # of tangent vectors, as MERU's
        prefixes: dict[int | None, Tensor] = {width: phrase_embedding(F.normalize(rows[:, :width], dim=1)) for width in widths}
        return {None: phrase_embedding(rows), **prefixes}

    by_class = [[embed(phrase) for phrase in phrases] for phrases in phrases_of(task).values()]
    return {
        width: [torch.stack([prefixes[width] for prefixes in class_phrases]) for class_phrases in by_class]
        for width in (None, *widths)
    }


def zero_shot(
    evaluation: Evaluation, prefix: str, table: EmbeddingTable, task: ZeroShotOptions, classes: Sequence[Tensor]
) -> None:
    """Classify one split by one task, unless the split lacks the field.

    Raises:
        UserError: if labels are no classes, as `ClassLabels.match`; if no sample has both the field and one of the labels.
    """
    assert task.field
    if task.field not in table.fields:
        return
    phrases = phrases_of(task)
    rows, labels, matched = labelled_rows(table, task.field, task.label, labels_of_classes(task), prefix)
    candidates = [table.compared(phrase_rows, columns=True) for phrase_rows in classes]
    predictions, ranks = predict(table.compared(rows), candidates, labels)
    names = [class_phrases[0] if label.isdigit() else label for label, class_phrases in phrases.items()]
    evaluation.add_report(prefix, report(predictions, labels, len(classes), ranks), names)
    add_label_notes(evaluation, prefix, matched, len(labels.unique()), len(classes))


def add_label_notes(evaluation: Evaluation, prefix: str, matched: MatchedLabels, num_seen: int, num_classes: int) -> None:
    """Count the samples that a task leaves out, and note them and the classes without samples."""
    notes = []
    if matched.unlabelled:
        evaluation.values[f"{prefix}/num_unlabelled"] = matched.unlabelled
        notes.append(f"samples without a label are left out: {matched.unlabelled}")
    if matched.unmatched:
        evaluation.values[f"{prefix}/num_other_labels"] = number = matched.unmatched.total()
        examples = ", ".join(f"{text[:40]!r} ({count})" for text, count in matched.unmatched.most_common(5))
        examples += ", …" if len(matched.unmatched) > 5 else ""
        notes.append(f"samples with labels that are no class are left out: {number}, of {examples}")
    if num_seen < num_classes:
        notes.append(f"classes without samples: {num_classes - num_seen} of {num_classes}")
    if notes:
        evaluation.notes.append(f"{prefix}: {'; '.join(notes)}")


def probe(evaluation: Evaluation, splits: dict[str, str], task: ProbeOptions, train: EmbeddingTable) -> None:
    """Train all kinds of probe of one task, and evaluate them on splits, whose tables are in `evaluation`.

    Args:
        splits: the prefix of its results, by split.

    Raises:
        UserError: if the training samples lack the field or the label, or labels are no classes of theirs.
    """
    assert task.field
    if task.field not in train.fields:
        raise UserError(
            f"probes: the samples of {task.train} have no field {task.field!r}; they have {', '.join(train.fields)}"
        )
    name = next(iter(splits.values())).partition("/")[2]
    metadata = [train.metadata[row] for row in train.present[task.field].nonzero().squeeze(1).tolist()]
    classes = trained_classes(metadata, task, name)
    num_classes = len(classes.names)
    rows, labels, matched = labelled_rows(train, task.field, task.label, classes, f"{name}, training samples")
    if matched.unlabelled:
        evaluation.notes.append(f"{name}: training samples without a label are left out: {matched.unlabelled}")
    tests = {
        prefix: labelled_rows(evaluation.tables[split], task.field, task.label, classes, prefix)
        for split, prefix in splits.items()
        if task.field in evaluation.tables[split].fields
    }
    if not tests:
        return
    test_labels = {prefix: truth for prefix, (_, truth, _) in tests.items()}
    test_rows = torch.cat([split_rows for split_rows, _, _ in tests.values()])
    sizes = [len(truth) for truth in test_labels.values()]
    for prefix, (_, truth, matched) in tests.items():
        add_label_notes(evaluation, prefix, matched, len(truth.unique()), num_classes)

    def add(kind: str, predictions: Tensor) -> None:
        for (prefix, truth), predicted in zip(test_labels.items(), predictions.split(sizes), strict=True):
            evaluation.add_report(f"{prefix}/{kind}", report(predicted, truth, num_classes), classes.names)

    if "linear" in task.kinds:
        add("linear", linear_probe(rows, labels, test_rows))
    if "knn" in task.kinds:
        compared = train.compared(rows, columns=True), labels, train.compared(test_rows)
        add("knn", knn(*compared, task.neighbours, distances=train.distances))
    rarest = int(labels.bincount().min())
    for shots in (shots for shots in task.shots if "few_shot" in task.kinds and shots <= rarest):
        predictions = few_shot(rows, labels, test_rows, shots, seeds=range(task.seeds))
        for (prefix, truth), predicted in zip(test_labels.items(), predictions.split(sizes, dim=1), strict=True):
            evaluation.add_means(f"{prefix}/few_shot_{shots}", {"top1": (predicted == truth).double().mean(0)})
            evaluation.values[f"{prefix}/few_shot_{shots}/top1_std_over_seeds"] = over_seeds(predicted, truth)[1]


def trained_classes(metadata: Sequence[dict[str, Any]], task: ProbeOptions, task_name: str) -> ClassLabels:
    """Return the classes of the training samples' labels.

    Raises:
        UserError: if none of them has the label.
    """
    values = entries_of(metadata, task.label, f"{task_name}, training samples")
    return ClassLabels(sorted({text for value in values if (text := label_text(value)) is not None}))


def labelled_rows(
    table: EmbeddingTable, field: str, label: str, classes: ClassLabels, task_name: str
) -> tuple[Tensor, Tensor, MatchedLabels]:
    """Return (embeddings [N, D], numbers of classes [N]) of the samples that have the field and a label of the classes, and the
    labels of all that have the field.

    Raises:
        UserError: as `ClassLabels.match`; if there is no such sample.
    """
    values, present_rows = entries_of(table.metadata, label, task_name), table.present[field].nonzero().squeeze(1)
    matched = classes.match([values[row] for row in present_rows.tolist()], task_name)
    kept = matched.numbers >= 0
    if not kept.any():
        reason = f", {len(present_rows)} have the field"
        if matched.unmatched:
            reason = f"; {classes.mismatch_message(matched.unmatched, {})}"
        raise UserError(f"{task_name}: no sample has the field {field!r} and a label {label!r} that is a class{reason}")
    return table.fields[field][present_rows[kept]], matched.numbers[kept], matched
