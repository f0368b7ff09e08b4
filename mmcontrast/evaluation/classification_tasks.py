"""Run a suite's classification: zero-shot by prompts, and probes trained on embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class LabelledRows:
    """N embeddings of labelled samples.

    Attributes:
        rows: [N, D].
        numbers: int64 [N], of classes.
        groups: int64 [N].
        matched: the labels of all that have the field.
    """

    rows: Tensor
    numbers: Tensor
    groups: Tensor
    matched: MatchedLabels

    @property
    def clusters(self) -> Tensor | None:
        """Return the groups, whose samples are drawn together; None where each class is one group, as classes are not drawn."""
        pairs = torch.stack([self.numbers, self.groups], 1).unique(dim=0)
        return None if len(pairs) == len(self.numbers.unique()) else self.groups


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
    labelled = labelled_rows(table, task.field, task.label, labels_of_classes(task), prefix)
    candidates = [table.compared(phrase_rows, columns=True) for phrase_rows in classes]
    predictions, ranks = predict(table.compared(labelled.rows), candidates, labelled.numbers)
    names = [class_phrases[0] if label.isdigit() else label for label, class_phrases in phrases.items()]
    evaluation.add_report(prefix, report(predictions, labelled.numbers, len(classes), ranks), names, labelled.clusters)
    add_label_notes(evaluation, prefix, labelled, len(classes))


def add_label_notes(evaluation: Evaluation, prefix: str, labelled: LabelledRows, num_classes: int) -> None:
    """Count the samples that a task leaves out, and note them and the classes without samples."""
    notes, matched, num_seen = [], labelled.matched, len(labelled.numbers.unique())
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
    trained = labelled_rows(train, task.field, task.label, classes, f"{name}, training samples")
    rows, labels = trained.rows, trained.numbers
    if trained.matched.unlabelled:
        evaluation.notes.append(f"{name}: training samples without a label are left out: {trained.matched.unlabelled}")
    tests = {
        prefix: labelled_rows(evaluation.tables[split], task.field, task.label, classes, prefix)
        for split, prefix in splits.items()
        if task.field in evaluation.tables[split].fields
    }
    if not tests:
        return
    test_rows = torch.cat([test.rows for test in tests.values()])
    sizes = [len(test.rows) for test in tests.values()]
    for prefix, test in tests.items():
        add_label_notes(evaluation, prefix, test, num_classes)

    def add(kind: str, predictions: Tensor) -> None:
        for (prefix, test), predicted in zip(tests.items(), predictions.split(sizes), strict=True):
            found = report(predicted, test.numbers, num_classes)
            evaluation.add_report(f"{prefix}/{kind}", found, classes.names, test.clusters)

    if "linear" in task.kinds:
        add("linear", linear_probe(rows, labels, test_rows))
    if "knn" in task.kinds:
        compared = train.compared(rows, columns=True), labels, train.compared(test_rows)
        add("knn", knn(*compared, task.neighbours, distances=train.distances))
    rarest = int(labels.bincount().min())
    for shots in (shots for shots in task.shots if "few_shot" in task.kinds and shots <= rarest):
        predictions = few_shot(rows, labels, test_rows, shots, seeds=range(task.seeds))
        for (prefix, test), predicted in zip(tests.items(), predictions.split(sizes, dim=1), strict=True):
            right = (predicted == test.numbers).double().mean(0)
            evaluation.add_means(f"{prefix}/few_shot_{shots}", {"top1": right}, test.clusters)
            evaluation.values[f"{prefix}/few_shot_{shots}/top1_std_over_seeds"] = over_seeds(predicted, test.numbers)[1]


def trained_classes(metadata: Sequence[dict[str, Any]], task: ProbeOptions, task_name: str) -> ClassLabels:
    """Return the classes of the training samples' labels.

    Raises:
        UserError: if none of them has the label.
    """
    values = entries_of(metadata, task.label, f"{task_name}, training samples")
    return ClassLabels(sorted({text for value in values if (text := label_text(value)) is not None}))


def labelled_rows(table: EmbeddingTable, field: str, label: str, classes: ClassLabels, task_name: str) -> LabelledRows:
    """Return the samples that have the field and a label of the classes.

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
    rows = present_rows[kept]
    return LabelledRows(table.fields[field][rows], matched.numbers[kept], table.group_ids[rows], matched)
